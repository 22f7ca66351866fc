// The table of runs, and what is shown when there are none.

import { Command, Mark, Table, address, html, number, percent, printable } from "./ui.js";

const SHARES = ["accuracy", "eval/accuracy"];

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

export function Empty({ folder }) {
  return html`<section class="box empty">
    <h2>No runs yet</h2>
    <p>The lab is showing <code>${printable(folder)}</code>, which has no runs. This command trains the bundled model in a few minutes:</p>
    <${Command}>posttrain demo</${Command}>
    <p>The run appears here while it trains. To see the runs of another folder:</p>
    <${Command}>posttrain lab FOLDER</${Command}>
  </section>`;
}
