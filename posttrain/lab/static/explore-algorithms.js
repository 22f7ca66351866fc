// The algorithm explorer: how PPO, DPO and GRPO work, the memory they need according to the planner, and their data.

import { DIAGRAMS, Diagram } from "./explore-diagrams.js";
import { Choice, Toggle, useAddress, useComputed } from "./controls.js";
import { Failed, Table, Waiting, html, useTitle } from "./ui.js";

const DEFAULTS = { size: "7b", dtype: "bfloat16", lora: false, devices: 1, length: 1024, recompute: true, cached: false };
const CARDS = ["ppo", "dpo", "grpo"];
const GB = 2 ** 30;
const size = (bytes) => `${(bytes / GB).toFixed(1)} GB`;
const listed = (words, last = "and") => (words.length > 1 ? `${words.slice(0, -1).join(", ")} ${last} ${words.at(-1)}` : words.join());
const SAID = { held: "in memory", shared: "the policy without its adapters", "read once": "run once before training" };

export function Page() {
  useTitle("Algorithms");
  const [state, set] = useAddress(DEFAULTS);
  const { data, error } = useComputed(`/api/explore/algorithms?${new URLSearchParams(state)}`);
  const choose = (key, number = false) => (value) => set({ [key]: number ? Number(value) : value });
  return html`<p class="path"><a href="/explore">Explore</a></p><h1>Algorithms</h1>
    <p class="lead">How much memory do PPO, DPO and GRPO need, and what data do they learn from?</p>
    ${!data && (error ? html`<${Failed} error=${error} />` : html`<${Waiting} of="the planner" />`)}
    ${data && error && html`<${Failed} error=${error} />`}
    ${data && html`<ul class="cards algorithms">${CARDS.map((name) => html`<${Card} key=${name} name=${name} kind=${data.kinds.find((kind) => kind.name === name)} />`)}</ul>
      <p class="note">Thick frame: a model that is trained. Dashed frame: a frozen model. Thin frame: data. The line back on the left is the update.</p>`}
    <h2>Memory</h2>
    <div class="split"><div class="settings">
      <${Choice} legend="Model" name="size" value=${state.size} onChange=${choose("size")} options=${[["1b", "1B"], ["7b", "7B"], ["13b", "13B"], ["70b", "70B"]]} />
      <${Choice} legend="Weight precision" name="dtype" value=${state.dtype} onChange=${choose("dtype")} options=${[["bfloat16", "bfloat16"], ["float32", "float32"]]} />
      <${Choice} legend="Sharded over devices" name="devices" value=${String(state.devices)} onChange=${choose("devices", true)} options=${["1", "2", "4", "8"].map((n) => [n, n])} />
      <${Choice} legend="Sequence length in tokens" name="length" value=${String(state.length)} onChange=${choose("length", true)} options=${["512", "1024", "2048", "4096", "8192"].map((n) => [n, n])} />
      <${Toggle} label="LoRA: train only small adapters" name="lora" value=${state.lora} onChange=${choose("lora")} />
      <${Toggle} label="Recompute activations" name="recompute" value=${state.recompute} onChange=${choose("recompute")} />
      <${Toggle} label="Run DPO’s reference only once" name="cached" value=${state.cached} onChange=${choose("cached")} />
      <p class="note">DPO’s reference gives the same log-probabilities throughout the run, so <code>posttrain dpo</code> runs it once and then frees its memory.
        In textbooks it stays in memory.</p>
    </div>${data && html`<${Bars} data=${data} />`}</div>
    ${data && html`<${Parts} data=${data} /><${Compared} data=${data} />`}`;
}

function Card({ name, kind }) {
  return html`<li class="box"><h2>${kind.title}</h2>
    <p><strong class="models">${kind.held} ${kind.held === 1 ? "model" : "models"} in memory</strong> · ${kind.online ? "online" : "offline"}</p>
    <${Diagram} title=${kind.title} ...${DIAGRAMS[name]} />
    <p>${kind.about}</p>
    <ul class="roles">${Object.entries(kind.models).map(([role, how]) => html`<li><span class=${`swatch ${swatch(role)}`} aria-hidden="true"></span> ${role}: ${SAID[how]}</li>`)}</ul></li>`;
}

const swatch = (part) => `part-${part === "policy" ? "weights" : part.replace(" ", "-").toLowerCase()}`;

// --- memory ----------------------------------------------------------------------------------------------------------

