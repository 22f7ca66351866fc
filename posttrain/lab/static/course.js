// A chapter of the course, rendered from its node tree in the layer that the reader chose.

import { Failed, Loaded, html, printable, useData, useEffect, useRef, useState, useTitle } from "./ui.js";
import { Choice, Formula, useAddress } from "./controls.js";
import { EXPLORERS } from "./explore.js";

export const LAYERS = [
  ["intuition", "Intuition", "The idea in plain words; no formulas needed."],
  ["mathematics", "Mathematics", "Definitions and derivations, each formula worked through with numbers."],
  ["implementation", "Implementation", "The functions of this library that compute it, and commands that run it."],
  ["all", "All", "All three layers, one after the other."],
];
const NAMES = Object.fromEntries(LAYERS.map(([key, name]) => [key, name]));
const KEPT = "posttrain-layer"; // where the browser remembers the layer

export function Page({ chapter }) {
  const course = useData("/api/course");
  const text = useData(`/api/course/${encodeURIComponent(chapter)}`);
  return html`<${Loaded} from=${text} of="the chapter">${(found) => html`<${Chapter} ...${found} all=${course.data || []} />`}</${Loaded}>`;
}

// --- layers ----------------------------------------------------------------------------------------------------------

// [layer, choose]: the layer from the URL, else the one read last, else the first. A link opens the same layer.
function useLayer() {
  const [state, set] = useAddress({ layer: "" });
  const known = (name) => (name in NAMES ? name : "");
  const layer = known(state.layer) || known(localStorage.getItem(KEPT)) || "intuition";
  const choose = (name) => {
    const anchor = nearest();
    localStorage.setItem(KEPT, name);
    set({ layer: name });
    if (anchor) requestAnimationFrame(() => requestAnimationFrame(() => scrollBy(0, anchor.node.getBoundingClientRect().top - anchor.top)));
  };
  return [layer, choose];
}

// The section being read and its position in the window, which is kept when the layer changes.
function nearest() {
  const begun = [...document.querySelectorAll(".chapter section > h2")].filter((node) => node.getBoundingClientRect().top < innerHeight / 2);
  const node = begun.at(-1);
  return node && scrollY > 0 ? { node, top: Math.max(node.getBoundingClientRect().top, 120) } : null;
}

