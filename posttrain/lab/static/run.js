// One run, or several compared: live curves, evaluation before and after, the doctor's verdicts, logged events, settings.

import { Chart, Legend } from "./chart.js";
import { useLive } from "./live.js";
import { Failed, Loaded, Mark, Table, Waiting, address, grouped, html, printable, useData, useMemo, useTitle } from "./ui.js";

const STATES = {
  loading: "connecting …",
  live: "connected",
  lost: "✗ The lab is not responding; this is the last known state. Reconnecting …",
};

export function Page({ run }) {
  const query = new URLSearchParams(location.search);
  const others = (query.get("with") || "").split(",").filter((name) => name && name !== run).slice(0, 3);
  useTitle(others.length ? `${run} and ${others.length} more` : run);
  const about = useData(`/api${address("runs", run)}`);
  if (about.data === null) {
    return html`<h1>${printable(run)}</h1>${about.error ? html`<${Failed} ...${about} />` : html`<${Waiting} of="the run" />`}`;
  }
  return html`<${Watched} key=${others.join()} run=${run} others=${others} metrics=${query.get("metrics") || ""} about=${about.data} />`;
}

function Watched({ run, others, metrics, about }) {
  const all = [run, ...others];
  const lives = all.map((name) => useLive(name, metrics));  // the number of runs never changes while the page is open
  const [own] = lives;
  const status = own.status || about.status;
  const count = Object.values(about.episodes).reduce((a, b) => a + b, 0);
  return html`
    <p class="path"><a href="/runs">Runs</a></p>
    <h1>${printable(run)}</h1>
    <p class="lead"><${Mark} of=${status} /> <span class="facts">${printable(about.algorithm)}, model ${printable(about.model)}, tasks ${printable(about.tasks)}, step <span id="step">${own.step >= 0 && own.step !== null ? own.step : about.step ?? 0}</span>${about.steps ? ` of ${about.steps}` : ""}</span></p>
    ${own.state !== "live" && html`<p class=${`connection ${own.state}`} role="status">${own.state === "failed" ? printable(own.error) : STATES[own.state]}</p>`}
    <nav class="inside" aria-label="On this page">
      ${count > 0 && html`<a href=${`${address("runs", run)}/episodes`}>Episodes (${grouped(count)})</a>`}
      <a href="#curves">Curves</a><a href="#changes">Before and after</a><a href="#verdicts">Verdicts</a><a href="#notes">Events</a><a href="#settings">Settings</a>
    </nav>
    <section id="curves"><h2>Curves</h2>
      ${others.length > 0 && html`<${Legend} names=${all} marks=${Object.fromEntries(all.map((name) => [name, html`<a href=${address("runs", name)}>${printable(name)}</a>`]))} />`}
      ${lives.slice(1).map((one, i) => one.state === "failed" && html`<${Failed} error=${`${others[i]}: ${one.error}`} />`)}
      <${Curves} names=${all} lives=${lives} status=${status} />
      <${More} metrics=${metrics} live=${own} />
    </section>
    <section id="changes"><h2>Before and after</h2><${Changes} changes=${own.changes} /></section>
    <section id="verdicts"><h2>Verdicts</h2>${own.state === "loading" ? html`<${Waiting} of="the curves" />` : html`<${Verdicts} run=${run} />`}</section>
    ${about.processes.length > 0 && html`<section id="processes"><h2>Processes</h2><${Processes} rows=${about.processes} /></section>`}
    <section id="notes"><h2>Events</h2><${Notes} events=${about.events} /></section>
    <section id="settings"><h2>Settings</h2><${Settings} recipe=${about.recipe} folder=${about.folder} /></section>`;
}

function Curves({ names, lives, status }) {
  const metrics = [...new Set(lives.flatMap((live) => Object.keys(live.curves)))];
  if (!metrics.length) {
    if (lives[0].state === "loading") return html`<${Waiting} of="the curves" />`;
    return html`<p class="box">No metrics yet. ${status === "running" ? "The first point appears after the first step." : ""}</p>`;
  }
  return html`<div class="charts">${metrics.map((metric) => html`<${OneChart} key=${metric} metric=${metric} names=${names} lives=${lives} />`)}</div>`;
}

function OneChart({ metric, names, lives }) {
  const series = useMemo(
    () => names.map((name, i) => ({ name, steps: lives[i].curves[metric]?.[0] || [], values: lives[i].curves[metric]?.[1] || [] })),
    lives.map((live) => live.curves[metric]),
  );
  return html`<${Chart} title=${metric} series=${series} />`;
}