function Bars({ data }) {
  const kinds = CARDS.map((name) => data.kinds.find((kind) => kind.name === name));
  const most = Math.max(96 * GB, ...kinds.map((kind) => kind.total * 1.04));
  const place = (bytes) => `${(100 * bytes) / most}%`;
  const { title, parameters, adapters } = data.model;
  const devices = data.asked.devices;
  return html`<figure class="memory" aria-label=${`Memory ${devices > 1 ? "on each device" : "on one device"}`}>
    <p class="which">${title}: ${(parameters / 1e9).toFixed(2)} billion weights${data.asked.lora ? `, ${(adapters / 1e6).toFixed(0)} million of them trainable adapters` : ", all trainable"}.
      Memory ${devices > 1 ? html`on <strong>each of ${devices}</strong> devices` : "on one device"}:</p>
    <div class="axis" aria-hidden="true">${named(data.cards, most).map((card) => html`<span style=${{ left: place(card * GB) }}>${card}</span>`)}<span class="unit">GB</span></div>
    ${kinds.map((kind) => html`<div class="lane" key=${kind.name}><p><strong>${kind.title}</strong> <span class="number">${size(kind.total)}</span> · ${fit(kind, devices)}</p>
      <div class="stack" aria-hidden="true">${Object.entries(kind.parts).map(([part, bytes]) => html`<span key=${part} class=${swatch(part)} style=${{ width: place(bytes) }} title=${`${part} ${size(bytes)}`}></span>`)}
        ${data.cards.map((card) => html`<i style=${{ left: place(card * GB) }}></i>`)}</div>
      <p class="note">${fewest(kind)}</p></div>`)}
    <ul class="parts" aria-label="Parts of the bars">${Object.keys(kinds[0].parts).map((part) => html`<li><span class=${`swatch ${swatch(part)}`} aria-hidden="true"></span> ${part}</li>`)}</ul>
  </figure>`;
}

// The cards whose labels do not overlap; larger cards take precedence.
function named(cards, most) {
  const shown = [];
  for (const card of [...cards].reverse()) if (!shown.length || (shown[0] - card) * GB > 0.055 * most) shown.unshift(card);
  return shown;
}

function fit({ fits }, devices) {
  if (!fits.length) return "does not fit on any of these cards";
  return `fits on ${devices > 1 ? `${devices} cards` : "one card"} of ${listed(fits, "or")} GB`;
}

function fewest({ fewest: found }) {
  const enough = found.filter(([, count]) => count).map(([card, count]) => `${count} × ${card} GB`);
  return enough.length ? `Fewest cards (1, 2, 4 or 8): ${listed(enough, "or")}` : "Eight cards of 80 GB are not enough.";
}

function Parts({ data }) {
  const { prompt, answer, at_once } = data.sequence;
  return html`<details><summary>All numbers and assumptions</summary>
    <${Table} caption="Peak memory per device, by part" head=${["Part", ...data.kinds.map((kind) => kind.title)]}>
      ${Object.keys(data.kinds[0].parts).map((part) => html`<tr><th scope="row">${part}</th>${data.kinds.map((kind) => html`<td class="number">${kind.parts[part] ? size(kind.parts[part]) : "–"}</td>`)}</tr>`)}
      <tr><th scope="row"><strong>total</strong></th>${data.kinds.map((kind) => html`<td class="number"><strong>${size(kind.total)}</strong></td>`)}</tr></${Table}>
    <ul>
      <li>All numbers come from the planner behind <code>posttrain plan</code>; 1 GB is 2³⁰ bytes.</li>
      <li>With bfloat16, the weights include the float32 copy that the optimizer updates. Adam keeps two values per weight.</li>
      <li>The critic and the reward model are as large as the policy. The critic’s part contains its weights and optimizer state; its gradients
        count as gradients. The reward model is kept in float32.</li>
      <li>A sequence has ${prompt} prompt tokens and ${answer} answer tokens; one row or pair is computed at a time, and ${at_once} answers are sampled at once.</li>
      <li>Weights, gradients and optimizer state are sharded over the devices; each device keeps its own KV cache and activations.</li>
    </ul></details>`;
}

function Compared({ data }) {
  return html`<h2>Side by side</h2>
    <${Table} caption="What each algorithm needs, and where its answers come from" head=${["Algorithm", "Models in memory", "Data", "Online or offline", "Explores"]}>
      ${data.kinds.map((kind) => html`<tr><th scope="row"><strong>${kind.title}</strong></th>
        <td>${kind.held}: ${listed(Object.keys(kind.models).filter((role) => kind.models[role] === "held"))}</td>
        <td>${kind.data}</td><td>${kind.online ? "online" : "offline"}</td><td>${kind.explores}</td></tr>`)}</${Table}>
    <p class="note">Online: learns from answers that the current policy just sampled. Offline: learns from a fixed dataset.</p>`;
}
