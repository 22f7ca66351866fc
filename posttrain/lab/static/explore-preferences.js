// The preference explorer: every comparison retrains a reward model from scratch. Keys 1, 2, 0 and u.

import { Loaded, Table, ask, html, number, percent, printable, useData, useEffect, useRef, useState, useTitle } from "./ui.js";
import { Bar, Choice, Formula, useAddress, useComputed } from "./controls.js";
import { Chart } from "./chart.js";
import { Rating } from "./explore-preferences-rating.js";

const PEOPLE = [["long", "long answers"], ["short", "short answers"], ["polite", "polite answers"]];
const NAMES = Object.fromEntries(PEOPLE);
const SAID = { 1: "left", 2: "right", 0: "tie" };

export function Page() {
  useTitle("Preferences");
  const [at, set] = useAddress({ seed: 0, labels: "", who: "" });
  const pairs = useData(`/api/explore/preferences/pairs?seed=${at.seed}`);
  return html`<p class="path"><a href="/explore">Explore</a></p><h1>Preferences</h1>
    <p class="lead">Say which answer you like better. A reward model learns your taste from every choice. How many choices does it need?</p>
    <${Loaded} from=${pairs} of="the pairs">${(list) => html`<${Explorer} at=${at} set=${set} pairs=${list} />`}</${Loaded}>`;
}

function Explorer({ at, set, pairs }) {
  const path = `/api/explore/preferences?${new URLSearchParams(at)}`;
  const learned = useComputed(path);
  const seconds = useRef([]);
  const shownAt = useRef(performance.now());
  const count = at.labels.length;
  useEffect(() => { shownAt.current = performance.now(); }, [count]);

  const say = (choice) => {
    if (count >= pairs.length) return;
    seconds.current[count] = (performance.now() - shownAt.current) / 1000;
    set({ labels: at.labels + choice });
  };
  const undo = () => set({ labels: at.labels.slice(0, -1) });
  useKeys({ 1: () => say("1"), 2: () => say("2"), 0: () => say("0"), u: undo });

  return html`<div><div class="taste">
    <div>
      ${count < pairs.length ? html`<${Two} pair=${pairs[count]} />` : html`<p class="box">You have compared all ${pairs.length} pairs.</p>`}
      <div class="choices" role="group" aria-label="Which answer do you like better?">
        <button type="button" disabled=${count >= pairs.length} onClick=${() => say("1")}>A is better <kbd>1</kbd></button>
        <button type="button" disabled=${count >= pairs.length} onClick=${() => say("0")}>Tie <kbd>0</kbd></button>
        <button type="button" disabled=${count >= pairs.length} onClick=${() => say("2")}>B is better <kbd>2</kbd></button>
        <button type="button" class="quiet" disabled=${!count} onClick=${undo}>Undo <kbd>u</kbd></button></div>
      <${ForMe} at=${at} set=${set} left=${pairs.length - count} />
      <${Collected} labels=${at.labels} pairs=${pairs} clear=${() => set({ labels: "", who: "" })} />
    </div>
    <section class="learned" aria-label="What the reward model has learned"><h2>What it has learned</h2>
      <${Loaded} from=${learned} of="the reward model">${(found) => html`<${Learned} ...${found} who=${at.who} />`}</${Loaded}></section></div>
    <section><h2>Scores of unlabelled pairs</h2>
      <${Loaded} from=${learned} of="the scores">${(found) => html`<${Unseen} rows=${found.unseen} who=${at.who} labels=${found.labels} count=${found.count} />`}</${Loaded}></section>
    <${Rating} pairs=${pairs} labels=${at.labels} seconds=${seconds.current} />
    <${How} /></div>`;
}

function Two({ pair }) {
  return html`<section class="pair" aria-label="The pair"><p class="who">prompt</p><p class="asked said">${printable(pair.prompt)}</p>
    <div class="answers">
      <article aria-labelledby="answer-a"><h2 id="answer-a">A</h2><p class="said">${printable(pair.left)}</p></article>
      <article aria-labelledby="answer-b"><h2 id="answer-b">B</h2><p class="said">${printable(pair.right)}</p></article></div></section>`;
}

