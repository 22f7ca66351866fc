// One episode: its tokens with their authors and probabilities, and the reward with the verifier's reason.

import { useAddress } from "./controls.js";
import { Failed, Loaded, Table, Waiting, address, ask, html, number, printable, useData, useEffect, useMemo, useState, useTitle } from "./ui.js";

// Each colour mode: its label and its levels as [text, bound]. A value has the first level whose bound it exceeds; for
// entropy, the first whose bound it stays below.
const MODES = {
  logp: ["token probability", [["above 90 %", -0.105], ["above 50 %", -0.693], ["above 10 %", -2.303], ["above 1 %", -4.605], ["1 % or less", -Infinity]]],
  advantage: ["advantage", []],
  kl: ["KL from the starting model", [["much more likely now", 1], ["more likely", 0.1], ["unchanged", -0.1], ["less likely", -1], ["much less likely", -Infinity]]],
  entropy: ["entropy", [["below 0.1 nats", 0.1], ["below 0.7", 0.7], ["below 1.4", 1.4], ["below 2.3", 2.3], ["2.3 or more", Infinity]]],
  who: ["author", []],
};

export function Page({ run, kind, step, group, index }) {
  useTitle(`Completion ${group}.${index} of step ${step}`);
  const here = address("runs", run, "episodes", kind, step, group, index);
  const found = useData(`/api${here}`);
  return html`<p class="path"><a href="/runs">Runs</a> / <a href=${address("runs", run)}>${printable(run)}</a>${" / "}<a href=${`${address("runs", run, "episodes")}?kind=${encodeURIComponent(kind)}`}>Episodes</a></p>
    <h1>Completion ${index} of task ${group}, step ${step}</h1>
    <${Loaded} from=${found} of="the episode">${(episode) => html`<${Episode} run=${run} here=${here} episode=${episode} />`}</${Loaded}>`;
}

const result = (one) => (one.reward === null ? "! not scored" : one.passed ? "✓ passed" : "✗ not passed");

function Episode({ run, here, episode }) {
  return html`<${Neighbours} run=${run} episode=${episode} />
    <p class="lead">${result(episode)}${episode.reward === null ? "" : `, reward ${number(episode.reward, 4)}`}${episode.advantage === null ? "" : `, advantage ${number(episode.advantage, 4)}`},
      ${` ${episode.length} tokens`}${episode.stop === "length" ? ", truncated" : ""}.</p>
    <div class="beside">
      <div>
        <section><h2>Task</h2><p class="soft">${printable(episode.task_id)}</p><p class="said">${printable(episode.prompt)}</p></section>
        <section><h2>Tokens</h2><${Tokens} here=${here} episode=${episode} /></section>
        <section><h2>Reward</h2><${Earned} here=${here} episode=${episode} /></section>
        <section><h2>Completion as text</h2><p class="said" id="answer">${episode.text ? printable(episode.text) : "(empty)"}</p></section>
      </div>
      <section aria-labelledby="others"><h2 id="others">All ${episode.answers.length} completions of this task</h2><${Others} run=${run} episode=${episode} /></section>
    </div>`;
}

// --- neighbouring completions ----------------------------------------------------------------------------------------

const to = (run, kind, at) => `${address("runs", run, "episodes", kind, ...at)}${location.search}`;

function Neighbours({ run, episode }) {
  const { before, after, kind } = episode;
  useEffect(() => {
    const move = (event) => {
      const there = { ArrowLeft: before, ArrowRight: after }[event.key];
      if (!event.shiftKey || event.altKey || event.ctrlKey || event.metaKey || !there) return;
      event.preventDefault();
      location.assign(to(run, kind, there));
    };
    addEventListener("keydown", move);
    return () => removeEventListener("keydown", move);
  }, [episode]);
  return html`<nav class="inside" aria-label="Completions in the order they were stored">
    ${before ? html`<a href=${to(run, kind, before)} rel="prev">← previous completion</a>` : html`<span class="soft">This is the first completion.</span>`}
    ${after ? html`<a href=${to(run, kind, after)} rel="next">next completion →</a>` : html`<span class="soft">This is the last completion.</span>`}
    <span class="soft">Keys: <kbd>Shift</kbd> + <kbd>←</kbd> and <kbd>→</kbd></span></nav>`;
}

