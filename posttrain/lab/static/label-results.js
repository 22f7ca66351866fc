// Results of labelling: agreement between annotators, their habits, the export, and reward models trained on it.

import { Command, Failed, Loaded, Mark, Table, address, html, number, percent, printable, useData, useEffect, useState } from "./ui.js";
import { Choice } from "./controls.js";
import { currentToken } from "./label-outbox.js";

const WHO = [["each", "one row per label"], ["majority", "majority of annotators"], ["share", "share of annotators"]];
const FEW = 8; // scored pairs shown until all are requested
const TIES = [["keep", "keep ties"], ["drop", "drop ties"]];

export function Results({ queue, heard }) {
  const api = `/api${address("label", queue)}`;
  const found = useData(`${api}/results`, 5000);
  useEffect(() => { if (heard) found.again(); }, [heard]);
  return html`<${Loaded} from=${found} of="the labels">${(results) => html`<div>
    <section><h2>Annotators</h2>${results.labels ? html`<div><${Habits} rows=${results.habits} /><${Agreement} rows=${results.agreements} /></div>`
      : html`<p class="soft">No labels yet. After the first one, this shows how often the left answer wins and how well people agree.</p>`}</section>
    ${results.labels > 0 && html`<${Learn} queue=${queue} api=${api} labels=${results.labels} />`}</div>`}</${Loaded}>`;
}

const span = ({ value, low, high, n }) => (value === null ? "–" : html`${percent(value)} <span class="soft">[${percent(low)}, ${percent(high)}] of ${n}</span>`);

function Habits({ rows }) {
  return html`<div><p class="soft">The side of each answer is random, so a careful person prefers the left one half of the time.</p>
    <${Table} caption="Annotators and their habits" head=${["annotator", "labels", "ties", "left answer won", "position bias", "seconds per label (median)"]}>
    ${rows.map(({ name, labels, ties, left, seconds }) => html`<tr><th scope="row">${printable(name)}</th><td class="number">${labels}</td><td class="number">${ties}</td>
      <td class="number">${span(left)}</td><td>${leaning(left)}</td><td class="number">${number(seconds, 2)}</td></tr>`)}</${Table}></div>`;
}

function leaning({ value, low, high }) {
  if (value === null) return "–";
  return low > 0.5 ? "! leans left" : high < 0.5 ? "! leans right" : "✓ none detected";
}

function Agreement({ rows }) {
  if (!rows.length) return html`<p class="soft">Agreement is shown once two people have labelled the same pair.</p>`;
  return html`<div><p class="soft">How often two people give a pair the same label. κ (Cohen's kappa) is 0 for agreement by chance and 1 for perfect agreement.</p>
    <${Table} caption="Agreement, with 95 % intervals" head=${["annotators", "same label", "by chance", "κ"]}>
    ${rows.map(({ one, other, agreed, kappa }) => html`<tr><th scope="row">${printable(one)} and ${printable(other)}</th><td class="number">${span(agreed)}</td>
      <td class="number">${percent(kappa.chance)}</td><td class="number">${kappa.value === null ? "–" : html`${number(kappa.value, 2)} <span class="soft">[${number(kappa.low, 2)}, ${number(kappa.high, 2)}]</span>`}</td></tr>`)}</${Table}></div>`;
}

// --- export and training ---------------------------------------------------------------------------------------------

// POSTs with the current lab's token; the lab may have been restarted since this page was opened.
async function post(path, body) {
  const headers = { "x-lab-token": currentToken(), "content-type": "application/json" };
  const answer = await fetch(path, { method: "POST", body: JSON.stringify(body), headers }).catch(() => null);
  if (!answer) throw new Error("The lab is not responding. If it was closed, start it again with `posttrain lab`.");
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.error || `The lab returned HTTP status ${answer.status}. Reload the page.`);
  return said;
}

