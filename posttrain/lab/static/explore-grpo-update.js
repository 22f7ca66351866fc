// A real update: a copy of abacus takes optimizer steps on the group, with each answer's probability before and after.

import { Failed, Table, html, number, percent, printable, useEffect, useState } from "./ui.js";
import { Bar, Formula, Slider, useComputed } from "./controls.js";
import { signed } from "./explore-grpo-steps.js";

const RATES = [0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001];
const MOST = 4;
const PAUSE = 300; // milliseconds without a change before an update is computed, so that sliders stay responsive

export function Update({ api, group, rewards, how, watch, found, state, set }) {
  const rate = RATES.reduce((best, one, i) => (Math.abs(one - state.lr) < Math.abs(RATES[best] - state.lr) ? i : best), 0);
  const clip = Math.min(1, Math.max(0, state.clip));
  const updates = Math.min(MOST, Math.max(0, Math.trunc(state.updates)));
  const { problem, seed, size } = group;
  const asked = new URLSearchParams({ problem, seed, size, rewards: rewards.join(","), how, lr: RATES[rate], clip, updates });
  return html`<section><h2>3. One real gradient step</h2>
    <p>The advantages say which answers should become more likely. The button copies abacus and takes one AdamW step on the copy, with the
      training loss of this group alone. Then it shows how likely each answer has become.</p>
    <${Objective} clip=${clip} />
    <div class="grpo-controls">
      <${Slider} label="Learning rate" name="lr" min="0" max=${RATES.length - 1} step="1" value=${rate} text=${String(RATES[rate])} onChange=${(i) => set({ lr: RATES[i] })} />
      <${Slider} label="Clip ε" name="clip" min="0.05" max="0.5" step="0.05" value=${clip} text=${clip.toFixed(2)} onChange=${(clip) => set({ clip })} />
    </div>
    <p class="grpo-buttons">
      <button type="button" disabled=${updates === MOST} onClick=${() => set({ updates: updates + 1 })}>${updates ? "Take another step on the same answers" : "Take one real gradient step"}</button>
      <button type="button" disabled=${updates === 0} onClick=${() => set({ updates: 0 })}>Undo all steps</button></p>
    <div>${updates === 0 ? html`<p class="soft">No steps taken yet.</p>`
      : html`<${Result} path=${`${api}/update?${asked}`} group=${group} watch=${watch} found=${found} clip=${clip} updates=${updates} set=${set} />`}</div>
  </section>`;
}

function Objective({ clip }) {
  const formula = `\\max_\\theta\\ \\frac{1}{\\text{tokens}}\\sum_{i,t}\\min\\bigl(\\rho_{i,t}\\hat A_i,\\ \\mathrm{clip}(\\rho_{i,t},1-\\epsilon,1+\\epsilon)\\,\\hat A_i\\bigr),\\quad \\rho_{i,t}=\\frac{\\pi_\\theta(\\text{token})}{\\pi_{\\text{old}}(\\text{token})}`;
  return html`<details><summary>The loss, and what clipping is for</summary><${Formula} display tex=${formula} />
    <p>The ratio ρ is a token's probability now divided by its probability when it was sampled. Before the first step every ratio is 1 and nothing is clipped.
      With every further step the answers become more stale. So clipping removes the gradient of a token whose ratio has already moved in the
      direction of its advantage, below ${(1 - clip).toFixed(2)} or above ${(1 + clip).toFixed(2)}.</p></details>`;
}

// The latest value that has not changed for PAUSE milliseconds.
function useSettled(value) {
  const [settled, settle] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => settle(value), PAUSE);
    return () => clearTimeout(timer);
  }, [value]);
  return settled;
}

function Result({ path, group, watch, found, clip, updates, set }) {
  const settled = useSettled(path);
  const { data, error, stale } = useComputed(settled);
  if (error) return html`<${Failed} error=${error} />`;
  const waiting = stale || settled !== path || !data || data.answers.length !== group.size;
  const status = html`<p role="status" class=${waiting ? "waiting" : ""}>${waiting ? "Training the copy …" : told(data, updates)}</p>`;
  if (!data || data.answers.length !== group.size) return status;
  return html`${status}<div class="grpo-two even" aria-busy=${waiting}>
    <div><h3>How likely each answer is</h3>
      <p class="note">The geometric mean of its tokens' probabilities, before and after. On the right: the factor by which the probability of the whole answer changed.</p>
      <ol class="grpo-shifts" aria-label="Probability before and after">${data.answers.map((one, i) => html`<${Shift} key=${i} i=${i} one=${one} answer=${group.answers[i]} advantage=${found?.advantages[i]} watched=${i === watch} />`)}</ol></div>
    <div><${Tokens} key=${`${watch}/${settled}`} group=${group} watch=${watch} set=${set} answer=${data.answers[watch]} advantage=${found?.advantages[watch] ?? 0} clip=${clip} />
      <h3>The steps</h3><${Table} caption="Loss and gradient norm of each update, and the share of tokens whose gradient was clipped" head=${["update", "loss", "gradient norm", "clipped"]}>
        ${data.steps.map((step, k) => html`<tr><th scope="row">${k + 1}</th><td class="number">${step.loss.toFixed(4)}</td><td class="number">${number(step.norm)}</td><td class="number">${percent(step.clipped)}</td></tr>`)}
      </${Table}></div></div>`;
}

