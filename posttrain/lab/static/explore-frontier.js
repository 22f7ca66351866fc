// The KL–reward frontier: where runs with several penalties end, each drawn as soon as it is computed.

import { Failed, TOKEN, Table, html, number, useEffect, useState } from "./ui.js";

const WIDE = matchMedia("(max-width: 600px)").matches ? 380 : 640; // so that its text is as large as the page’s
const HIGH = 300;
const EDGE = { left: 44, right: 16, top: 16, bottom: 44 };
const NATS = [0, 1, 2, 5, 10, 20, 40, 60, 80];
const KINDS = [["proxy", "reward model’s score"], ["true", "true reward"]];

function useFrontier(query, wanted) {
  const [shown, set] = useState({ points: [], betas: [], state: "idle", error: "" });
  const asked = new URLSearchParams(query).toString();
  useEffect(() => {
    if (!wanted) return undefined;
    let closed = false;
    let socket;
    set({ points: [], betas: [], state: "running", error: "" });
    const timer = setTimeout(() => {
      socket = new WebSocket(`ws://${location.host}/live/explore/hacking/frontier?${asked}&token=${encodeURIComponent(TOKEN)}`);
      socket.onmessage = (message) => {
        const said = JSON.parse(message.data);
        if (said.error) { closed = true; set((old) => ({ ...old, state: "failed", error: said.error })); }
        if (said.kind === "betas") set((old) => ({ ...old, betas: said.betas }));
        if (said.kind === "point") set((old) => ({ ...old, points: [...old.points, said] }));
        if (said.kind === "end") { closed = true; set((old) => ({ ...old, state: "done" })); socket.close(); }
      };
      socket.onclose = () => closed || set((old) => ({ ...old, state: "failed", error: "Lost the connection to the lab." }));
    }, 500);
    return () => { closed = true; clearTimeout(timer); socket?.close(); };
  }, [asked, wanted]);
  return shown;
}

export function Frontier({ query, wanted, want }) {
  const { points, betas, state, error } = useFrontier(query, wanted);
  const sorted = [...points].sort((a, b) => a.kl - b.kl);
  return html`<h2>How far is too far?</h2>
    <p>One run for each penalty, from strong to none, and where it ends. The further the policy moves from the start, the higher the reward
      model’s score. The true reward rises with it for a while, and then falls.</p>
    ${!wanted && html`<p><button type="button" onClick=${want}>Run them all</button></p>`}
    ${state === "running" && html`<p role="status" class="waiting">Run ${Math.min(points.length + 1, betas.length || 1)} of ${betas.length || "…"}</p>`}
    ${state === "failed" && html`<${Failed} error=${error} />`}
    ${points.length > 0 && html`<div class="frontiers"><${Plot} points=${sorted} own=${query.beta} />
      <${Table} caption="Where each run ends: means of its last ten steps" head=${["Penalty β", "KL, nats", "Reward model’s score", "True reward"]}>
        ${sorted.map((point) => html`<tr><th scope="row">${number(point.beta)}${point.beta === query.beta ? " (yours)" : ""}</th>
          <td class="number">${point.kl.toFixed(2)}</td><td class="number">${point.proxy.toFixed(2)}</td><td class="number">${point.true.toFixed(2).replace("-", "−")}</td></tr>`)}</${Table}></div>`}`;
}

// The x axis is the square root of the KL, as in "Scaling laws for reward model overoptimization" (arXiv 2210.10760).
function Plot({ points, own }) {
  const most = Math.max(10, ...points.map((point) => point.kl));
  const values = points.flatMap((point) => [point.proxy, point.true]);
  const low = Math.min(-1, Math.floor(Math.min(...values)));
  const high = Math.max(4, Math.ceil(Math.max(...values)));
  const x = (kl) => EDGE.left + Math.sqrt(Math.max(0, kl) / most) * (WIDE - EDGE.left - EDGE.right);
  const y = (value) => EDGE.top + ((high - value) / (high - low)) * (HIGH - EDGE.top - EDGE.bottom);
  const every = Math.ceil((high - low) / 7);
  const ticks = Array.from({ length: high - low + 1 }, (_, i) => low + i).filter((tick) => tick % every === 0);
  const best = points.reduce((a, b) => (b.true > a.true ? b : a));
  return html`<figure class="frontier"><svg viewBox=${`0 0 ${WIDE} ${HIGH}`} role="img"
      aria-label=${`Both rewards against the KL, for ${points.length} penalties. The true reward is highest, ${number(best.true)}, with β ${number(best.beta)} at ${number(best.kl)} nats. The table below has all numbers.`}>
    ${ticks.map((tick) => html`<line class="rule" x1=${EDGE.left} x2=${WIDE - EDGE.right} y1=${y(tick)} y2=${y(tick)} /><text x=${EDGE.left - 8} y=${y(tick) + 4} text-anchor="end">${tick < 0 ? `−${-tick}` : tick}</text>`)}
    ${NATS.filter((nats) => nats <= most).map((nats) => html`<text x=${x(nats)} y=${HIGH - 24} text-anchor="middle">${nats}</text>`)}
    <text x=${WIDE / 2} y=${HIGH - 4} text-anchor="middle">KL from the start, nats (square-root scale)</text>
    ${KINDS.map(([kind], i) => html`<polyline class=${`line-${i}`} stroke-dasharray=${i ? "8 4" : ""} points=${points.map((point) => `${x(point.kl)},${y(point[kind])}`).join(" ")} />
      ${points.map((point) => (i
        ? html`<rect class=${`dot-${i}`} x=${x(point.kl) - 4} y=${y(point[kind]) - 4} width="8" height="8" />`
        : html`<circle class=${`dot-${i}`} cx=${x(point.kl)} cy=${y(point[kind])} r="4.5" />`))}`)}
    <text class="beta" x=${x(best.kl)} y=${y(best.true) + 24} text-anchor="middle">β ${number(best.beta)}</text>
    ${points.filter((point) => point !== best && (point.beta === own || point.beta === 0)).map((point) => html`
      <text class="beta" x=${x(point.kl) - 8} y=${y(point.proxy) - 6} text-anchor="end">β ${number(point.beta)}</text>`)}
  </svg><figcaption class="note">${KINDS.map(([, name], i) => html`<span><svg width="36" height="12" aria-hidden="true"><line x1="0" y1="6" x2="36" y2="6" class=${`line-${i}`} stroke-width="2" stroke-dasharray=${i ? "8 4" : ""} />
      ${i ? html`<rect class="dot-1" x="14" y="2" width="8" height="8" />` : html`<circle class="dot-0" cx="18" cy="6" r="4.5" />`}</svg> ${name}</span> `)}</figcaption></figure>`;
}
