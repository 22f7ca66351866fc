// A pipeline: its models' evaluation cards as bars, their answers, its stages with their runs, and expected results.

import { Loaded, Table, address, grouped, html, number, percent, printable, useData, useState, useTitle } from "./ui.js";

export function Page({ pipeline }) {
  useTitle(pipeline);
  const found = useData(`/api${address("pipelines", pipeline)}`, 5000);
  return html`<p class="path"><a href="/">Home</a></p><h1>${printable(pipeline)}</h1>
    <${Loaded} from=${found} of="the pipeline">${(record) => html`<${Pipeline} ...${record} />`}</${Loaded}>`;
}

function Pipeline({ name, about, finished, stages, figures, expected }) {
  const examined = stages.filter((stage) => stage.card);
  return html`<p class="lead">${printable(about)}</p>
    <p class="soft">${stages.length} ${stages.length === 1 ? "stage" : "stages"} finished${finished ? "; the pipeline is complete." : ", more to come."}</p>
    <nav class="inside" aria-label="On this page"><a href="#stages">Stages</a><a href="#models">Evaluation</a><a href="#answers">Sample answers</a>
      ${expected.length > 0 && html`<a href="#expected">Expected results</a>`}</nav>
    <section id="stages"><h2>Stages</h2>${stages.length
      ? html`<${Table} caption="Stages in the order they ran" head=${["stage", "kind", "seconds", "output"]}>${stages.map((stage) => html`<tr>
          <th scope="row"><${Stage} of=${stage} /></th>
          <td>${printable(stage.run)}</td><td class="number">${number(stage.seconds)}</td>
          <td>${stage.card && html`<a href="#models">a model with its evaluation card</a>`}
            ${Object.entries(stage.made).map(([what, value]) => `${printable(what.replaceAll("_", " "))} ${typeof value === "number" ? number(value) : printable(value)}`).join(", ")}</td></tr>`)}</${Table}>`
      : html`<p class="soft">No stage has finished yet.</p>`}</section>
    <section id="models"><h2>Evaluation</h2>${figures.length
      ? html`<p>All models were evaluated on the same held-out tasks. A bar is the mean; the line over its end is the 95 % confidence interval. Where two
          intervals overlap, the difference may be chance.</p>
          <div class="figures">${figures.map((figure) => html`<${Figure} key=${figure.name} figure=${figure} stages=${examined} />`)}</div>`
      : html`<p class="soft">No model has been evaluated yet.</p>`}</section>
    <section id="answers"><h2>Sample answers</h2><${Answers} pipeline=${name} count=${examined.length} /></section>
    ${expected.length > 0 && html`<section id="expected"><h2>Expected results</h2><${Table} caption="Results against the bounds in the recipe" head=${["result", "expected", "measured", "verdict"]}>
      ${expected.map((one) => html`<tr><th scope="row">${printable(one.name)}</th><td class="number">${number(one.low)} to ${number(one.high)}</td>
        <td class="number">${number(one.found, 4)}</td><td>${one.found === null ? "not measured yet" : one.low <= one.found && one.found <= one.high ? "✓ met" : "✗ missed"}</td></tr>`)}</${Table}></section>`}`;
}

function Stage({ of }) {
  return of.address ? html`<a href=${address("runs", of.address)}>${printable(of.name)}</a>` : printable(of.name);
}

// One metric for every model: bars from zero with their intervals, and the numbers.
function Figure({ figure, stages }) {
  const cards = stages.filter((stage) => stage.card[figure.name]);
  const form = figure.share ? percent : number;
  const most = figure.share ? 1 : Math.max(...cards.map((stage) => stage.card[figure.name].high), 0) || 1;
  const place = (value) => `${100 * Math.min(1, Math.max(0, value / most))}%`;
  const tasks = Math.max(...cards.map((stage) => stage.card[figure.name].n || 0), 0);
  return html`<table class="figure"><caption><strong>${printable(figure.label)}</strong><span class="soft">${[figure.note, tasks && `${grouped(tasks)} tasks`].filter(Boolean).map((text) => `, ${printable(text)}`)}</span></caption>
    <tbody>${cards.map((stage) => { const { value, low, high } = stage.card[figure.name]; return html`<tr>
      <th scope="row"><${Stage} of=${stage} /></th>
      <td><div class="value"><span class="measure" aria-hidden="true"><span class="mean" style=${{ width: place(value) }}></span>
        <span class="interval" style=${{ left: place(low), width: `calc(${place(high)} - ${place(low)})` }}></span></span>
        <span class="number">${form(value)} <span class="soft">[${form(low)}, ${form(high)}]</span></span></div></td></tr>`; })}</tbody></table>`;
}

// The answers of every model to the same evaluation prompts, one prompt at a time.
function Answers({ pipeline, count }) {
  const found = useData(`/api${address("pipelines", pipeline)}/answers`);
  const [at, setAt] = useState(0);
  return html`<${Loaded} from=${found} of="the recorded answers">${({ stages, prompts }) => {
    if (!prompts.length) return html`<p class="soft">${count ? "No answers were stored with the evaluation cards." : "No model has been evaluated yet."}</p>`;
    const shown = prompts[Math.min(at, prompts.length - 1)];
    return html`<label class="pick">Prompt<select value=${at} onChange=${(event) => setAt(Number(event.target.value))}>
        ${prompts.map((one, i) => html`<option value=${i}>${printable(one.capability.replaceAll("_", " "))}: ${printable(one.prompt).slice(0, 70)}</option>`)}</select></label>
      <p class="said">${printable(shown.prompt)}</p>
      <ol class="cards group">${shown.answers.map((answer, i) => answer && html`<li class="box"><h3>${printable(stages[i])}</h3>
        <p class="said">${answer.text ? printable(answer.text) : "(empty)"}</p>
        <p class="soft">${answer.passed ? "✓ passed" : "✗ not passed"}${answer.detail && `: ${printable(answer.detail)}`}</p></li>`)}</ol>`;
  }}</${Loaded}>`;
}
