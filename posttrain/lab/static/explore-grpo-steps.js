// One answer's advantage worked out with the group's numbers, and the advantage it would have in other groups.

import { html } from "./ui.js";
import { Bar, Choice, Formula } from "./controls.js";

// The server's key of a variant → its name, the setting that selects it in training, and its purpose.
export const VARIANTS = {
  grpo: ["GRPO", 'algo.std = "sample"', "The difference from the group's mean in standard deviations, so that every group has about the same influence."],
  "dr-grpo": ["Dr. GRPO", 'algo.std = "none"', "Only the difference; posttrain's default. Dividing by a small standard deviation would give the most weight to questions that are almost always or almost never solved."],
  rloo: ["RLOO", 'algo.baseline = "leave-one-out"', "The difference from the mean of the other answers only, so that an answer is not part of its own baseline."],
  maxrl: ["MaxRL", 'algo.std = "mean"', "The difference divided by the mean, so that the rarer a success is, the more it counts."],
};

export const signed = (value, digits = 3) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(digits)}`;

const tex = (value, digits = 4) => String(Number(value.toFixed(digits)));

export function Steps({ found, how, watch, set, reward, rewards }) {
  const [, setting, why] = VARIANTS[how];
  return html`<div class="grpo-steps"><h2>2. The advantage, step by step</h2>
    <${Choice} legend="How rewards are compared" name="how" value=${how} options=${Object.entries(VARIANTS).map(([key, [name]]) => [key, name])} onChange=${(how) => set({ how })} />
    <p class="note">${why} Setting: <code>${setting}</code></p>
    ${found && html`<${Worked} found=${found} how=${how} watch=${watch} /><${Elsewhere} found=${found} watch=${watch} reward=${reward} rewards=${rewards} />`}</div>`;
}

function Worked({ found, how, watch }) {
  const i = watch + 1;
  const [own, advantage] = [tex(found.rewards[watch]), tex(found.advantages[watch])];
  const mean = html`<li>The group's mean.<${Formula} display tex=${lines(`\\mu&=\\frac{${sum(found.rewards.map((r) => tex(r)))}}{${found.rewards.length}}`, `&=${tex(found.mean)}`)} /></li>`;
  if (found.flat) {
    return html`<ol class="grpo-worked">${mean}<li>All rewards equal the mean.<${Formula} display tex=${`\\hat A_i=r_i-\\mu=0`} /></li></ol>`;
  }
  const steps = {
    grpo: [mean, html`<li>The standard deviation of the rewards.<${Formula} display tex=${spread(found)} /></li>`,
      html`<li>The advantage of answer ${i}, in standard deviations.<${Formula} display tex=${lines(`\\hat A_{${i}}&=\\frac{r_{${i}}-\\mu}{\\sigma+\\epsilon}=\\frac{${own}-${tex(found.mean)}}{${tex(found.std)}+0}`, `&=${advantage}`)} />
        <span class="note">ε only guards against division by 0. posttrain sets the advantages of flat groups to 0 directly and uses ε = 0.</span></li>`],
    "dr-grpo": [mean, html`<li>The advantage of answer ${i}.<${Formula} display tex=${`\\hat A_{${i}}=r_{${i}}-\\mu=${own}-${tex(found.mean)}=${advantage}`} /></li>`],
    rloo: [html`<li>The mean of the other rewards.<${Formula} display tex=${lines(`b_{${i}}&=\\frac{${sum(found.rewards.filter((_, k) => k !== watch).map((r) => tex(r)))}}{${found.rewards.length - 1}}`, `&=${tex(found.baselines[watch])}`)} /></li>`,
      html`<li>The advantage of answer ${i}.<${Formula} display tex=${`\\hat A_{${i}}=r_{${i}}-b_{${i}}=${own}-${tex(found.baselines[watch])}=${advantage}`} /></li>`],
    maxrl: [mean, html`<li>The advantage of answer ${i}, in units of the mean.<${Formula} display tex=${`\\hat A_{${i}}=\\frac{r_{${i}}-\\mu}{\\mu}=\\frac{${own}-${tex(found.mean)}}{${tex(found.mean)}}=${advantage}`} /></li>`],
  }[how];
  return html`<ol class="grpo-worked" key=${how}>${steps}</ol>`;
}

// Puts the result on a line of its own, so that a narrow page shows all of it.
const lines = (...parts) => `\\begin{aligned}${parts.join("\\\\")}\\end{aligned}`;

// A long sum shows only its first terms and its last.
function sum(terms, most = 8, first = 4) {
  return (terms.length <= most ? terms : [...terms.slice(0, first), "\\cdots", terms[terms.length - 1]]).join("+");
}

function spread({ rewards, mean, std }) {
  const squares = rewards.map((r) => `(${tex(r)}-${tex(mean)})^2`);
  return lines(`\\sigma&=\\sqrt{\\frac{${sum(squares, 2, 1)}}{${rewards.length}-1}}`, `&=${tex(std)}`);
}

function Elsewhere({ found, watch, reward, rewards }) {
  const [low, high] = found.others;
  const own = rewards[watch];
  const here = found.advantages[watch];
  const reach = Math.max(...found.others.map(Math.abs), Math.abs(here), 0.5);
  const put = (companions) => reward((old, k) => (k === watch ? old : companions));
  const row = (text, value, companions) => html`<div class="grpo-elsewhere-row"><span>${text}</span>
    <${Bar} signed share=${value / reach} text=${signed(value)} />
    ${companions === null ? html`<span></span>` : html`<button type="button" class="grpo-small" aria-label=${`Try it: give all other answers reward ${companions}`} onClick=${() => put(companions)}>Try it</button>`}</div>`;
  return html`<div class="box grpo-elsewhere"><h3>The same answer in other groups</h3>
    <p>Answer ${watch + 1} keeps its reward of <strong>${own.toFixed(2)}</strong>. Its advantage is</p>
    ${row("among wrong answers", low, 0)}${row("in this group", here, null)}${row("among right answers", high, 1)}
    <p role="status">${told(low, high)}</p>
    ${(own === 0 || own === 1) && html`<p><button type="button" onClick=${() => reward((old, k) => (k === watch ? 0.5 : old))}>Give answer ${watch + 1} half a point</button></p>`}</div>`;
}

function told(low, high) {
  if (low > 0 && high < 0) return "The answer itself does not change, yet among worse answers it becomes more likely, and among better ones less likely.";
  if (low > 0) return "A right answer among wrong ones teaches a lot. Among right ones it teaches nothing, because no answer is better or worse than the others.";
  return "A wrong answer among right ones is pushed down hard. Among wrong ones it teaches nothing, because no answer is better or worse than the others.";
}
