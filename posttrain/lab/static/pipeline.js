// A pipeline: its models' evaluation cards side by side, its stages with the runs behind them, what was expected.

import { Loaded, Table, address, html, number, percent, printable, useData, useTitle } from "./ui.js";

export function Page({ pipeline }) {
  useTitle(pipeline);
  const found = useData(`/api${address("pipelines", pipeline)}`, 5000);
  return html`<p class="path"><a href="/">Home</a></p><h1>${printable(pipeline)}</h1>
    <${Loaded} from=${found} of="the pipeline">${(record) => html`<${Pipeline} ...${record} />`}</${Loaded}>`;
}

function Pipeline({ about, finished, stages, figures, expected }) {
  const examined = stages.filter((stage) => stage.card);
  return html`<p class="lead">${printable(about)}</p>
    <p class="soft">${stages.length} stages have ended; ${finished ? "the pipeline is finished." : "more are to come."}</p>
    <section><h2>Models</h2>${figures.length
      ? html`<${Table} caption="The same held-out tasks for every model, with 95 % intervals" head=${["", ...examined.map((stage) => printable(stage.name))]}>
          ${figures.map(({ name, share }) => html`<tr><th scope="row">${printable(name.replaceAll("_", " "))}</th>
            ${examined.map((stage) => html`<td class="number">${estimate(stage.card[name], share ? percent : number)}</td>`)}</tr>`)}</${Table}>`
      : html`<p class="soft">No model has been examined yet.</p>`}</section>
    <section><h2>Stages</h2>${stages.length
      ? html`<${Table} caption="In the order they ran" head=${["stage", "what ran", "seconds", "what it made"]}>${stages.map((stage) => html`<tr>
          <th scope="row">${stage.address ? html`<a href=${address("runs", stage.address)}>${printable(stage.name)}</a>` : printable(stage.name)}</th>
          <td>${printable(stage.run)}</td><td class="number">${number(stage.seconds)}</td>
          <td>${Object.entries(stage.made).map(([name, value]) => `${printable(name.replaceAll("_", " "))} ${typeof value === "number" ? number(value) : printable(value)}`).join(", ")}</td></tr>`)}</${Table}>`
      : html`<p class="soft">No stage has ended yet.</p>`}</section>
    ${expected.length > 0 && html`<section><h2>Expected results</h2><${Table} caption="Results with the bounds that the recipe states" head=${["result", "expected", "found", ""]}>
      ${expected.map((one) => html`<tr><th scope="row">${printable(one.name)}</th><td class="number">${number(one.low)} to ${number(one.high)}</td>
        <td class="number">${number(one.found, 4)}</td><td>${one.found === null ? "not measured yet" : one.low <= one.found && one.found <= one.high ? "✓ met" : "✗ missed"}</td></tr>`)}</${Table}></section>`}`;
}

function estimate(one, form) {
  if (!one) return "–";
  return html`${form(one.value)} <span class="soft">[${form(one.low)}, ${form(one.high)}]</span>`;
}
