// The five explorers, each with the question that it answers.

import { html, useTitle } from "./ui.js";

export const EXPLORERS = [
  ["stages", "Training stages", "What does each stage of training add to a model, in its own words?"],
  ["preferences", "Preferences", "How few comparisons does a reward model need before it knows what you like?"],
  ["algorithms", "Algorithms", "What do PPO, DPO and GRPO need in memory, and what do they need as data?"],
  ["grpo", "GRPO", "Why can the same answer be good in one group and bad in another?"],
  ["hacking", "Reward hacking", "What happens to quality when a proxy is optimised too hard?"],
];

export function Explorers({ heading = "h3" }) {
  return html`<ul class="cards">${EXPLORERS.map(([name, title, question]) => html`
    <li class="box"><${heading}><a href=${`/explore/${name}`}>${title}</a></${heading}><p>${question}</p></li>`)}</ul>`;
}

export function Page() {
  useTitle("Explore");
  return html`<h1>Explore</h1><p class="lead">Each page computes while you move things, with the functions that train.</p><${Explorers} heading="h2" />`;
}