function ForMe({ at, set, left }) {
  const [who, setWho] = useState(at.who || "long");
  const [busy, setBusy] = useState(false);
  const add = () => {
    setBusy(true);
    ask(`/api/explore/preferences/say?${new URLSearchParams({ ...at, who })}`).then(({ labels }) => set({ labels, who }), () => {}).finally(() => setBusy(false));
  };
  return html`<div class="for-me"><${Choice} legend="In a hurry? Simulate someone who likes" name="who" options=${PEOPLE} value=${who} onChange=${setWho} />
    <button type="button" class="quiet" disabled=${busy || !left} onClick=${add}>Label ${Math.min(30, left)} for me</button></div>`;
}

function Collected({ labels, pairs, clear }) {
  if (!labels) return html`<p class="soft">Your comparisons are listed here. They are the whole dataset.</p>`;
  const rows = [...labels].map((said, i) => [i, said, pairs[i]]).reverse();
  return html`<h2>Dataset: ${labels.length} ${labels.length === 1 ? "comparison" : "comparisons"}</h2>
    <div class="collected" role="region" tabindex="0" aria-label="Your comparisons, newest first"><ol reversed>${rows.map(([i, said, pair]) => html`<li key=${i}>
      ${said === "0" ? html`${printable(pair.left)} <strong>=</strong> ${printable(pair.right)}`
        : html`<strong>${printable(said === "1" ? pair.left : pair.right)}</strong> ${"≻"} <span class="soft">${printable(said === "1" ? pair.right : pair.left)}</span>`}
      <span class="note"> (${SAID[said]})</span></li>`)}</ol></div>
    <p><button type="button" class="quiet" onClick=${clear}>Start over</button> <span class="note">Your choices are stored only in the address of this page.</span></p>`;
}

const span = ({ value, low, high, n }) => (value === null ? "no data yet" : html`${percent(value)} <span class="soft">[${percent(low)}, ${percent(high)}] of ${n}</span>`);

function Learned({ labels, loss, milliseconds, weights, before, held_out, curve, said, correlation, who }) {
  if (!labels) {
    return html`<p class="soft">Nothing yet: every answer scores 0, and every prediction is a coin flip. Compare a few pairs, with the keys <kbd>1</kbd>, <kbd>2</kbd> and <kbd>0</kbd>.</p>`;
  }
  const largest = Math.max(1, ...weights.map(({ weight }) => Math.abs(weight)));
  const steps = curve.map((_, i) => i + 1);
  return html`<dl class="facts-list">
      <dt>predicted before you chose</dt><dd class="number" data-fact="before">${span(before)}</dd>
      ${held_out && html`<dt>agrees with someone who likes ${NAMES[who]}, on unlabelled pairs</dt><dd class="number" data-fact="held-out">${span(held_out)}</dd>`}
      <dt>trained on ${labels} ${labels === 1 ? "label" : "labels"} in</dt><dd class="number">${number(milliseconds, 2)} ms, mean loss ${number(loss)}</dd></dl>
    ${verdict(held_out || before, Boolean(held_out))}
    ${curve.length > 1 && html`<${Chart} title="agreement on unseen pairs by number of labels" series=${[{ name: `likes ${NAMES[who]}`, steps, values: curve }]} />`}
    <h3>What it rewards</h3>
    <ul class="weights">${weights.map(({ name, about, weight }) => html`<li key=${name}><span>${name} <span class="note">${about}</span></span>
      <${Bar} share=${weight / largest} signed text=${`${weight > 0 ? "+" : ""}${number(weight, 2)}`} /></li>`)}</ul>
    <p class="note">Score per standard deviation. Bars to the right are rewarded, bars to the left penalised.</p>
    <h3>Length bias</h3>
    <p>${bias(weights[0].weight, correlation)} You preferred the longer answer in <span class="number" data-fact="longer">${span(said)}</span>.
      ${correlation && html` On unseen answers, the correlation of score and length is <span class="number" data-fact="correlation">${number(correlation.value, 2)} <span class="soft">[${number(correlation.low, 2)}, ${number(correlation.high, 2)}]</span></span>.`}</p>`;
}

