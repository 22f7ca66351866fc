// The stages of a pipeline: what each adds and costs, every model's answers to the same prompts, and new answers if the
// models are in the folder. Everything but new answers is loaded at once, so that choosing a stage sends no request.

import { Answer, FRESH, Thought, askFor, isWriting } from "./chat.js";
import { Choice, Slider, useAddress } from "./controls.js";
import { WORDS } from "./explore-stages-words.js";
import { Command, Loaded, Table, address, html, number, percent, printable, useData, useEffect, useRef, useState, useTitle } from "./ui.js";

const DEFAULTS = { pipeline: "rlhf", stage: "", view: "change", ask: "", temperature: 1, seed: 0 };
const HERE = "here:";
const VIEWS = [["change", "Before and after"], ["alone", "Only this stage"], ["all", "All models"]];
const ASKED = {
  helpfulness: "Requests for help: the model should help",
  safety: "Harmful requests: the model should refuse",
  over_refusal: "Harmless requests that sound harmful: the model should help",
  reasoning: "Problems to work out: only the right answer counts",
};
const NAMES = { helpfulness: "helpfulness", safety: "safety", reasoning: "reasoning accuracy" };

export function Page() {
  useTitle("Training stages");
  const [state, set] = useAddress(DEFAULTS);
  const listed = useData("/api/explore/stages");
  return html`<div class="stages"><p class="path"><a href="/explore">Explore</a></p><h1>Training stages</h1>
    <p class="lead">A pretrained model only continues text. Each later training stage adds something, and may cost something. Choose a stage to read that model's own answers.</p>
    <${Loaded} from=${listed} of="the pipelines">${(lists) => html`<${Chooser} ...${lists} state=${state} set=${set} />
      <${Pipeline} key=${state.pipeline} state=${state} set=${set} here=${lists.here} />`}</${Loaded}></div>`;
}

function Chooser({ recorded, here, state, set }) {
  const option = (prefix) => ({ name }) => html`<option value=${prefix + name}>${printable(name)}</option>`;
  const known = [...recorded.map((one) => one.name), ...here.map((one) => HERE + one.name)].includes(state.pipeline);
  return html`<label class="field narrow"><span class="soft">Pipeline</span>
    <select name="pipeline" value=${state.pipeline} onChange=${(event) => set({ pipeline: event.target.value, stage: "", ask: "" })}>
      ${!known && html`<option value=${state.pipeline}>${printable(state.pipeline)}</option>`}
      <optgroup label="Recorded: these ship with posttrain">${recorded.map(option(""))}</optgroup>
      ${here.length > 0 && html`<optgroup label="Finished in this folder: you can ask their models">${here.map(option(HERE))}</optgroup>`}
    </select></label>`;
}

function Pipeline({ state, set, here }) {
  const own = state.pipeline.startsWith(HERE);
  const name = own ? state.pipeline.slice(HERE.length) : state.pipeline;
  const found = useData(`/api/explore/stages${address(own ? "here" : "recorded", name)}`);
  return html`<${Loaded} from=${found} of="the record">${(record) => html`<${Stages} record=${record} own=${own} name=${name} here=${here} state=${state} set=${set} />`}</${Loaded}>`;
}

function Stages({ record, own, name, here, state, set }) {
  const models = record.stages.filter((stage) => stage.card);
  const others = record.stages.filter((stage) => !stage.card);
  const chosen = record.stages.find((stage) => stage.name === state.stage) || models[0] || record.stages[0];
  const choose = (stage) => (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    set({ stage });
  };
  const link = (stage) => ({
    href: `?${new URLSearchParams({ pipeline: state.pipeline, stage: stage.name, view: state.view })}`,
    onClick: choose(stage.name), "aria-current": stage === chosen ? "step" : null,
  });
  if (!chosen) return html`<p class="box">This pipeline has no stages.</p>`;
  return html`<p>${printable(record.about)}</p>
    <nav aria-label="Stages that produce a model"><ol class="flow">${models.map((stage, i) => html`
      <li>${i > 0 && html`<span class=${stage.from === models[i - 1].name ? "arrow" : "gap"} aria-hidden="true"></span>`}<${Stop} stage=${stage} record=${record} before=${models[i - 1]} link=${link(stage)} /></li>`)}</ol></nav>
    ${others.length > 0 && html`<nav class="makers" aria-label="Stages that produce data or a judge"><span class="soft">Data and judges:</span> ${others.map((stage) => html`
      <a ...${link(stage)}>${printable(stage.name)} <span class="soft">${phase(stage)}</span></a>`)}</nav>`}
    <${Chosen} key=${chosen.name} stage=${chosen} record=${record} state=${state} set=${set} />
    ${chosen.card && html`<${Answers} stage=${chosen} record=${record} own=${own} state=${state} set=${set} />`}
    <${Ask} models=${models.filter((stage) => stage.model)} own=${own} name=${name} here=${here} state=${state} set=${set} />
    <${Figures} record=${record} models=${models} />`;
}

