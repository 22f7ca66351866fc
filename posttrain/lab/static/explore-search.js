// "Think longer": one problem, several strategies of test-time search side by side, the trees they grow, and the recorded
// frontier. The server runs posttrain.search on the built-in model; the URL holds all choices.

import { Failed, Loaded, Waiting, grouped, html, printable, useData, useEffect, useState, useTitle } from "./ui.js";
import { Choice, Slider, Toggle, useAddress, useComputed } from "./controls.js";
import { Outline, Tree } from "./explore-search-tree.js";
import { Frontier } from "./explore-search-frontier.js";

const STATE = { problem: "36*9", seed: 0, budget: 16, scorer: "confidence", strategies: "majority,best-of-n,beam,mcts", watch: "beam" };
const API = "/api/explore/search";
const MOMENT = 60; // milliseconds between two frames while a tree grows

// The server's key → the name on the page, and what the strategy does.
export const STRATEGIES = {
  majority: ["Majority", "Samples the whole budget and returns the most common answer."],
  "best-of-n": ["Best of n", "Samples the whole budget and returns the completion with the highest score."],
  beam: ["Beam search", "Scores after every step, keeps the best quarter and samples four next steps from each."],
  mcts: ["Tree search", "MCTS: visits promising steps more often, expands them, and averages the scores below each."],
  adaptive: ["Adaptive majority", "Samples one at a time and stops when the vote is decided."],
  dvts: ["DVTS", "Beam search in separate subtrees, which keeps the beams different."],
  rebase: ["Rebase", "Shares out the next steps by the softmax of the scores."],
  particles: ["Particle filter", "Resamples unfinished completions in proportion to their scores."],
};
export const SCORERS = {
  confidence: ["its own confidence", "The lowest mean probability of 16 tokens in a row. It is known from sampling, so it costs nothing."],
  "self-certainty": ["self-certainty", "How far the model’s distributions are from uniform, on average. Reading every completion again costs tokens."],
  checker: ["the true checker", "Knows the right answer, which no scorer in use does: an upper limit."],
};
const UNSCORED = ["majority", "adaptive"];

export function Page() {
  useTitle("Think longer");
  const [state, set] = useAddress(STATE);
  const offered = useData(API);
  return html`<div class="search"><p class="path"><a href="/explore">Explore</a></p><h1>Think longer: what more tokens buy</h1>
    <p class="lead">A model that is right now and then can be right more often without any training: let it try several times, and choose.
      Here abacus, the small model that ships with posttrain, gets a budget for one problem, and different strategies spend it.</p>
    <${Loaded} from=${offered} of="the problems">${(known) => html`
      <${Asking} ...${known} state=${state} set=${set} />
      <${Compared} known=${known} state=${state} set=${set} />`}</${Loaded}>
    <${Frontier} api=${API} budget=${state.budget} scorer=${state.scorer} names=${STRATEGIES} scorers=${SCORERS} />
    <${Limits} /></div>`;
}

const chosenOf = (state, known) => known.filter((name) => state.strategies.split(",").includes(name));

function Asking({ problems, budgets, strategies, scorers, state, set }) {
  const [own, type] = useState("");
  const all = problems.includes(state.problem) ? problems : [state.problem, ...problems];
  const at = Math.max(0, budgets.indexOf(state.budget));
  const on = chosenOf(state, strategies);
  const fresh = (problem) => set({ problem, seed: 0 });
  const ask = (event) => {
    event.preventDefault();
    if (own.trim()) fresh(own.replace(/\s/g, ""));
  };
  const flip = (name) => (wanted) => set({ strategies: strategies.filter((one) => (one === name ? wanted : on.includes(one))).join() });
  return html`<section class="box search-asking" aria-label="The problem and the budget">
    <p class="search-question">What is ${printable(state.problem)}?</p>
    <div class="search-controls">
      <label class="field">Problem <select name="problem" value=${state.problem} onChange=${(event) => fresh(event.target.value)}>
        ${all.map((one) => html`<option value=${one} selected=${one === state.problem}>${printable(one)}</option>`)}</select></label>
      <form class="search-own" onSubmit=${ask}><label class="field">Your own <input name="own" value=${own} placeholder="47*6" maxlength="11" autocomplete="off" onInput=${(event) => type(event.target.value)} /></label>
        <button type="submit" class="quiet">Ask</button></form>
      <button type="button" class="quiet" onClick=${() => set({ seed: state.seed + 1 })}>Sample again</button>
    </div>
    <div class="search-controls">
      <${Slider} label="Budget" name="budget" min="0" max=${budgets.length - 1} step="1" value=${at} text=${counted(budgets[at], "completion")} onChange=${(i) => set({ budget: budgets[i] })} />
      <${Choice} legend="Scores come from" name="scorer" value=${state.scorer} options=${scorers.map((name) => [name, SCORERS[name][0]])} onChange=${(scorer) => set({ scorer })} />
    </div>
    <p class="note">${(SCORERS[state.scorer] || SCORERS.confidence)[1]} A vote needs no scores. Tree search counts visits against the budget, not completions; the tokens say what a search cost.</p>
    <details><summary>Strategies: ${on.map((name) => STRATEGIES[name][0].toLowerCase()).join(", ") || "none"}</summary>
      <div class="search-toggles">${strategies.map((name) => html`<${Toggle} label=${STRATEGIES[name][0]} name=${name} value=${on.includes(name)} onChange=${flip(name)} />`)}</div></details>
  </section>`;
}

