// Shared by every page: the page frame, requests to the server, loading and error states, and formatting.
// Text from runs is only ever a text node; no code in the lab sets markup from data.

export { html, render, useState, useEffect, useRef, useMemo } from "./vendor/preact-htm.js";
import { html, useState, useEffect } from "./vendor/preact-htm.js";

export const TOKEN = document.querySelector("meta[name=lab-token]").content;

const SECTIONS = [["/learn", "Learn"], ["/explore", "Explore"], ["/runs", "Runs"], ["/label", "Label"], ["/chat", "Chat"]];

export function Shell({ children }) {
  const here = location.pathname;
  const link = (to, text, current) => html`<a href=${to} aria-current=${current ? "page" : null}>${text}</a>`;
  return html`
    <a class="skip" href="#main">Skip to main content</a>
    <header class="top"><nav aria-label="Lab">
      <a class="brand" href="/" aria-current=${here === "/" ? "page" : null}>posttrain <span>lab</span></a>
      ${SECTIONS.map(([to, text]) => link(to, text, here === to || here.startsWith(`${to}/`)))}
    </nav></header>
    <main id="main" tabindex="-1">${children}</main>`;
}

export function Missing() {
  useTitle("Page not found");
  return html`<h1>Page not found</h1>
    <p>The lab has no page at <code>${printable(location.pathname)}</code>. <a href="/runs">See all runs.</a></p>`;
}

export function useTitle(title) {
  useEffect(() => { document.title = `${printable(title)} · posttrain lab`; }, [title]);
}

// --- requests --------------------------------------------------------------------------------------------------------

export async function ask(path, { headers, ...more } = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...more, headers: { "x-lab-token": TOKEN, ...headers } });
  } catch {
    throw new Error("The lab is not responding. If it was closed, start it again with `posttrain lab`.");
  }
  return understood(answer.ok, answer.status, await answer.json().catch(() => ({})));
}

// The response body; throws the lab's own error message if the request failed.
export function understood(ok, status, body) {
  if (!ok) throw new Error(body.error || `The lab returned HTTP status ${status}.`);
  return body;
}

// {data, error, again}: the data at `path`, the error message if loading failed, and a function that reloads.
export function useData(path, every = 0) {
  const [state, set] = useState({ data: null, error: "" });
  const [count, setCount] = useState(0);
  useEffect(() => {
    let open = true;
    const load = () => ask(path).then(
      (data) => open && set({ data, error: "" }),
      (error) => open && set((old) => ({ data: old.data, error: error.message })),
    );
    load();
    const timer = every && setInterval(() => document.hidden || load(), every);
    return () => { open = false; clearInterval(timer); };
  }, [path, count]);
  return { ...state, again: () => setCount(count + 1) };
}

export function Waiting({ of }) {
  return html`<p class="waiting" role="status">Loading ${of} …</p>`;
}

export function Failed({ error, again }) {
  return html`<div class="box failed" role="alert"><p><strong>✗ Something went wrong.</strong> ${printable(error)}</p>
    ${again && html`<button type="button" onClick=${again}>Try again</button>`}</div>`;
}

// Shows the content once it has loaded; until then a loading message or the error. Always a single element: Preact may
// move a component's next sibling in front of it when its number of elements changes.
export function Loaded({ from, of, children }) {
  const missing = from.data === null;
  return html`<div>${from.error && html`<${Failed} ...${from} />`}
    ${missing && !from.error && html`<${Waiting} of=${of} />`}${!missing && children(from.data)}</div>`;
}

// --- formatting ------------------------------------------------------------------------------------------------------

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

// Makes control characters and characters that reorder or hide text visible.
export function printable(text) {
  return String(text ?? "").replace(HIDDEN, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

export const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
export const grouped = (value) => Number(value).toLocaleString("en-GB").replaceAll(",", " ");
export const address = (...parts) => parts.map((part) => `/${encodeURIComponent(part)}`).join("");

const MARKS = {
  running: ["▶", "running"], finished: ["✓", "finished"], interrupted: ["❚❚", "interrupted"], damaged: ["✗", "damaged"],
  alarm: ["✗", "alarm"], warn: ["!", "warn"], ok: ["✓", "ok"], "no data": ["–", "no data"],
  error: ["✗", "error"], warning: ["!", "warning"], info: ["·", "info"],
};

// A status as a symbol and a word; the colour only repeats them.
export function Mark({ of }) {
  const [sign, word] = MARKS[of] || ["·", of];
  return html`<span class=${`mark ${of.replace(" ", "-")}`}><span aria-hidden="true">${sign}</span> ${word}</span>`;
}

// A table that scrolls sideways if it is wider than the page.
export function Table({ caption, head, children }) {
  return html`<div class="scroll" role="region" tabindex="0" aria-label=${caption}><table>
    <caption>${caption}</caption>
    <thead><tr>${head.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
    <tbody>${children}</tbody></table></div>`;
}

export function Command({ children }) {
  return html`<pre class="command"><code>${children}</code></pre>`;
}