function More({ metrics, live }) {
  const rest = live.names.filter((name) => !(name in live.curves) || metrics.split(",").includes(name));
  if (!rest.length) return null;
  const chosen = metrics.split(",").filter(Boolean);
  const link = (name) => {
    const query = new URLSearchParams(location.search);
    const next = chosen.includes(name) ? chosen.filter((n) => n !== name) : [...chosen, name];
    if (next.length) query.set("metrics", next.join(","));
    else query.delete("metrics");
    return `${location.pathname}${query.size ? `?${query}` : ""}#curves`;
  };
  return html`<details open=${chosen.length > 0}><summary>${rest.length} more metrics</summary><ul class="tags">${rest.map((name) => html`
    <li><a href=${link(name)} aria-label=${`${chosen.includes(name) ? "Hide" : "Show"} ${printable(name)}`}>
      <span aria-hidden="true">${chosen.includes(name) ? "− " : "+ "}</span>${printable(name)}</a></li>`)}</ul></details>`;
}

function Changes({ changes }) {
  if (!changes.length) return html`<p class="soft">No evaluation results are stored.</p>`;
  const { from, to } = changes[0];
  const caption = "Results on held-out tasks, with 95 % intervals where available";
  return html`<${Table} caption=${caption} head=${["metric", `step ${from}`, `step ${to}`]}>${changes.map((row) => html`<tr>
    <th scope="row">${printable(row.label)}</th><td class="number">${row.before}</td><td class="number">${row.after || "–"}</td></tr>`)}</${Table}>`;
}

function Verdicts({ run }) {
  const found = useData(`/api${address("runs", run)}/verdicts`);
  return html`<${Loaded} from=${found} of="the verdicts">${(verdicts) => {
    const known = ["alarm", "warn", "ok"].flatMap((level) => verdicts.filter((one) => one.level === level));
    const silent = verdicts.filter((one) => one.level === "no data");
    return html`
      ${known.length > 0 && html`<${Table} caption="What posttrain doctor says about this run, most severe first" head=${["check", "verdict", "since step", "evidence and what to do"]}>
        ${known.map((one) => html`<tr><th scope="row">${one.name}</th><td><${Mark} of=${one.level} /></td><td class="number">${one.since ?? ""}</td>
          <td class="text">${printable(one.evidence)}${one.advice && html`<div><strong>→ ${printable(one.advice)}</strong></div>`}</td></tr>`)}</${Table}>`}
      ${silent.length > 0 && html`<details><summary>${silent.length} ${silent.length === 1 ? "check" : "checks"} had no data</summary><ul>${silent.map((one) => html`
        <li>${one.name}: ${printable(one.evidence)}</li>`)}</ul></details>`}`;
  }}</${Loaded}>`;
}

function Notes({ events }) {
  if (!events.length) return html`<p class="soft">The run logged no events.</p>`;
  const shown = events.slice(-200);
  return html`<${Table} caption=${shown.length < events.length ? `The last 200 of ${grouped(events.length)} events` : "Events in order of step"} head=${["step", "level", "what", "message"]}>
    ${shown.map((one) => html`<tr><td class="number">${one.step}</td><td><${Mark} of=${one.level} /></td><th scope="row">${printable(one.kind)}</th>
      <td class="text">${printable(one.message)}</td></tr>`)}</${Table}>`;
}

// Who worked for the run, if learners, samplers or judges had processes of their own.
function Processes({ rows }) {
  return html`<${Table} caption="Processes in the order in which they were started" head=${["process", "where", "state", "did", "ended because"]}>
    ${rows.map((one) => html`<tr><th scope="row">${printable(one.name)}</th><td>${printable(one.where)}</td><td>${printable(one.state)}</td>
      <td class="number">${grouped(one.done)} ${printable(one.unit)}</td><td class="text">${printable(one.reason)}</td></tr>`)}</${Table}>`;
}

function Settings({ recipe, folder }) {
  const rows = Object.entries(recipe).flatMap(([section, values]) => Object.entries(values || {}).map(([name, value]) => [`${section}.${name}`, value]));
  return html`<p class="soft">Folder: <code>${printable(folder)}</code></p><details><summary>${rows.length} settings</summary>
    <${Table} caption="All settings of the run" head=${["setting", "value"]}>${rows.map(([name, value]) => html`
      <tr><th scope="row"><code>${printable(name)}</code></th><td>${printable(JSON.stringify(value))}</td></tr>`)}</${Table}></details>`;
}