const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

// --- side by side ----------------------------------------------------------------------------------------------------

function Compared({ known, state, set }) {
  const names = chosenOf(state, known.strategies);
  const [found, keep] = useState({});
  const key = [state.problem, state.seed, state.budget, state.scorer].join();
  const tell = (name) => (data) => keep((old) => ({ ...old, [name]: data }));
  const current = names.map((name) => found[name]).filter((one) => one && keyOf(one) === key);
  const watch = names.includes(state.watch) ? state.watch : names[0];
  return html`<section><h2>1. The same budget, spent differently</h2>
    <${Verdict} found=${current} all=${names.length} />
    <div class="search-cards">${names.map((name) => html`<${Card} key=${name} name=${name} state=${state} watched=${name === watch}
      limited=${state.scorer === "checker" && known.limited.includes(name)} set=${set} tell=${tell(name)} />`)}</div>
    <p class="note">Each dot is a step, each line leads to a next one. The fuller a dot, the higher its score. At the end of a completion,
      ✓ is right and ✗ is wrong. The thick line is the completion that was chosen.</p></section>
    ${watch && found[watch] && html`<${Inside} key=${watch} name=${watch} found=${found[watch]} />`}`;
}

const keyOf = (found) => [found.problem, found.seed, found.budget, found.scorer].join();

// What limits this problem: nothing right was sampled, or it was and the scorer prefers something else.
function Verdict({ found, all }) {
  if (found.length < all || !all) return html`<p class="search-verdict" role="status">Searching …</p>`;
  const named = (list) => list.map((one) => STRATEGIES[one.strategy][0]).join(", ");
  const [right, wrong] = [found.filter((one) => one.passed), found.filter((one) => !one.passed)];
  const [outvoted, misled] = [true, false].map((votes) => wrong.filter((one) => one.right > 0 && UNSCORED.includes(one.strategy) === votes));
  return html`<p class="search-verdict" role="status">
    ${right.length > 0 && html`<strong>✓ Right:</strong> ${named(right)}. `}${wrong.length > 0 && html`<strong>✗ Wrong:</strong> ${named(wrong)}. `}
    ${wrong.length > 0 && wrong.every((one) => one.right === 0) && "No completion is right, so there is nothing to find yet: only more tokens, or a better model, can help."}
    ${outvoted.length > 0 && `${named(outvoted)} had a right completion, but it was outvoted. `}
    ${misled.length > 0 && `${named(misled)} had a right completion, but the scorer prefers another: here the scorer is the limit.`}
    ${wrong.length === 0 && "Would fewer tokens have been enough? Try a smaller budget."}</p>`;
}

function Card({ name, state, watched, limited, set, tell }) {
  const [title, about] = STRATEGIES[name];
  return html`<article class=${`box search-card ${watched ? "watched" : ""}`} aria-label=${title}>
    <h3>${title}</h3><p class="note">${about}</p>
    ${limited ? html`<${Unscorable} name=${name} state=${state} tell=${tell} />` : html`<${Result} name=${name} state=${state} tell=${tell} />`}
    <label class="search-pick"><input type="radio" name="watch" value=${name} checked=${watched} onChange=${() => set({ watch: name })} /> Show its tree below</label>
  </article>`;
}