function Learn({ queue, api, labels }) {
  const models = useData(`${api}/models`, 3000);
  const [how, setHow] = useState({ who: "each", ties: "keep", model: "abacus", steps: "40" }); // as typed, because the page rerenders every few seconds
  const [made, setMade] = useState(null);
  const [error, setError] = useState("");
  const [busy, setBusy] = useState(false);
  const change = (part) => { setHow({ ...how, ...part }); setMade(null); };
  const act = (what) => {
    setBusy(true);
    setError("");
    post(`${api}/${what}`, { ...how, steps: Math.round(Number(how.steps)) || 1 }).then((said) => { if (what === "export") setMade(said); models.again(); }, (failed) => setError(failed.message)).finally(() => setBusy(false));
  };
  return html`<section class="export"><h2>Export and train</h2>
    <p>The export is a preference file for <code>posttrain reward</code> and <code>posttrain dpo</code>. A tie is a row with label 0.5.</p>
    <${Choice} legend="Rows" name="who" options=${WHO} value=${how.who} onChange=${(who) => change({ who })} />
    <${Choice} legend="Ties" name="ties" options=${TIES} value=${how.ties} onChange=${(ties) => change({ ties })} />
    <p class="acts"><a class="button" href=${`${api}/preferences.jsonl?${new URLSearchParams({ who: how.who, ties: how.ties })}`} download=${`${queue}.jsonl`}>Download</a>
      <button type="button" disabled=${busy} onClick=${() => act("export")}>Write the file and show the commands</button></p>
    ${made && html`<p role="status">✓ Wrote ${made.rows} rows to <code>${printable(made.path)}</code>.</p>
      <h3>Train a reward model on it</h3><${Command}>${printable(made.commands.reward)}</${Command}>
      <h3>Or train a policy with DPO, without a reward model</h3><${Command}>${printable(made.commands.dpo)}</${Command}>`}
    ${error && html`<${Failed} error=${error} />`}
    <${Loaded} from=${models} of="models">${({ bases, runs }) => html`<div>
      <h3>Train here</h3>
      <p>This starts <code>posttrain reward</code> as a separate process, which keeps running after the lab is closed.</p>
      <div class="train"><label>start from<select name="base" value=${how.model} onChange=${(event) => change({ model: event.target.value })}>
          ${bases.map(({ name, label }) => html`<option value=${name}>${printable(label)}</option>`)}</select></label>
        <label>updates<input type="number" name="steps" min="1" max="10000" value=${how.steps} onInput=${(event) => change({ steps: event.target.value })} /></label>
        <button type="button" disabled=${busy} onClick=${() => act("train")}>Train a reward model</button></div>
      <${Models} runs=${runs} api=${api} labels=${labels} /></div>`}</${Loaded}></section>`;
}

function Models({ runs, api, labels }) {
  const finished = runs.filter((run) => run.status === "finished");
  const [chosen, setChosen] = useState("");
  const shown = finished.some(({ run }) => run === chosen) ? chosen : finished[0]?.run;
  if (!runs.length) return html`<p class="soft">No reward model has been trained on these labels yet.</p>`;
  return html`<div><${Table} caption="Reward models trained on these labels" head=${["run", "status", "step", "training data"]}>${runs.map(({ run, status, step, steps, file, said }) => html`<tr>
      <th scope="row">${status === "starting" || status === "failed" ? printable(run) : html`<a href=${address("runs", run)}>${printable(run)}</a>`}</th>
      <td>${status === "starting" ? "… starting" : status === "failed" ? html`✗ failed<pre class="note">${printable(said)}</pre>` : html`<${Mark} of=${status} />`}</td>
      <td class="number">${step === null ? "–" : `${step}${steps ? ` of ${steps}` : ""}`}</td><td>${printable(file)}</td></tr>`)}</${Table}>
    ${finished.length > 1 && html`<${Choice} legend="Scores from" name="run" options=${finished.map(({ run }) => [run, run])} value=${shown} onChange=${setChosen} />`}
    ${shown && html`<${Scores} key=${shown} api=${api} run=${shown} labels=${labels} />`}</div>`;
}

function Scores({ api, run, labels }) {
  const found = useData(`${api}/scores${address(run)}?labels=${labels}`); // reloaded after each label
  const [all, setAll] = useState(false);
  return html`<div><h3>Scores of ${printable(run)}</h3><${Loaded} from=${found} of="the model's scores; a large model takes a while">${({ agreement, pairs, count }) => html`<div>
    <p class="soft">How often the preferred answer has the higher score, without ties. Only the prompts that the model was not trained on show how good it is.</p>
    <${Table} caption="Agreement of model and annotators" head=${["annotator", "prompts held out", "prompts trained on"]}>
      ${agreement.map(({ name, held_out, trained }) => html`<tr><th scope="row">${printable(name)}</th><td class="number">${span(held_out)}</td><td class="number">${span(trained)}</td></tr>`)}</${Table}>
    <ol class="scored">${pairs.slice(0, all ? pairs.length : FEW).map((pair) => html`<li key=${pair.id}><${Scored} ...${pair} /></li>`)}</ol>
    ${!all && pairs.length > FEW && html`<p><button type="button" class="quiet" onClick=${() => setAll(true)}>Show ${pairs.length} pairs</button></p>`}
    ${all && count > pairs.length && html`<p class="soft">These are the first ${pairs.length} of ${count} pairs; the table above counts all of them.</p>`}</div>`}</${Loaded}></div>`;
}

function Scored({ prompt, answers, scores, probability, said, held_out }) {
  const higher = scores && (scores[0] > scores[1] ? 0 : 1);
  const by = (side) => said.filter(([, preferred]) => preferred === side).map(([name]) => printable(name)).join(", ");
  const chance = probability === null ? null : [probability, 1 - probability];
  return html`<p class="asked">${printable(prompt)} <span class="soft">${held_out ? "held out" : "trained on"}${by("tie") ? `; tie according to ${by("tie")}` : ""}</span></p>
    ${answers.map((text, i) => html`<div class="scored-answer"><p class="said">${printable(text)}</p>
      <p class="note">${scores ? html`<span class="number">${i === higher ? "▲" : "▽"} score ${number(scores[i])}, preferred with probability ${percent(chance[i])}</span>` : "too long for the model"}
        ${by("ab"[i]) && html`<br />preferred by ${by("ab"[i])}`}</p></div>`)}`;
}
