// One episode: its tokens, who wrote them and how likely they were, and what the answer earned and why.

import { Loaded, Table, address, html, number, printable, useData, useMemo, useState, useTitle } from "./ui.js";

const LEVELS = [["above 90 %", -0.105], ["above 50 %", -0.693], ["above 10 %", -2.303], ["above 1 %", -4.605], ["1 % or less", -Infinity]];
const MODES = { logp: "how likely each token was", advantage: "the advantage", who: "who wrote it" };

export function Page({ run, kind, step, group, index }) {
  useTitle(`Answer ${group}.${index} of step ${step}`);
  const found = useData(`/api${address("runs", run, "episodes", kind, step, group, index)}`);
  return html`<p class="path"><a href="/runs">Runs</a> / <a href=${address("runs", run)}>${printable(run)}</a> /
      <a href=${`${address("runs", run, "episodes")}?kind=${encodeURIComponent(kind)}`}>Episodes</a></p>
    <h1>Answer ${index} to task ${group}, step ${step}</h1>
    <${Loaded} from=${found} of="the episode">${(episode) => html`<${Episode} run=${run} episode=${episode} />`}</${Loaded}>`;
}

function Episode({ run, episode }) {
  const result = episode.reward === null ? "! not scored" : episode.passed ? "✓ passed" : "✗ not passed";
  return html`
    <p class="lead">${result}${episode.reward === null ? "" : `, reward ${number(episode.reward, 4)}`}${episode.advantage === null ? "" : `, advantage ${number(episode.advantage, 4)}`},
      ${` ${episode.length} tokens written`}${episode.stop === "length" ? ", cut at the limit" : ""}.</p>
    ${episode.error && html`<p class="box"><strong>Why:</strong> ${printable(episode.error)}</p>`}
    <section><h2>Tokens</h2><${Tokens} episode=${episode} /></section>
    <section class="two">
      <div><h2>What it earned</h2>${episode.parts.length
        ? html`<${Table} caption="Parts of the reward" head=${["part", "value"]}>${episode.parts.map((part) => html`
            <tr><th scope="row">${printable(part.name)}</th><td class="number">${number(part.value, 4)}</td></tr>`)}</${Table}>`
        : html`<p class="soft">The reward has one part only.</p>`}</div>
      <div><h2>Answers to the same task</h2><${Others} run=${run} episode=${episode} /></div>
    </section>
    <section><h2>Task</h2><p class="soft">${printable(episode.task_id)}</p><p class="said">${printable(episode.prompt)}</p></section>
    <section><h2>Answer as text</h2><p class="said" id="answer">${episode.text ? printable(episode.text) : "(nothing)"}</p></section>`;
}

function Others({ run, episode }) {
  return html`<${Table} caption="Each is compared with the others" head=${["answer", "result", "reward", "tokens"]}>${episode.answers.map((one) => html`<tr>
    <th scope="row">${one.index === episode.index ? html`<span aria-current="true">${one.index} (this one)</span>`
      : html`<a href=${address("runs", run, "episodes", episode.kind, episode.step, episode.group, one.index)}>${one.index}</a>`}</th>
    <td>${one.reward === null ? "! not scored" : one.passed ? "✓ passed" : "✗ not passed"}</td><td class="number">${number(one.reward)}</td><td class="number">${one.length}</td></tr>`)}</${Table}>`;
}

const level = (logp) => LEVELS.findIndex(([, least]) => logp > least || least === -Infinity);
const sign = (value) => (value > 0 ? "plus" : value < 0 ? "minus" : "zero");

function Tokens({ episode }) {
  const [mode, setMode] = useState("logp");
  const [at, setAt] = useState(null);
  const { tokens } = episode;
  const spans = useMemo(() => spansOf(tokens), [tokens]);
  const look = (token) => (mode === "logp" ? `logp-${level(token.logp)}` : mode === "advantage" ? sign(episode.advantage) : "");
  const move = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    setAt(Math.min(tokens.length - 1, Math.max(0, (at ?? (by > 0 ? -1 : tokens.length)) + by)));
  };
  const pick = (event) => { const i = event.target.dataset?.i; if (i !== undefined) setAt(Number(i)); };
  return html`
    <fieldset class="modes"><legend>Colour shows</legend>${Object.entries(MODES).map(([name, text]) => html`
      <label><input type="radio" name="mode" checked=${mode === name} disabled=${name === "advantage" && episode.advantage === null}
        onChange=${() => setMode(name)} /> ${text}</label>`)}</fieldset>
    <${Key} mode=${mode} advantage=${episode.advantage} />
    ${!episode.tokenizer && html`<p class="note">This run's tokenizer is not on this machine, so tokens are shown as numbers.</p>`}
    <div class="tokens" tabindex="0" role="group" aria-label="Tokens; arrow keys go from one to the next" onKeyDown=${move} onMouseOver=${pick} onClick=${pick}>
      ${spans.map(([who, first, end]) => html`<div class=${`span ${who}`}><span class="who">${who}</span>
        <div class="run">${tokens.slice(first, end).map((token, i) => html`<span data-i=${first + i}
          class=${`t ${token.model ? look(token) : ""}${at === first + i ? " at" : ""}`}>${shown(token.text)}</span>`)}</div></div>`)}
    </div>
    <p class="read" role="status">${at === null ? "Point at a token, or use the arrow keys, to read its numbers." : told(tokens[at], at)}</p>`;
}

function Key({ mode, advantage }) {
  if (mode === "who") return html`<p class="key soft">What the model wrote has a solid bar beside it, everything else a dotted one.</p>`;
  if (mode === "advantage") {
    return html`<p class="key"><span class=${`t ${sign(advantage)}`}>${advantage > 0 ? "+" : ""}${number(advantage, 4)}</span>
      ${advantage > 0 ? "made more likely" : advantage < 0 ? "made less likely" : "neither: the answers of the group earned the same"}; the same for every token of the answer</p>`;
  }
  return html`<p class="key">probability: ${LEVELS.map(([text], i) => html`<span class=${`t logp-${i}`}>${text}</span> `)}<span class="soft">the less likely, the thicker the line below</span></p>`;
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

function told(token, at) {
  const text = `token ${at}, number ${token.id}: “${printable(token.text)}”`;
  return token.model ? `${text}, log-probability ${number(token.logp, 4)}, probability ${(100 * Math.exp(token.logp)).toPrecision(3)} %` : `${text}, not written by the model`;
}