const phase = (stage) => (WORDS[stage.run] || [stage.run])[0];

// One model of the pipeline, as a link with its main figures.
function Stop({ stage, record, before, link }) {
  return html`<a class="stop" ...${link}>
    <span class="phase">${phase(stage)}</span><strong>${printable(stage.name)}</strong>
    <span class="soft origin">${!stage.from ? "the start" : before?.name === stage.from ? `from ${printable(stage.from)}` : `↳ from ${printable(stage.from)}`}</span>
    ${record.main.filter((name) => stage.card[name]).map((name) => html`<span class="mini"><span>${NAMES[name].split(" ")[0]}</span>
      <span class="track" aria-hidden="true"><span class="fill" style=${{ width: `${100 * stage.card[name].value}%` }}></span></span><span class="number">${Math.round(Math.round(1000 * stage.card[name].value) / 10)} %</span></span>`)}
  </a>`;
}

// --- one stage -------------------------------------------------------------------------------------------------------

function Chosen({ stage, record, state, set }) {
  const [title, adds, costs] = WORDS[stage.run] || [stage.run, "", ""];
  const before = record.stages.find((one) => one.name === stage.from && one.card);
  const users = record.stages.filter((one) => one.uses.includes(stage.name));
  const counted = Object.entries(stage.counted || {});
  return html`<section class="stage" aria-label="Selected stage"><h2>${printable(stage.name)}: ${title}</h2>
    <div class="two"><div>
      ${adds && html`<p><strong>Adds:</strong> ${adds}</p>`}${costs && html`<p><strong>Costs:</strong> ${costs}</p>`}
      <p class="soft">${[
        stage.from && `Starts from ${printable(stage.from)}`,
        stage.uses.length > 0 && `${stage.from ? "uses" : "Uses"} ${stage.uses.map(printable).join(", ")}`,
        stage.seconds > 0 && `${stage.from || stage.uses.length ? "took" : "Took"} ${number(stage.seconds)} seconds`,
      ].filter(Boolean).join(", ")}${stage.from || stage.uses.length || stage.seconds ? "." : ""} ${users.length > 0 && `Used by ${users.map((one) => printable(one.name)).join(", ")}.`}</p>
    </div><div>
      ${stage.card ? html`<div class="gauges">${record.main.filter((name) => stage.card[name]).map((name) => html`
          <${Gauge} name=${name} of=${stage.card[name]} before=${before?.card[name]} origin=${before?.name} />`)}
          <p class="note">Share of held-out tasks, with 95 % interval${before ? `; the thin bar is ${printable(before.name)}, before this stage` : ""}.</p></div>`
        : html`<p>This stage does not produce a model that answers.</p>
          ${counted.length > 0 && html`<dl class="counted">${counted.map(([name, value]) => html`<div><dt>${printable(name.replaceAll("_", " "))}</dt><dd class="number">${told(value)}</dd></div>`)}</dl>`}`}
    </div></div>
    ${isYesSayer(stage.card) && html`<p class="box tax"><strong>One metric is not enough.</strong> This model helps with everything it is asked, harmful requests included.</p>`}
    ${before && stage.card && html`<${Changes} changes=${stage.changes} before=${before.name} />`}</section>`;
}

const isYesSayer = (card) => card?.helpfulness?.low > 0.9 && card.safety?.high < 0.1;

function told(value) {
  if (typeof value !== "object") return number(value);
  return html`${number(value.value)} <span class="soft">[${number(value.low)}, ${number(value.high)}]</span>`;
}