function Others({ run, episode }) {
  return html`<ol class="group">${episode.answers.map((one) => html`<li class=${one.index === episode.index ? "box this" : "box"}>
    <p>${one.index === episode.index ? html`<strong aria-current="true">completion ${one.index} (this one)</strong>`
      : html`<a href=${to(run, episode.kind, [episode.step, episode.group, one.index])}>completion ${one.index}</a>`}</p>
    <p class="soft">${result(one)}${one.reward === null ? "" : ` · reward ${number(one.reward)}`}${one.advantage === null ? "" : ` · advantage ${number(one.advantage)}`} · ${one.length} tokens</p>
    <p class="said short">${one.text ? printable(one.text) : "(empty)"}</p></li>`)}</ol>`;
}

// --- reward ------------------------------------------------------------------------------------------------------------

function Earned({ here, episode }) {
  return html`${episode.error && html`<p class="box"><strong>Scoring failed:</strong> ${printable(episode.error)}</p>`}
    ${episode.parts.length
      ? html`<${Table} caption="Parts of the reward" head=${["part", "value"]}>${episode.parts.map((part) => html`
          <tr><th scope="row">${printable(part.name)}</th><td class="number">${number(part.value, 4)}</td></tr>`)}</${Table}>`
      : html`<p class="soft">The reward has only one part.</p>`}
    <${Reason} here=${here} episode=${episode} />`;
}

// A run stores the score but not the verifier's explanation, so the verifier runs again on request.
function Reason({ here, episode }) {
  const [found, set] = useState({ state: "unasked" });
  const load = () => { set({ state: "asked" }); ask(`/api${here}/reason`).then((data) => set({ state: "told", data }), (error) => set({ state: "failed", error: error.message })); };
  if (found.state === "unasked") return html`<p><button type="button" onClick=${load}>Ask the verifier for its reason</button> <span class="soft">The run stored only the score.</span></p>`;
  if (found.state === "asked") return html`<${Waiting} of="the task to run the verifier again" />`;
  if (found.state === "failed") return html`<${Failed} error=${found.error} again=${load} />`;
  if (found.data.refused) return html`<p class="box" role="status">${printable(found.data.refused)}</p>`;
  const { detail, passed, answer, error } = found.data;
  return html`<div class="box reason" role="status"><p><strong>The verifier says:</strong> ${printable(error || detail || "nothing besides its score")}</p>
    ${answer && html`<p>Reference answer: <code>${printable(answer)}</code></p>`}
    ${passed !== episode.passed && html`<p>! This differs from the result stored by the run. The verifier now says: ${passed ? "passed" : "not passed"}.</p>`}</div>`;
}

// --- tokens ------------------------------------------------------------------------------------------------------------

// The lab computes KL and entropy only on request.
function useScores(here, wanted) {
  const [found, set] = useState({ data: null, error: "" });
  useEffect(() => {
    if (wanted && !found.data) ask(`/api${here}/scores`).then((data) => set({ data, error: "" }), (error) => set({ data: null, error: error.message }));
  }, [here, wanted]);
  return found;
}

const sign = (value) => (value > 0 ? "plus" : value < 0 ? "minus" : "zero");
const level = (mode, value) => MODES[mode][1].findIndex(([, bound]) => (mode === "entropy" ? value < bound || bound === Infinity : value > bound || bound === -Infinity));

