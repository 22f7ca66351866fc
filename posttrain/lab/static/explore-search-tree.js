// A search tree as a drawing, and as a nested list with every text and number of it.

import { html, printable } from "./ui.js";
import { Bar } from "./controls.js";

const WIDE = 320;
const EDGE = { left: 8, right: 24, top: 8, bottom: 8 };

// Place of each node: x by depth, leaves from top to bottom in the order of the tree.
function places(nodes, height) {
  const children = nodes.map(() => []);
  nodes.forEach((node, i) => node.parent !== null && children[node.parent].push(i));
  const depth = nodes.map(() => 0);
  nodes.forEach((node, i) => { if (node.parent !== null) depth[i] = depth[node.parent] + 1; });
  const deepest = Math.max(1, ...depth);
  const leaves = children.filter((own) => !own.length).length;
  const gap = (height(leaves) - EDGE.top - EDGE.bottom) / Math.max(1, leaves);
  let next = 0;
  const y = [];
  const visit = (i) => {
    children[i].forEach(visit);
    y[i] = children[i].length ? (y[children[i][0]] + y[children[i].at(-1)]) / 2 : EDGE.top + gap * (next++ + 0.5);
  };
  nodes.forEach((node, i) => node.parent === null && visit(i));
  const x = depth.map((d) => EDGE.left + (d / deepest) * (WIDE - EDGE.left - EDGE.right));
  return { x, y, gap, leaves };
}

// The numbers of the nodes from the root to the chosen completion.
function pathOf({ nodes, chosen }) {
  const path = new Set();
  for (let i = chosen; i !== null && i !== undefined; i = nodes[i].parent) path.add(i);
  return path;
}

// Scores from 0 to 1, by the largest one that occurs if that is above 1.
export function shares(nodes) {
  const top = Math.max(1, ...nodes.map((node) => node.score ?? 0));
  return nodes.map((node) => (node.score === null ? null : Math.max(0, node.score) / top));
}

export function Tree({ found, title, shown = found.nodes.length - 1, large = false }) {
  const { nodes } = found;
  const height = (leaves) => (large ? Math.max(200, Math.min(720, 18 * leaves)) : 200) + EDGE.top;
  const { x, y, gap, leaves } = places(nodes, height);
  const path = pathOf(found);
  const share = shares(nodes);
  const radius = Math.min(5, Math.max(1.5, 0.42 * gap));
  const mark = Math.min(14, Math.max(5, 1.1 * gap));
  const done = shown >= nodes.length - 1;
  const alive = nodes.map((node, i) => ({ node, i })).filter(({ i }) => i <= shown);
  return html`<svg class=${`search-tree ${large ? "large" : ""}`} viewBox=${`0 0 ${WIDE} ${height(leaves)}`} role="img" aria-label=${spoken(found, title, shown)}>
    ${alive.filter(({ node }) => node.parent !== null).map(({ node, i }) => html`<path key=${`e${i}`} class=${done && path.has(i) ? "chosen" : node.rollout ? "rollout" : ""}
      d=${`M${x[node.parent]} ${y[node.parent]}C${(x[node.parent] + x[i]) / 2} ${y[node.parent]} ${(x[node.parent] + x[i]) / 2} ${y[i]} ${x[i]} ${y[i]}`} />`)}
    ${alive.map(({ node, i }) => html`<circle key=${`n${i}`} cx=${x[i]} cy=${y[i]} r=${node.parent === null ? 5 : radius} class=${node.parent === null ? "root" : ""} style=${node.parent === null ? null : { fill: `color-mix(in srgb, var(--series-0) ${100 * (share[i] ?? 0)}%, var(--page))` }}>
      <title>${told(node, found)}</title></circle>`)}
    ${alive.filter(({ node }) => node.passed !== null).map(({ node, i }) => html`<text key=${`m${i}`} class=${node.passed ? "good" : "bad"} x=${x[i] + radius + 3} y=${y[i] + 0.35 * mark} font-size=${mark} font-weight=${node.passed ? 700 : 400}>${node.passed ? "✓" : "✗"}</text>`)}
  </svg>`;
}

function spoken({ nodes, chosen, answer, right, completions }, title, shown) {
  const now = `${title}: ${Math.min(shown, nodes.length - 1)} of ${nodes.length - 1} nodes`;
  if (shown < nodes.length - 1) return now;
  return `${now}, ${completions} completions, ${right} of them right. ${chosen === null ? "None was chosen." : `The chosen answer is ${printable(answer)}.`}`;
}

const told = (node, found) => (node.parent === null ? `What is ${printable(found.problem)}?` : `${printable(node.text)}${node.score === null ? "" : ` (score ${node.score.toFixed(2)})`}`);

// --- as text ---------------------------------------------------------------------------------------------------------

export function Outline({ found, shown, title, visits }) {
  const { nodes } = found;
  const children = nodes.map(() => []);
  nodes.forEach((node, i) => node.parent !== null && i <= shown && children[node.parent].push(i));
  const path = shown >= nodes.length - 1 ? pathOf(found) : new Set();
  const share = shares(nodes);
  const below = (i) => children[i].length > 0 && html`<ul>${children[i].map((k) => html`<li key=${k}><${Entry} node=${nodes[k]} share=${share[k]} chosen=${path.has(k)} visits=${visits} />${below(k)}</li>`)}</ul>`;
  const roots = nodes.map((node, i) => i).filter((i) => nodes[i].parent === null && i <= shown);
  return html`<div class="search-outline" role="region" tabindex="0" aria-label=${`The tree of ${title} as a list`}><ul>${roots.map((i) => html`<li key=${i}><span class="soft">What is ${printable(found.problem)}?</span>${below(i)}</li>`)}</ul></div>`;
}

function Entry({ node, share, chosen, visits }) {
  return html`<div class=${`search-entry ${chosen ? "chosen" : ""}`}><span class="said">${printable(node.text || "(end)")}</span>
    ${node.passed !== null && html`<span class=${node.passed ? "good" : "bad"}>${node.passed ? "✓ right" : node.end === "length" ? "✗ cut off" : "✗ wrong"}</span>`}
    ${chosen && html`<strong class="soft">chosen</strong>`}
    ${share !== null && html`<${Bar} share=${share} text=${node.score.toFixed(2)} />`}
    ${visits && !node.rollout && html`<span class="note number">${node.visits} ${node.visits === 1 ? "visit" : "visits"}${node.visits > 0 ? `, mean ${node.value.toFixed(2)}` : ""}</span>`}
    ${node.rollout && html`<span class="note">completed to be judged</span>`}</div>`;
}
