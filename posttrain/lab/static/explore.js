// The six explorers and the question each one answers.

import { html, useTitle } from "./ui.js";

export const EXPLORERS = [
  ["stages", "Training stages", "What does each training stage add to a model, and what does it cost?"],
  ["preferences", "Preferences", "How many comparisons does a reward model need to learn what you like?"],
  ["algorithms", "Algorithms", "How much memory do PPO, DPO and GRPO need, and what data do they learn from?"],
  ["grpo", "GRPO", "Why can the same answer be good in one group and bad in another?"],
  ["hacking", "Reward hacking", "What happens to quality when a proxy is optimised too hard?"],
  ["search", "Think longer", "What do more tokens buy if a model may try several times and choose?"],
];

export function Explorers({ heading = "h3" }) {
  return html`<ul class="cards">${EXPLORERS.map(([name, title, question]) => html`
    <li class="box"><${heading}><a href=${`/explore/${name}`}>${title}</a></${heading}><p>${question}</p></li>`)}</ul>`;
}

export function Page() {
  useTitle("Explore");
  return html`<h1>Explore</h1><p class="lead">Each page recomputes as you change things, with the library's own training functions.</p><${Explorers} heading="h2" />`;
}