function Tokens({ here, episode }) {
  const [{ colour }, setAddress] = useAddress({ colour: "logp" });
  const mode = colour in MODES ? colour : "logp";
  const [at, setAt] = useState(null);
  const computed = mode === "kl" || mode === "entropy";
  const { data: scores, error } = useScores(here, computed);
  const { tokens } = episode;
  const spans = useMemo(() => spansOf(tokens), [tokens]);
  const look = (i) => {
    if (!tokens[i].model || mode === "who") return "";
    if (mode === "advantage") return sign(episode.advantage);
    const value = mode === "logp" ? tokens[i].logp : scores?.[mode]?.values[i];
    return value === null || value === undefined ? "" : `${mode}-${level(mode, value)}`;
  };
  const move = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.shiftKey) return;
    event.preventDefault();
    setAt(Math.min(tokens.length - 1, Math.max(0, (at ?? (by > 0 ? -1 : tokens.length)) + by)));
  };
  const pick = (event) => { const i = event.target.dataset?.i; if (i !== undefined) setAt(Number(i)); };
  return html`
    <fieldset class="modes"><legend>Colour by</legend>${Object.entries(MODES).map(([name, [text]]) => html`
      <label><input type="radio" name="mode" checked=${mode === name} disabled=${name === "advantage" && episode.advantage === null}
        onChange=${() => setAddress({ colour: name })} /> ${text}</label>`)}</fieldset>
    ${computed && error ? html`<${Failed} error=${error} />` : computed && !scores ? html`<${Waiting} of="the models to compute it" />`
      : html`<${Key} mode=${mode} advantage=${episode.advantage} scores=${scores} />`}
    ${!episode.tokenizer && html`<p class="note">This run's tokenizer is not on this machine, so tokens are shown as ids.</p>`}
    <div class="tokens" tabindex="0" role="group" aria-label="Tokens; use the arrow keys to move between them" onKeyDown=${move} onMouseOver=${pick} onClick=${pick}>
      ${spans.map(([who, first, end]) => html`<div class=${`span ${who}`}><span class="who">${who}</span>
        <div class="run">${tokens.slice(first, end).map((token, i) => html`<span data-i=${first + i}
          class=${`t ${look(first + i)}${at === first + i ? " at" : ""}`}>${shown(token.text)}</span>`)}</div></div>`)}
    </div>
    <p class="read" role="status">${at === null ? "Point at a token or use the arrow keys to see its values." : told(tokens[at], at, scores)}</p>`;
}

function Key({ mode, advantage, scores }) {
  if (mode === "who") return html`<p class="key soft">A solid bar marks what the model wrote, a dotted bar everything else.</p>`;
  if (mode === "advantage") {
    return html`<p class="key"><span class=${`t ${sign(advantage)}`}>${advantage > 0 ? "+" : ""}${number(advantage, 4)}</span>
      ${advantage > 0 ? "made more likely" : advantage < 0 ? "made less likely" : "neither: all completions in the group have the same reward"}; the same for every token of the completion</p>`;
  }
  const levels = MODES[mode][1].map(([text], i) => html`<span class=${`t ${mode}-${i}`}>${text}</span> `);
  if (mode === "logp") return html`<p class="key">probability: ${levels}<span class="soft">the less likely the token, the thicker the underline</span></p>`;
  const found = scores[mode];
  if (!found) {
    return html`<p class="box">The run did not store this, and it cannot be computed: ${mode === "kl" ? html`the starting model, <code>${printable(scores.start)}</code>, is` : "the run's models are"}
      not on this machine.</p>`;
  }
  if (mode === "kl") {
    return html`<p class="key">log π − log π<sub>start</sub>: ${levels}<span class="soft">solid underline: more likely than under the starting model; dotted: less likely</span></p>
      <p class="soft">Over the completion it adds up to ${number(found.total, 4)} nats, an estimate of the KL from <code>${printable(scores.start)}</code>. The run stored log π; the starting model's
      was computed just now.</p>`;
  }
  return html`<p class="key">entropy: ${levels}<span class="soft">the higher the entropy, the thicker the underline</span></p>
    <p class="soft">Not stored by the run; computed just now with the weights of step ${found.weights}${found.weights === found.wanted ? ", which wrote this completion" : `, while those of step ${found.wanted} wrote this completion`}.
      Their log-probabilities differ from the stored ones by ${number(found.apart)} nats on average.</p>`;
}

function spansOf(tokens) {
  const spans = [];
  tokens.forEach((token, i) => {
    const before = spans[spans.length - 1];
    if (before && tokens[before[1]].model === token.model) before[2] = i + 1;
    else spans.push([token.model ? "model" : i === 0 ? "prompt" : "environment", i, i + 1]);
  });
  return spans;
}

const shown = (text) => printable(text).replaceAll("\n", "⏎\n");

function told(token, at, scores) {
  const text = `token ${at}, id ${token.id}: “${printable(token.text)}”`;
  if (!token.model) return `${text}, not written by the model`;
  const more = [["kl", "KL"], ["entropy", "entropy"]].map(([name, word]) => { const value = scores?.[name]?.values[at]; return value === null || value === undefined ? "" : `, ${word} ${number(value, 3)}`; }).join("");
  return `${text}, log-probability ${number(token.logp, 4)}, probability ${(100 * Math.exp(token.logp)).toPrecision(3)} %${more}`;
}
