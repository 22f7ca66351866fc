// Shared by the explorers: state kept in the URL, keyboard-accessible controls, numbers computed by the server, bars and
// formulas.

import { askQuickly } from "./asking.js";
import { ask, html, printable, useEffect, useRef, useState } from "./ui.js";
import { useLayoutEffect } from "./vendor/preact-htm.js";

// --- state -----------------------------------------------------------------------------------------------------------

// [state, set]: an object kept in the URL's query, so that a link restores the same page. `defaults` lists every key,
// and the type of a default decides how its value is parsed; default values are left out. `set({key: value})` merges.
export function useAddress(defaults) {
  const [state, keep] = useState(() => read(defaults));
  const set = (change) => keep((old) => {
    const next = { ...old, ...change };
    const query = new URLSearchParams();
    for (const key of Object.keys(defaults)) if (String(next[key]) !== String(defaults[key])) query.set(key, next[key]);
    history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}${location.hash}`);
    return next;
  });
  return [state, set];
}

function read(defaults) {
  const query = new URLSearchParams(location.search);
  return Object.fromEntries(Object.entries(defaults).map(([key, value]) => {
    const given = query.get(key);
    if (given === null) return [key, value];
    if (typeof value === "boolean") return [key, given === "true"];
    if (typeof value === "number") return [key, given !== "" && Number.isFinite(Number(given)) ? Number(given) : value];
    if (Array.isArray(value)) return [key, given === "" ? [] : given.split(",").map(Number)];
    return [key, given];
  }));
}

// --- the server ------------------------------------------------------------------------------------------------------

// Writes to the lab: POSTs one object with this launch's token.
export const send = (path, body = {}) => ask(path, { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } });

// {data, error, stale}: what the server computes for `path`. The old result stays until the new one arrives. Only one
// request is in flight at a time; of several changes in a row only the latest is requested.
export function useComputed(path) {
  const [state, set] = useState({ data: null, error: "", stale: true });
  const wanted = useRef(path);
  const busy = useRef(false);
  const here = useRef(true);
  useEffect(() => () => { here.current = false; }, []);
  useLayoutEffect(() => { // sends the request before the page is painted; waiting would cost a frame
    wanted.current = path;
    const load = async () => {
      busy.current = true;
      const asked = wanted.current;
      const news = await askQuickly(asked).then((data) => ({ data, error: "" }), (error) => ({ error: error.message }));
      busy.current = false;
      if (!here.current) return;
      const stale = wanted.current !== asked;
      set((old) => ({ ...old, ...news, stale }));
      if (stale) load();
    };
    if (!busy.current) load();
  }, [path]);
  return state;
}

// --- controls --------------------------------------------------------------------------------------------------------

// Radio buttons side by side; arrow keys move through them.
export function Choice({ legend, name, options, value, onChange }) {
  return html`<fieldset class="choice"><legend>${legend}</legend>${options.map(([key, text]) => html`
    <label class=${key === value ? "chosen" : ""}><input type="radio" name=${name} value=${key} checked=${key === value}
      onChange=${() => onChange(key)} />${text}</label>`)}</fieldset>`;
}

// (The input has its own aria-label, because a label names its first control, which here is the output.)
export function Slider({ label, name, min, max, step, value, onChange, text = String(value) }) {
  return html`<label class="slider"><span>${label} <output>${text}</output></span>
    <input type="range" name=${name} min=${min} max=${max} step=${step} value=${value} aria-label=${label} aria-valuetext=${text}
      onInput=${(event) => onChange(Number(event.target.value))} /></label>`;
}

export function Toggle({ label, name, value, onChange }) {
  return html`<label class="toggle"><input type="checkbox" name=${name} checked=${value} onChange=${(event) => onChange(event.target.checked)} /> ${label}</label>`;
}

// A bar from zero that fills `share` of its track (of half the track if signed), with the number beside it.
export function Bar({ share, text, signed = false, series = 0 }) {
  const width = `${Math.min(1, Math.abs(share)) * (signed ? 50 : 100)}%`;
  const left = signed ? (share < 0 ? `${50 - Math.min(1, -share) * 50}%` : "50%") : "0";
  return html`<span class=${`bar ${signed ? "signed" : ""}`}><span class="track" aria-hidden="true"><span class=${`fill series-${series} ${share < 0 ? "minus" : ""}`} style=${{ width, left }}></span></span>
    <span class="number">${text}</span></span>`;
}

// --- formulas --------------------------------------------------------------------------------------------------------

let katex = null;

function loadKatex() {
  if (!katex) {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = "/static/vendor/katex.css";
    document.head.append(style);
    katex = import("./vendor/katex.js").then(() => self.katex);
  }
  return katex;
}

// Renders a TeX formula, always the lab's own text, with MathML beside it for screen readers.
export function Formula({ tex, display = false }) {
  const place = useRef(null);
  const [drawn, setDrawn] = useState(Boolean(self.katex)); // so that no state is set during the first render
  useLayoutEffect(() => { // before the page is painted: a formula changes together with the numbers beside it
    let open = true;
    const draw = () => {
      if (!open) return;
      self.katex.render(tex, place.current, { displayMode: display, throwOnError: false });
      setDrawn(true);
    };
    if (self.katex) draw();
    else loadKatex().then(draw);
    return () => { open = false; };
  }, [tex, display]);
  const inside = html`<span ref=${place}></span>${!drawn && html`<code>${printable(tex)}</code>`}`;
  return display ? html`<div class="formula display" tabindex="0" role="group" aria-label="Formula">${inside}</div>` : html`<span class="formula">${inside}</span>`;
}
