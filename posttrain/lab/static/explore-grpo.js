// The GRPO explorer: a real group of answers, each one's advantage within the group, and a real update on them. The
// server computes every number; the URL holds all choices and every reward that was moved.

import { Failed, Loaded, Table, Waiting, html, printable, useData, useTitle } from "./ui.js";
import { Bar, Choice, Slider, Toggle, useAddress, useComputed } from "./controls.js";
import { Steps, VARIANTS, signed } from "./explore-grpo-steps.js";
import { Update } from "./explore-grpo-update.js";

const STATE = { problem: "98*8", seed: 0, size: 8, how: "grpo", watch: 0, rewards: [], thinking: false, updates: 0, lr: 0.0001, clip: 0.2 };
const REACHES = [0.5, 1, 2, 3, 6, 12, 31];
const API = "/api/explore/grpo";

export function Page() {
  useTitle("GRPO");
  const [state, set] = useAddress(STATE);
  const offered = useData(API);
  const { problem, seed, size } = state;
  const found = useComputed(`${API}/group?${new URLSearchParams({ problem, seed, size })}`);
  const fresh = (change) => set({ rewards: [], updates: 0, watch: 0, ...change });
  return html`<p class="path"><a href="/explore">Explore</a></p><h1>GRPO: answers are judged against their group</h1>
    <p class="lead">abacus, the small model that ships with posttrain, answers one question several times. A program checks each answer.
      What counts is not how good an answer is in itself, but how it compares with the others.</p>
    <${Loaded} from=${offered} of="the problems">${({ problems, sizes }) => html`
      <${Asking} problems=${problems} sizes=${sizes} state=${state} fresh=${fresh} set=${set} />`}</${Loaded}>
    <div>${found.error && html`<${Failed} error=${found.error} />`}</div>
    <div>${found.data ? html`<${Explorer} group=${found.data} state=${state} set=${set} />`
      : !found.error && html`<${Waiting} of="abacus, which takes a few seconds the first time" />`}</div>
    <${Critic} />`;
}

function Asking({ problems, sizes, state, fresh, set }) {
  const all = problems.includes(state.problem) ? problems : [state.problem, ...problems];
  const next = all[(all.indexOf(state.problem) + 1) % all.length];
  return html`<section class="box grpo-asking" aria-label="The question and its group">
    <p class="grpo-question">What is ${printable(state.problem)}?</p>
    <div class="grpo-controls">
      <label class="grpo-select">Problem <select name="problem" value=${state.problem} onChange=${(event) => fresh({ problem: event.target.value, seed: 0 })}>
        ${all.map((one) => html`<option value=${one} selected=${one === state.problem}>${printable(one)}</option>`)}</select></label>
      <button type="button" onClick=${() => fresh({ problem: next, seed: 0 })}>Another problem</button>
      <button type="button" onClick=${() => fresh({ seed: state.seed + 1 })}>Sample another group</button>
      <${Choice} legend="Answers in the group" name="size" value=${state.size} options=${sizes.map((size) => [size, String(size)])} onChange=${(size) => fresh({ size })} />
      <${Toggle} label="Show the thinking" name="thinking" value=${state.thinking} onChange=${(thinking) => set({ thinking })} />
    </div></section>`;
}

function Explorer({ group, state, set }) {
  const given = group.answers.map((answer) => answer.reward);
  const moved = state.rewards.length === given.length && state.rewards.every((reward) => reward >= 0 && reward <= 1);
  const rewards = moved ? state.rewards : given;
  const watch = Math.min(Math.max(0, Math.trunc(state.watch)), given.length - 1);
  const how = VARIANTS[state.how] ? state.how : "grpo";
  const asked = new URLSearchParams({ rewards: rewards.join(","), how, watch });
  const { data, error } = useComputed(`${API}/advantages?${asked}`);
  const found = data && data.rewards.length === given.length ? data : null;
  const reward = (change) => {
    const next = rewards.map(change);
    set({ rewards: String(next) === String(given) ? [] : next });
  };
  return html`
    <section class="grpo-two"><div>
      <h2>1. A group of ${group.size} answers, graded</h2>
      <p><strong>${group.right} of ${group.size}</strong> are right: the verifier expects ${printable(group.wanted)}.
        ${group.right === 0 && " Without a single right answer, the rewards give abacus nothing to learn from."}
        ${" "}Move a reward and watch every advantage move.</p>
      ${error && html`<${Failed} error=${error} />`}
      ${found?.flat && html`<${Flat} right=${rewards[0] > 0} />`}
      <${Answers} group=${group} rewards=${rewards} found=${found} watch=${watch} thinking=${state.thinking} set=${set} reward=${reward} />
      ${found && html`<details><summary>All advantages as a table</summary><${Numbers} found=${found} /></details>`}
      <p><button type="button" disabled=${!moved} onClick=${() => set({ rewards: [] })}>Reset to the verifier's rewards</button></p>
    </div>
    <${Steps} found=${found} how=${how} watch=${watch} set=${set} reward=${reward} rewards=${rewards} /></section>
    <${Update} api=${API} group=${group} rewards=${rewards} how=${how} watch=${watch} found=${found} state=${state} set=${set} />`;
}

