// A course exercise: a multiple-choice question, code that the server checks in its sandbox, or a task to explore.

import { Loaded, html, printable, useData, useRef, useState } from "./ui.js";
import { send } from "./controls.js";

const KINDS = { conceptual: "Question", coding: "Coding exercise", exploration: "Exploration" };
const keptAs = (name) => `posttrain-exercise-${name}`; // where the browser keeps a reader's code

// `Nodes` renders the course's text; it is passed in, because the course imports this module.
export function Exercise({ name, Nodes }) {
  const exercise = useData(`/api/exercises/${encodeURIComponent(name)}`);
  return html`<section class="exercise box" data-name=${name}><${Loaded} from=${exercise} of="the exercise">${(found) => html`
    <h3><span class="soft">${KINDS[found.kind]}: </span>${printable(found.title)}</h3>
    <${Nodes} of=${found.text} />
    ${found.choices && html`<${Question} ...${found} Nodes=${Nodes} />`}
    ${found.kind === "coding" && html`<${Coding} ...${found} />`}
    ${found.hint && html`<details><summary>Hint</summary><${Nodes} of=${found.hint} /></details>`}
    ${found.answer && html`<details><summary>${found.kind === "conceptual" ? "Full answer" : "What to look for"}</summary><${Nodes} of=${found.answer} /></details>`}`}</${Loaded}></section>`;
}

// [state, check, forget]: the latest verdict, the error of the request and whether one is in flight; a function that
// checks an answer; a function that clears the verdict.
function useVerdict(name) {
  const [state, set] = useState({ verdict: null, error: "", busy: false });
  const check = (answer) => {
    set((old) => ({ ...old, busy: true, error: "" }));
    send(`/api/exercises/${encodeURIComponent(name)}`, answer).then(
      (verdict) => set({ verdict, error: "", busy: false }),
      (error) => set({ verdict: null, error: error.message, busy: false }),
    );
  };
  return [state, check, () => set({ verdict: null, error: "", busy: false })];
}

// --- questions -------------------------------------------------------------------------------------------------------

function Question({ name, choices, Nodes }) {
  const [chosen, choose] = useState(-1);
  const [state, check, forget] = useVerdict(name);
  const asked = (event) => { event.preventDefault(); if (chosen >= 0) check({ choice: chosen }); };
  return html`<form onSubmit=${asked}>
    <fieldset class="options"><legend>Choose one</legend>${choices.map((text, i) => html`
      <label class=${i === chosen ? "chosen" : ""}><input type="radio" name=${name} value=${i} checked=${i === chosen} onChange=${() => { choose(i); forget(); }} />
        <span><${Nodes} of=${text} /></span></label>`)}</fieldset>
    <button type="submit" disabled=${chosen < 0 || state.busy}>Check</button>
    <div class="told" role="status">${state.error && html`<p>✗ ${printable(state.error)}</p>`}
      ${state.verdict && html`<p class=${state.verdict.passed ? "good" : "bad"}><strong>${state.verdict.passed ? "✓ Correct." : "✗ Incorrect."}</strong> <${Nodes} of=${state.verdict.why} /></p>`}</div>
  </form>`;
}

// --- code ------------------------------------------------------------------------------------------------------------

function Coding({ name, template, file, tests, command }) {
  const [code, keep] = useState(() => localStorage.getItem(keptAs(name)) ?? template);
  const [state, check] = useVerdict(name);
  const field = useRef(null);
  const write = (text) => { keep(text); localStorage.setItem(keptAs(name), text); };
  const restart = () => { if (code === template || confirm("Discard your code and start over?")) { keep(template); localStorage.removeItem(keptAs(name)); field.current.focus(); } };
  const pressed = (event) => {
    if (event.key !== "Enter" || event.altKey || event.isComposing) return;
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) check({ code: event.target.value });
    else newLine(event.target);
  };
  return html`<div class="coding">
    <label class="code-label" for=${`code-${name}`}>Your code <span class="soft">(Ctrl+Enter checks it; Tab leaves the field)</span></label>
    <textarea id=${`code-${name}`} ref=${field} class="editor" rows=${Math.min(30, code.split("\n").length + 1)} spellcheck="false" autocapitalize="off"
      autocomplete="off" wrap="off" value=${code} onInput=${(event) => write(event.target.value)} onKeyDown=${pressed}></textarea>
    <p class="actions"><button type="button" disabled=${state.busy} onClick=${() => check({ code })}>Check my code</button>
      <button type="button" class="quiet" onClick=${restart}>Start over</button>
      <button type="button" class="quiet" onClick=${() => download(file, code + tests)}>Download with tests</button></p>
    <div class="told" role="status">
      ${state.busy && html`<p class="waiting">Running your code in the sandbox …</p>`}
      ${state.error && html`<p class="bad">✗ ${printable(state.error)}</p>`}
      ${state.verdict && !state.busy && html`<${Checks} ...${state.verdict} command=${command} />`}
    </div>
  </div>`;
}

function Checks({ passed, checks, output, unavailable, command }) {
  if (unavailable) return html`<p><strong>Your code cannot run here.</strong> ${printable(unavailable)} Download the file and run <code>${command}</code>.</p>`;
  const right = checks.filter((check) => check.passed).length;
  return html`<p class=${passed ? "good" : "bad"}><strong>${passed ? "✓ Passed." : "✗ Not yet."}</strong> ${right} of ${checks.length} checks pass.</p>
    <ul class="cases">${checks.map((check) => html`<li class=${check.passed ? "good" : "bad"}><span class="sign" aria-hidden="true">${check.passed ? "✓" : "✗"}</span>
      <span><strong>${check.passed ? "passed" : "failed"}:</strong> ${printable(check.name)}${check.detail && html`<br /><span class="soft">${printable(check.detail)}</span>`}</span></li>`)}</ul>
    ${output && html`<p class="soft">Output of your code:</p><pre class="code" tabindex="0">${output.split("\n").map(printable).join("\n")}</pre>`}`;
}

// Inserts a new line with the same indent, one level deeper after a colon. execCommand keeps the browser's undo.
function newLine(field) {
  const before = field.value.slice(0, field.selectionStart).split("\n").at(-1);
  const deep = before.match(/^ */)[0] + (before.trimEnd().endsWith(":") ? "    " : "");
  document.execCommand("insertText", false, `\n${deep}`);
}

function download(file, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/x-python" }));
  link.download = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