// Arrow keys switch layers unless another element handles them.
function useArrows(layer, choose) {
  const now = useRef(layer); // keys may arrive faster than the page is painted
  now.current = layer;
  useEffect(() => {
    const pressed = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
      if (event.target !== document.body && event.target.id !== "main") return;
      event.preventDefault();
      const at = LAYERS.findIndex(([key]) => key === now.current);
      now.current = LAYERS[(at + step + LAYERS.length) % LAYERS.length][0];
      choose(now.current);
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}

// --- a chapter -------------------------------------------------------------------------------------------------------

function Chapter({ name, title, lead, sections, sources, words, all }) {
  useTitle(title);
  const [layer, choose] = useLayer();
  useArrows(layer, choose);
  useEffect(() => {
    if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  }, []);
  const at = all.findIndex((one) => one.name === name);
  return html`<article class=${`chapter show-${layer}`}>
    <p class="path"><a href="/learn">Learn</a> / chapter ${at < 0 ? "" : at + 1}</p>
    <h1>${printable(title)}</h1>
    <div class="lead"><${Nodes} of=${lead} /></div>
    <div class="switch"><${Choice} legend="Layer (← →)" name="layer" value=${layer} onChange=${choose}
      options=${LAYERS.map(([key, text]) => [key, text])} /></div>
    <div class="columns">
      <nav class="contents" aria-label="Sections"><details open=${innerWidth > 900}><summary>In this chapter</summary>
        <ol>${sections.map((one) => html`<li><a href=${`#${one.id}`}>${printable(one.title)}</a></li>`)}
          ${sources.length > 0 && html`<li><a href="#sources">Sources</a></li>`}</ol>
        ${layer !== "all" && html`<p class="note">${words[layer]} words in this layer</p>`}</details></nav>
      <div class="text">
        ${sections.map((one) => html`<section id=${one.id} aria-labelledby=${`${one.id}-title`}><h2 id=${`${one.id}-title`}>${printable(one.title)}</h2>
          ${one.parts.map((part) => html`<${Part} ...${part} />`)}</section>`)}
        ${sources.length > 0 && html`<section id="sources"><h2>Sources</h2><ol class="sources">${sources.map((one) => html`
          <li id=${`source-${one.name}`}><${Nodes} of=${one.children} /></li>`)}</ol></section>`}
        <${Onward} all=${all} at=${at} />
      </div>
    </div>
  </article>`;
}

function Part({ layer, children }) {
  if (!layer) return html`<${Nodes} of=${children} />`;
  return html`<div class=${`layer ${layer}`}><p class="which">${NAMES[layer]}</p><${Nodes} of=${children} /></div>`;
}

function Onward({ all, at }) {
  const link = (one, sign) => one && html`<a class="button" href=${`/learn/${one.name}`}>${sign === "←" && "← "}${printable(one.title)}${sign === "→" && " →"}</a>`;
  return at < 0 ? "" : html`<nav class="onward" aria-label="Chapters">${link(all[at - 1], "←")}${link(all[at + 1], "→")}</nav>`;
}

// --- nodes -----------------------------------------------------------------------------------------------------------

const PLAIN = new Set(["p", "em", "strong", "ul", "ol", "li", "blockquote", "code", "thead", "tbody", "tr", "td", "hr", "br", "h3"]);
const SPECIAL = {
  formula: ({ tex, display }) => html`<${Formula} tex=${tex} display=${display} />`,
  note: ({ name, number }) => html`<sup class="ref"><a href=${`#source-${name}`} aria-label=${`source ${number}`}>${number}</a></sup>`,
  a: ({ href, children }) => html`<a href=${href} rel="noreferrer"><${Nodes} of=${children} /></a>`,
  th: ({ children }) => (children.length ? html`<th scope="col"><${Named} as=${spoken(children)}><${Nodes} of=${children} /></${Named}></th>` : html`<td></td>`),
  table: ({ children }) => html`<div class="scroll" role="group" tabindex="0" aria-label="Table"><table><${Nodes} of=${children} /></table></div>`,
  pre: ({ children }) => html`<pre class="code" tabindex="0"><${Nodes} of=${children} /></pre>`,
  command: ({ children }) => html`<pre class="command" tabindex="0"><code>${children.map(printable)}</code></pre>`,
  source: (node) => html`<${Source} ...${node} />`,
  worked: ({ name }) => html`<${Worked} name=${name} />`,
  explore: ({ name }) => html`<${Explore} name=${name} />`,
  exercise: ({ name }) => html`<${Ahead} name=${name} />`,
};

export function Nodes({ of }) {
  return of.map((node) => {
    if (typeof node === "string") return printable(node);
    if (node.tag in SPECIAL) return SPECIAL[node.tag](node);
    if (!PLAIN.has(node.tag)) return html`<code>${printable(node.tag)}</code>`;
    return html`<${node.tag}>${node.children && node.children.length > 0 && html`<${Nodes} of=${node.children} />`}</${node.tag}>`;
  });
}

// The source of an installed function, with its file and line.
function Source({ name, file, line, code }) {
  return html`<figure class="source" data-name=${name}><figcaption><code>${printable(file)}</code> <span class="soft">from line ${line}</span></figcaption>
    <pre class="code" tabindex="0" role="group" aria-label=${`Source of ${name}`}><code>${printable(code)}</code></pre></figure>`;
}

// A worked example, whose numbers the library computes when the page loads.
function Worked({ name }) {
  const worked = useData(`/api/worked/${encodeURIComponent(name)}`);
  return html`<div class="worked box" data-name=${name}><${Loaded} from=${worked} of="the numbers">${(found) => html`
    <h3><span class="soft">Worked example: </span>${printable(found.title)}</h3>
    <p>${printable(found.given)}</p>
    ${found.steps.length > 0 && html`<ol class="steps">${found.steps.map((step) => html`<li>${step.says && html`<p>${printable(step.says)}</p>`}
      <${Formula} display=${true} tex=${[step.tex, step.filled, step.result].filter(Boolean).join(" \\;=\\; ")} /></li>`)}</ol>`}
    ${found.rows.length > 0 && html`<div class="scroll" role="group" tabindex="0" aria-label=${`Numbers for: ${found.title}`}><table>
      <thead><tr>${found.head.map((text) => html`<th scope="col"><${Named} as=${plain(text)}><${Mixed} text=${text} /></${Named}></th>`)}</tr></thead>
      <tbody>${found.rows.map((row) => html`<tr>${row.map((text, i) => (i === 0 ? html`<th scope="row"><${Named} as=${plain(text)}><${Mixed} text=${text} /></${Named}></th>` : html`<td class="number"><${Mixed} text=${text} /></td>`))}</tr>`)}</tbody></table></div>`}
    ${found.after && html`<p>${printable(found.after)}</p>`}
    <p class="note">Computed by ${found.calls.map((call, i) => html`${i > 0 && ", "}<code>${printable(call)}</code>`)}</p>`}</${Loaded}></div>`;
}

// A row or column header; screen readers get plain text in place of a formula.
function Named({ as, children }) {
  return html`<span class="unseen">${printable(as)}</span><span aria-hidden="true">${children}</span>`;
}

// TeX as plain text for screen readers.
function plain(tex) {
  return tex.replace(/\\(text|mathrm|mathbb|hat|bar|frac|tfrac|,|;|\s)/g, " ").replace(/[\\{}$]/g, "").replace(/\s+/g, " ").trim();
}

const spoken = (children) => children.map((one) => (typeof one === "string" ? one : one.tex ? plain(one.tex) : spoken(one.children || []))).join("");

// A table cell: a formula if it is enclosed in dollar signs, else text.
function Mixed({ text }) {
  return /^\$.*\$$/.test(text) ? html`<${Formula} tex=${text.slice(1, -1)} />` : printable(text).replace(/^-(?=\d)/, "−");
}

function Explore({ name }) {
  const [, title, question] = EXPLORERS.find(([key]) => key === name);
  return html`<aside class="explorer box" aria-label=${`Explorer: ${title}`}><p><strong>Try it: ${title}</strong></p><p>${question}</p>
    <p><a class="button" href=${`/explore/${name}`}>Open the explorer</a></p></aside>`;
}

// Loads the module for exercises only in chapters that have one.
function Ahead({ name }) {
  const [state, set] = useState({ Exercise: null, error: "" });
  const here = useRef(true);
  useEffect(() => {
    import("./course-exercise.js").then(
      ({ Exercise }) => here.current && set({ Exercise, error: "" }),
      () => here.current && set({ Exercise: null, error: "Could not load the exercises. Reload the page." }),
    );
    return () => { here.current = false; };
  }, []);
  if (state.error) return html`<${Failed} error=${state.error} />`;
  return state.Exercise ? html`<${state.Exercise} name=${name} Nodes=${Nodes} />` : html`<p class="waiting" role="status">Loading the exercise …</p>`;
}
