// The list of runs, from which several can be selected for comparison.

import { Loaded, Mark, Table, address, html, number, percent, printable, useData, useState, useTitle } from "./ui.js";
import { Empty } from "./home.js";

const SHARES = ["accuracy", "eval/accuracy"];

export function Page() {
  useTitle("Runs");
  const runs = useData("/api/runs", 4000);
  return html`<h1>Runs</h1>
    <${Loaded} from=${runs} of="the runs">${(found) => (found.length
      ? html`<${Chooser} runs=${found} />` : html`<${Empty} folder="this folder" />`)}</${Loaded}>`;
}

function Chooser({ runs }) {
  const [chosen, choose] = useState([]);
  const toggle = (name) => choose(chosen.includes(name) ? chosen.filter((n) => n !== name) : [...chosen, name].slice(-4));
  const [first, ...others] = chosen;
  const to = first && `${address("runs", first)}?with=${others.map(encodeURIComponent).join(",")}`;
  return html`<p aria-live="polite">${others.length
    ? html`<a class="button" href=${to}>Compare ${chosen.length} runs</a>`
    : html`<span class="soft">Select two to four runs to compare their curves.</span>`}</p>
    <${RunsTable} runs=${runs} chosen=${chosen} toggle=${toggle} />`;
}

export function RunsTable({ runs, chosen, toggle }) {
  const head = ["run", "status", "step", "reward", "accuracy", "held-out accuracy", "algorithm", "tasks", "model", "started"];
  return html`<${Table} caption="Runs, newest first" head=${toggle ? ["compare", ...head] : head}>
    ${runs.map((run) => html`<tr key=${run.name}>
      ${toggle && html`<td><label class="tick"><input type="checkbox" aria-label=${`Compare ${printable(run.name)}`}
        disabled=${run.status === "damaged"} checked=${chosen.includes(run.name)} onChange=${() => toggle(run.name)} /></label></td>`}
      <th scope="row" class="run-name">${run.status === "damaged" ? printable(run.name)
        : html`<a href=${address("runs", run.name)}>${printable(run.name)}</a>`}</th>
      <td><${Mark} of=${run.status} />${run.note && html`<div class="note">${printable(run.note)}</div>`}</td>
      <td class="number">${run.step ?? "–"}${run.steps ? html`<span class="soft"> of ${run.steps}</span>` : ""}</td>
      ${["reward", ...SHARES].map((name) => html`<td class="number">
        ${SHARES.includes(name) ? percent(run.metrics[name]) : number(run.metrics[name])}</td>`)}
      <td>${printable(run.algorithm)}</td><td>${printable(run.tasks)}</td><td>${printable(run.model)}</td>
      <td class="soft">${printable(run.created).slice(0, 16).replace("T", " ")}</td>
    </tr>`)}</${Table}>`;
}