function verdict({ value, low, high, n }, known) {
  if (value === null) return html`<p class="soft">It has made no predictions yet.</p>`;
  if (low > 0.5) return html`<p role="status">✓ Better than a coin flip: the interval lies above 50 %. ${known ? "" : "It can predict your choices."}</p>`;
  if (high < 0.5) return html`<p role="status">! Worse than a coin flip: it predicted the other answer. Did you change your mind?</p>`;
  return html`<p role="status">– Not yet distinguishable from a coin flip: the interval of ${n} ${n === 1 ? "prediction" : "predictions"} includes 50 %.</p>`;
}

function bias(weight, correlation) {
  if (correlation && correlation.low > 0 && weight > 0) return "It rewards length: a longer answer scores higher, whatever it says.";
  if (correlation && correlation.high < 0 && weight < 0) return "It penalises length: a longer answer scores lower, whatever it says.";
  return "No clear length bias so far.";
}

function Unseen({ rows, who, labels, count }) {
  const better = (row) => (row.probability > 0.5 ? "A" : row.probability < 0.5 ? "B" : "either");
  return html`<div><p class="soft">The first ${rows.length} of ${count} unseen pairs. P is σ of the difference in their scores.</p>
    <${Table} caption="Scores of unseen pairs" head=${["prompt", "A", "score", "B", "score", "the model prefers", ...(who ? [`someone who likes ${NAMES[who]} prefers`] : [])]}>
      ${rows.map((row) => html`<tr><td>${printable(row.prompt)}</td><td>${printable(row.answers[0])}</td><td class="number">${number(row.scores[0], 2)}</td>
        <td>${printable(row.answers[1])}</td><td class="number">${number(row.scores[1], 2)}</td>
        <td>${labels ? html`${better(row)}, <span class="number">P = ${percent(Math.max(row.probability, 1 - row.probability))}</span>` : "nothing yet"}</td>
        ${who && html`<td>${{ 0: "no difference", 1: "A", 2: "B" }[row.wanted]}${row.wanted && labels ? ((row.wanted === 1) === (row.probability > 0.5) ? " ✓" : " ✗") : ""}</td>`}</tr>`)}</${Table}></div>`;
}

function How() {
  return html`<section><h2>How it learns</h2>
    <p>The Bradley–Terry model gives the probability that one answer beats another, from a learned score${" "}<${Formula} tex="r" />:</p>
    <${Formula} display tex="P(A \\succ B \\mid x) = \\sigma\\big(r(x, A) - r(x, B)\\big), \\qquad L = -\\log \\sigma\\big(r(x, y_w) - r(x, y_l)\\big)" />
    <p>Here the score is a weighted sum of the six features listed above. The weights are fitted from scratch after every label
      with <code>posttrain.objectives.reward.bradley_terry</code>, a tie counting as half a win for each. A real reward model also learns its features: a language
      model reads the answer and a linear layer turns its last hidden state into the score (<code>posttrain reward</code>). Both share the weakness that
      shows in the length bias: the model learns what correlates with your choices, not why you made them.</p>
    <p>The answers were sampled from abacus, the small model that ships with posttrain, before any post-training. To label your own data, go to <a href="/label">Label</a>.</p></section>`;
}

function useKeys(keys) {
  const now = useRef(keys);
  now.current = keys;
  useEffect(() => {
    const pressed = (event) => {
      const typing = event.target.closest?.("input:not([type=radio], [type=checkbox]), select, textarea, [data-keys]");
      if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
      const action = now.current[event.key.toLowerCase()];
      if (action) { event.preventDefault(); action(); }
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}