function told(data, updates) {
  if (data.steps.every((step) => step.norm === 0)) return "The group is flat: the gradient is exactly 0, so nothing changed.";
  return `After ${updates} ${updates === 1 ? "step" : "steps"}: of ${data.asked} new answers to this question, ${data.before} were right before and ${data.right} after. `
    + (data.right < data.before ? "A step that is too large breaks what the model could do."
      : "This is a single question; training takes such steps over thousands.");
}

function Shift({ i, one, answer, advantage, watched }) {
  const way = one.factor > 1.005 ? "▲ more likely" : one.factor < 0.995 ? "▼ less likely" : "= unchanged";
  return html`<li class=${watched ? "watched" : ""}><p><strong>Answer ${i + 1}</strong> ${answer.passed ? "✓ right" : "✗ wrong"}, <code>${printable(answer.said || "(empty)")}</code>${" "}
      <span class="note">advantage ${advantage === undefined ? "…" : signed(advantage)}</span></p>
    <div class="grpo-pair"><span class="note">before</span><${Bar} share=${one.before} text=${percent(one.before)} series="3" />
      <span class="note">after</span><${Bar} share=${one.after} text=${percent(one.after)} series="2" />
      <span class="grpo-factor">${way}<br /> <span class="number">× ${number(one.factor)}</span></span></div></li>`;
}

function Tokens({ group, watch, set, answer, advantage, clip }) {
  const { before, after, ratio, clipped } = answer.tokens;
  const most = ratio.reduce((best, one, k) => (Math.abs(Math.log(one)) > Math.abs(Math.log(ratio[best])) ? k : best), 0);
  const [at, setAt] = useState(most);
  const texts = group.answers[watch].tokens;
  const move = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    setAt(Math.min(texts.length - 1, Math.max(0, at + by)));
  };
  const pick = (event) => { const k = event.target.dataset?.k; if (k !== undefined) setAt(Number(k)); };
  const look = (k) => `t ${ratio[k] > 1.02 ? "plus" : ratio[k] < 0.98 ? "minus" : ""}${clipped[k] ? " clipped" : ""}${at === k ? " at" : ""}`;
  return html`<h3>The tokens of answer ${watch + 1}</h3>
    <p class="key"><span class="t plus">more likely</span> <span class="t minus">less likely, underlined</span> <span class="t clipped">dotted frame: clipped</span></p>
    <div class="tokens run" tabindex="0" role="group" aria-label=${`Tokens of answer ${watch + 1}; use the arrow keys to move between them`} onKeyDown=${move} onMouseOver=${pick} onClick=${pick}>
      ${texts.map((text, k) => html`<span data-k=${k} class=${look(k)}>${printable(text).replaceAll("\n", "⏎")}</span>`)}</div>
    <p class="read" role="status">Token ${at + 1}, “${printable(texts[at])}”: probability ${percent(before[at])} before, ${percent(after[at])} after.
      ${clipped[at] ? " Its ratio has left the clip range in the direction of its advantage, so another step gets no gradient from it." : ""}</p>
    <${Formula} display tex=${`\\rho=\\frac{${short(after[at])}}{${short(before[at])}}=${short(ratio[at])}`} />
    <${Formula} display tex=${`\\begin{aligned}&\\min(\\rho\\hat A,\\,\\mathrm{clip}(\\rho)\\hat A)\\\\&=\\min(${short(ratio[at])}\\cdot ${short(advantage)},\\,${short(Math.min(1 + clip, Math.max(1 - clip, ratio[at])))}\\cdot ${short(advantage)})\\\\&=${short(answer.tokens.earned[at], false)}\\end{aligned}`} />`;
}

function short(value, apart = true) {
  if (value !== 0 && Math.abs(value) < 0.001) {
    const [digits, power] = value.toExponential(1).split("e");
    return `${digits}\\cdot 10^{${Number(power)}}`;
  }
  const text = String(Number(value.toPrecision(3)));
  return value < 0 && apart ? `(${text})` : text;
}