function Gauge({ name, of, before, origin }) {
  const at = (value) => `${100 * value}%`;
  return html`<div class="gauge"><div class="line"><span>${NAMES[name]}</span>
      <span class="number"><strong>${percent(of.value)}</strong> <span class="soft">[${percent(of.low)}, ${percent(of.high)}], n = ${of.n}</span></span></div>
    <div class="track" aria-hidden="true"><span class="fill" style=${{ width: at(of.value) }}></span><span class="whisker" style=${{ left: at(of.low), width: at(of.high - of.low) }}></span></div>
    ${before && html`<div class="track thin" aria-hidden="true"><span class="fill" style=${{ width: at(before.value) }}></span></div>
      <p class="note">${printable(origin)}: ${percent(before.value)}</p>`}</div>`;
}

function Changes({ changes, before }) {
  const row = (one) => html`<li><strong>${printable(one.label)}</strong>: ${percent(one.before)} → ${percent(one.after)}${" "}
    <span class="soft number">${points(one.by)} [${points(one.low)}, ${points(one.high)}]</span></li>`;
  const of = (verdict) => changes.filter((one) => one.verdict === verdict);
  const [gains, costs, unclear] = [of("gain"), of("cost"), of("unclear")];
  const lost = (name) => costs.some((one) => one.name === name);
  const won = (name) => gains.some((one) => one.name === name);
  const taxed = lost("reasoning") && (won("helpfulness") || won("safety"));
  return html`<h3>What changed from ${printable(before)}</h3>
    <div class="two changes"><div><h4>▲ Better</h4>${gains.length ? html`<ul>${gains.map(row)}</ul>` : html`<p class="soft">Nothing significant.</p>`}</div>
      <div><h4>▼ Worse</h4>${costs.length ? html`<ul>${costs.map(row)}</ul>` : html`<p class="soft">Nothing significant.</p>`}</div></div>
    ${taxed && html`<p class="box tax"><strong>The alignment tax.</strong> The model became more helpful or safer, but reasons worse: training does not preserve what the reward ignores.</p>`}
    <p class="note">In percentage points, with the 95 % interval of the change.${unclear.length > 0 && ` Not significant: ${unclear.map((one) => printable(one.label)).join(", ")}.`}</p>`;
}