function Flat({ right }) {
  return html`<div class="box grpo-flat" role="status"><p><strong>! A flat group.</strong> All rewards are equal, so every advantage is exactly 0
    and so is the gradient: a question that is ${right ? "always" : "never"} solved teaches nothing.
    That is why training needs questions that are solved only some of the time. Move one reward to break the tie.</p></div>`;
}

function Answers({ group, rewards, found, watch, thinking, set, reward }) {
  const largest = Math.max(...(found?.advantages || [0]).map(Math.abs));
  const reach = REACHES.find((one) => one >= largest - 1e-9) || largest;
  return html`<p class="note">The bars range from −${reach} to +${reach}. Select an answer to see how its advantage is computed.</p>
    <ol class="grpo-answers" aria-label="Answers">${group.answers.map((answer, i) => html`
    <li class=${i === watch ? "watched" : ""}>
      <div class="grpo-text">
        <label class="grpo-pick"><input type="radio" name="watch" value=${i} checked=${i === watch} onChange=${() => set({ watch: i })} />
          <span>Answer ${i + 1}</span></label>
        <p class="said"><${Said} answer=${answer} thinking=${thinking} /></p>
        <p class="note">${answer.passed ? "✓ right" : html`✗ ${printable(answer.why)}`}${answer.cut ? ", truncated" : ""}</p></div>
      <${Slider} label=${`Reward ${i + 1}`} name=${`reward-${i + 1}`} min="0" max="1" step="0.05" value=${rewards[i]} text=${rewards[i].toFixed(2)}
        onChange=${(value) => reward((old, k) => (k === i ? value : old))} />
      <div class="grpo-worth"><span class="note">Advantage ${i + 1}</span>
        <${Bar} signed share=${found ? found.advantages[i] / reach : 0} text=${found ? signed(found.advantages[i]) : "…"} /></div>
    </li>`)}</ol>`;
}

function Said({ answer, thinking }) {
  const said = printable(answer.said || "(empty)");
  if (!answer.thought) return said;
  return thinking ? html`<span class="soft">${printable(answer.thought)} →</span> <strong>${said}</strong>`
    : html`<span class="soft">(thought for ${answer.length} tokens) →</span> <strong>${said}</strong>`;
}

function Numbers({ found }) {
  return html`<${Table} caption="Advantage = (reward − baseline) ÷ divisor" head=${["answer", "reward", "baseline", "difference", "divisor", "advantage"]}>
    ${found.rewards.map((reward, i) => html`<tr><th scope="row">${i + 1}</th><td class="number">${reward.toFixed(2)}</td>
      <td class="number">${found.baselines[i].toFixed(4)}</td><td class="number">${signed(found.differences[i], 4)}</td>
      <td class="number">${found.divisor.toFixed(4)}</td><td class="number">${signed(found.advantages[i], 4)}</td></tr>`)}</${Table}>`;
}

function Critic() {
  return html`<section><h2>Why the group replaces the critic</h2>
    <p>PPO trains a second network, the critic, to predict the reward for a question, and an answer's advantage is its reward minus that prediction.
      GRPO asks the question several times and uses the group's mean reward as the prediction. So there is no critic to store or train,
      but every question costs several answers. <a href="/learn/algorithms">The chapter on algorithms derives this.</a></p></section>`;
}