function Unscorable({ name, state, tell }) {
  const asked = { problem: state.problem, seed: state.seed, budget: state.budget, scorer: state.scorer };
  useEffect(() => tell({ ...asked, strategy: name, passed: false, right: 0, nodes: null }), Object.values(asked));
  return html`<p>It has to choose between <em>unfinished</em> completions, and the checker can only judge finished ones. That is what process
    reward models are for.</p>`;
}

function Result({ name, state, tell }) {
  const { problem, seed, scorer, budget } = state;
  const { data, error, stale } = useComputed(`${API}/tree?${new URLSearchParams({ problem, seed, strategy: name, scorer, budget })}`);
  useEffect(() => { if (data) tell(data); }, [data]);
  if (error && !stale) return html`<${Failed} error=${error} />`;
  if (!data) return html`<${Waiting} of="abacus, which takes a few seconds the first time" />`;
  const none = data.right === 0 ? `none of its ${counted(data.completions, "completion")} is right` : `although ${data.right} of ${counted(data.completions, "completion")} ${data.right === 1 ? "is" : "are"} right`;
  return html`<p class="search-answer"><strong>${printable(data.answer || "(empty)")}</strong> <span class=${data.passed ? "good" : "bad"}>${data.passed ? "✓ right" : "✗ wrong"}</span></p>
    <p class="note">${data.passed ? `${data.right} of ${counted(data.completions, "completion")} ${data.right === 1 ? "is" : "are"} right` : none}</p>
    <dl class="search-cost"><div><dt>tokens generated</dt><dd class="number">${grouped(data.generated)}</dd></div>
      <div><dt>tokens scored</dt><dd class="number">${grouped(data.scored)}</dd></div></dl>
    <${Tree} found=${data} title=${STRATEGIES[name][0]} />`;
}

// --- one tree --------------------------------------------------------------------------------------------------------

function Inside({ name, found }) {
  const all = found.nodes ? found.nodes.length - 1 : 0;
  const [shown, show] = useState(null); // null: the whole tree
  const [playing, play] = useState(false);
  useEffect(() => { show(null); play(false); }, [found]);
  useEffect(() => {
    if (!playing) return undefined;
    const timer = setInterval(() => show((old) => Math.min(all, (old ?? 0) + Math.max(1, Math.round(all / 60)))), MOMENT);
    return () => clearInterval(timer);
  }, [playing, all]);
  useEffect(() => { if (playing && shown >= all) play(false); }, [shown]);
  if (!found.nodes) return html`<section><h2>2. Inside ${STRATEGIES[name][0].toLowerCase()}</h2><p>There is no tree with this scorer.</p></section>`;
  const now = shown ?? all;
  const tokens = found.nodes.slice(0, now + 1).reduce((sum, node) => sum + node.tokens, 0);
  return html`<section class="search-inside"><h2>2. Inside ${STRATEGIES[name][0].toLowerCase()}: a tree of ${counted(all, "node")}</h2>
    <div class="search-controls">
      <button type="button" onClick=${() => { if (!playing && now >= all) show(0); play(!playing); }}>${playing ? "Pause" : "Watch it grow"}</button>
      <${Slider} label="Nodes sampled so far" name="grown" min="0" max=${all} step="1" value=${now} text=${`${now} of ${all}, ${counted(tokens, "token")}`}
        onChange=${(value) => { play(false); show(value); }} /></div>
    <div class="search-split"><${Tree} found=${found} title=${STRATEGIES[name][0]} shown=${now} large />
      <${Outline} found=${found} shown=${now} title=${STRATEGIES[name][0]} visits=${name === "mcts"} /></div></section>`;
}

function Limits() {
  return html`<section><h2>What limits a search</h2><ul>
    <li><strong>Coverage.</strong> A right completion must be among those sampled. With pass rate p it is among n with probability 1 − (1 − p)ⁿ; a problem that abacus
      never solves, such as 23*17, is not solved with any budget.</li>
    <li><strong>The scorer.</strong> It must prefer the right completion. On 100+200 one of 32 completions is right, and abacus is surer of others: only the checker finds it.
      A scorer that likes the wrong thing gets worse with more to choose from, as in <a href="/explore/hacking">reward hacking</a>.</li>
    <li><strong>The tokens.</strong> Both the tokens that are generated and those that the scorer reads count.</li></ul>
    <p><a href="/learn/reasoning#test-time-compute">The chapter on reasoning explains each strategy.</a></p></section>`;
}