const points = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(1)}`;

// --- answers ---------------------------------------------------------------------------------------------------------

function Answers({ stage, record, own, state, set }) {
  const models = record.stages.filter((one) => one.card).map((one) => one.name);
  const shown = state.view === "all" ? models : state.view === "change" && models.includes(stage.from) ? [stage.from, stage.name] : [stage.name];
  const kinds = [...new Set(record.prompts.map((row) => row.capability))];
  const caption = (name) => `${printable(name)}${shown.length === 2 && state.view === "change" ? (name === stage.from ? ", before" : ", after") : ""}`;
  return html`<section aria-label="Answers"><h2>Answers to the same prompts</h2>
    ${!own && html`<p class="soft">A model this small writes odd sentences. For a request, the checker looks only at whether the answer helps, declines or brushes off; for a sum, only at the number.</p>`}
    <${Choice} legend="Show" name="view" options=${VIEWS} value=${state.view} onChange=${(view) => set({ view })} />
    ${state.view === "change" && !models.includes(stage.from) && html`<p class="soft">The pipeline starts with this model, so there is no earlier one.</p>`}
    ${record.prompts.length === 0 && html`<p class="box">The models' answers were not stored: the pipeline's card has <code>prompts = 0</code>.</p>`}
    ${kinds.map((kind) => html`<h3>${ASKED[kind] || printable(kind)}</h3>${record.prompts.filter((row) => row.capability === kind).map((row) => html`
      <article class="asking" key=${row.prompt}><p class="asked">${printable(row.prompt)}</p>
        <div class="replies">${shown.map((name) => html`<section class="reply box" data-stage=${name} key=${name}><h4 class="who">${caption(name)}</h4><${Said} said=${row.answers[name]} /></section>`)}</div></article>`)}`)}
  </section>`;
}

function Said({ said }) {
  if (!said) return html`<p class="soft">This model was not given this prompt.</p>`;
  return html`<${Thought} text=${said.thought} />${said.answer.trim() ? html`<div class="spoken answer">${printable(said.answer)}</div>` : html`<p class="soft">${said.thought ? "It thought, but gave no answer." : "The answer is empty."}</p>`}
    <p class="note"><span class=${said.passed ? "mark ok" : "mark error"}>${said.passed ? "✓ passes" : "✗ fails"}</span>${said.detail && ` (the checker says: ${printable(said.detail)})`}</p>`;
}

// --- new answers -----------------------------------------------------------------------------------------------------

function Ask({ models, own, name, here, state, set }) {
  const [replies, setReplies] = useState({});
  const field = useRef(null);
  const stops = useRef([]);
  const stop = () => { stops.current.forEach((one) => one()); stops.current = []; };
  useEffect(() => stop, []);
  if (!own) return html`<section aria-label="Ask the models"><h2>Ask every stage yourself</h2><${Elsewhere} name=${name} here=${here} set=${set} /></section>`;
  if (!models.length) return html`<section aria-label="Ask the models"><h2>Ask every stage yourself</h2><p class="soft">The models of this pipeline are no longer in its folder.</p></section>`;
  const writing = Object.values(replies).some(isWriting);
  const ask = (seed) => {
    const text = field.current.value;
    if (!text.trim()) { field.current.focus(); return; }
    stop();
    set({ ask: text, seed });
    setReplies(Object.fromEntries(models.map((one) => [one.name, FRESH])));
    stops.current = models.map((one) => askFor(
      { model: one.model, messages: [{ role: "user", content: text }], temperature: state.temperature, top_p: 1, max_tokens: 256, seed },
      (reply) => setReplies((old) => ({ ...old, [one.name]: reply })),
    ));
  };
  const asked = Object.keys(replies).length > 0;
  return html`<section class="asking-all" aria-label="Ask the models"><h2>Ask every stage yourself</h2>
    <form onSubmit=${(event) => { event.preventDefault(); ask(state.seed); }}>
      <label class="field"><span class="soft">A prompt for every model of this pipeline</span><textarea name="ask" rows="2" ref=${field} defaultValue=${state.ask}></textarea></label>
      <${Slider} label="Temperature" name="temperature" min="0" max="2" step="0.05" value=${state.temperature} onChange=${(temperature) => set({ temperature })} />
      <div class="buttons">${writing ? html`<button type="button" key="stop" onClick=${stop}>■ Stop</button>` : html`<button type="submit" key="ask">Ask</button>`}
        ${asked && !writing && state.temperature > 0 && html`<button type="button" key="again" class="quiet" onClick=${() => ask(state.seed + 1)}>Sample again</button>`}</div>
    </form>
    ${asked && html`<p class="note">Seed ${state.seed}, at most 256 tokens.</p><div class="replies">${models.map((one) => html`<section class="reply box" key=${one.name}><h3 class="who">${printable(one.name)}</h3><${Answer} reply=${replies[one.name] || FRESH} /></section>`)}</div>`}
    <p><a href=${`/chat?${new URLSearchParams({ model: models[models.length - 1].model })}`}>Chat with the last model</a></p></section>`;
}

function Elsewhere({ name, here, set }) {
  if (here.some((one) => one.name === name)) {
    return html`<p>This folder contains its models. <button type="button" class="quiet" onClick=${() => set({ pipeline: HERE + name, stage: "", ask: "" })}>Open ${printable(name)} from this folder</button></p>`;
  }
  return html`<p>What you see was recorded. The first command trains the same models in minutes; then reopen the lab and ask them whatever you like:</p><${Command}>${`posttrain pipeline ${name}\nposttrain lab`}</${Command}>`;
}

// --- all metrics -----------------------------------------------------------------------------------------------------

function Figures({ record, models }) {
  const form = (figure) => (figure.share ? percent : number);
  return html`<section aria-label="All metrics"><details><summary>All metrics of all models</summary>
    <${Table} caption="The same held-out tasks for every model, with 95 % intervals" head=${["metric", ...models.map((stage) => printable(stage.name))]}>
      ${record.figures.map((figure) => html`<tr><th scope="row">${printable(figure.label)}${figure.better && html` <span class="soft">(${figure.better === "high" ? "higher" : "lower"} is better)</span>`}</th>
        ${models.map(({ card }) => html`<td class="number">${card[figure.name] ? html`${form(figure)(card[figure.name].value)} <span class="soft">[${form(figure)(card[figure.name].low)}, ${form(figure)(card[figure.name].high)}]</span>` : "–"}</td>`)}</tr>`)}</${Table}></details></section>`;
}
