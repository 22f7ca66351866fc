// Small diagrams of the algorithms: boxes in three columns, arrows between them, and the update arrow back.

import { html } from "./ui.js";

const WIDE = 116;
const HIGH = 34;
const STEP = { x: 122, y: 58 };
const MARGIN = 20;

// Boxes: name: [text, column, row, kind]; kind is learns, stays or data. Arrows: [from, to]. `back` is the update arrow
// from the last box to the trained model. `told` describes the diagram in words.
export const DIAGRAMS = {
  ppo: {
    boxes: {
      prompt: ["prompt", 1, 0, "data"], policy: ["policy", 1, 1, "learns"], answer: ["an answer", 1, 2, "data"],
      reference: ["reference", 0, 3, "stays"], reward: ["reward model", 1, 3, "stays"], critic: ["critic", 2, 3, "learns"],
      advantage: ["advantages", 1, 4, "data"],
    },
    arrows: [["prompt", "policy"], ["policy", "answer"], ["answer", "reference"], ["answer", "reward"], ["answer", "critic"],
      ["reference", "advantage"], ["reward", "advantage"], ["critic", "advantage"]],
    back: ["advantage", "policy"],
    told: "The policy answers a prompt. The reward model scores the answer, the reference measures how far the policy has moved from the start, and the critic predicts the reward to expect at each token. Together they give each token’s advantage, which updates the policy and the critic.",
  },
  dpo: {
    boxes: {
      pair: ["a pair of answers", 1, 0, "data"], policy: ["policy", 0, 1.5, "learns"], reference: ["reference", 2, 1.5, "stays"],
      ratio: ["log-ratios", 1, 3, "data"], loss: ["one loss", 1, 4, "data"],
    },
    arrows: [["pair", "policy"], ["pair", "reference"], ["policy", "ratio"], ["reference", "ratio"], ["ratio", "loss"]],
    back: ["loss", "policy"],
    told: "A pair of answers comes from a dataset. The policy and the reference each compute how likely both answers are. The loss, computed from the difference of the log-ratios, updates the policy. Nothing is sampled.",
  },
  grpo: {
    boxes: {
      prompt: ["prompt", 1, 0, "data"], policy: ["policy", 1, 1, "learns"], answers: ["group of answers", 1, 2, "data"],
      reference: ["reference", 0, 3, "stays"], checked: ["program checks", 1, 3, "data"], advantage: ["reward − mean", 1, 4, "data"],
    },
    arrows: [["prompt", "policy"], ["policy", "answers"], ["answers", "reference"], ["answers", "checked"], ["checked", "advantage"], ["reference", "advantage"]],
    back: ["advantage", "policy"],
    told: "The policy writes a group of answers to one prompt. A program checks each answer, and the reference measures how far the policy has moved from the start. An answer’s advantage is its reward minus the group’s mean, which updates the policy. There is no critic and no reward model.",
  },
};

export function Diagram({ title, boxes, arrows, back, told }) {
  const at = (name) => {
    const [, column, row] = boxes[name];
    const x = MARGIN + column * STEP.x;
    const y = 4 + row * STEP.y;
    return { x, y, middle: x + WIDE / 2, bottom: y + HIGH, centre: y + HIGH / 2 };
  };
  const height = Math.max(...Object.keys(boxes).map((name) => at(name).bottom)) + 4;
  const [last, first] = back.map(at);
  return html`<svg class="diagram" viewBox=${`0 0 ${MARGIN + 2 * STEP.x + WIDE + 4} ${height}`} role="img" aria-label=${`How ${title} works. ${told}`}>
    ${arrows.map(([from, to]) => html`<${Arrow} from=${at(from)} to=${at(to)} />`)}
    <polyline class="update" points=${`${last.x},${last.centre} 8,${last.centre} 8,${first.centre} ${first.x - 7},${first.centre}`} />
    <polygon class="head" points=${head(first.x, first.centre, 1, 0)} />
    ${Object.entries(boxes).map(([name, [text, , , kind]]) => html`<rect class=${kind} x=${at(name).x} y=${at(name).y} width=${WIDE} height=${HIGH} rx="4" />
      <text x=${at(name).middle} y=${at(name).centre + 4} text-anchor="middle">${text}</text>`)}
  </svg>`;
}

function Arrow({ from, to }) {
  const [dx, dy] = [to.middle - from.middle, to.y - from.bottom];
  const length = Math.hypot(dx, dy);
  const [ux, uy] = [dx / length, dy / length];
  return html`<line x1=${from.middle} y1=${from.bottom} x2=${to.middle - 6 * ux} y2=${to.y - 6 * uy} /><polygon class="head" points=${head(to.middle, to.y, ux, uy)} />`;
}

const head = (x, y, ux, uy) => [[x, y], [x - 8 * ux - 4 * uy, y - 8 * uy + 4 * ux], [x - 8 * ux + 4 * uy, y - 8 * uy - 4 * ux]].map((p) => p.join()).join(" ");
