// A run's episodes, searched on the server one page at a time; the URL holds the query.

import { Failed, address, ask, grouped, html, number, printable, useData, useEffect, useRef, useState, useTitle } from "./ui.js";

const PAGE = 40;
const ORDERS = {
  newest: "newest first", oldest: "oldest first", worst: "lowest reward first", best: "highest reward first",
  longest: "longest first", shortest: "shortest first", flat: "flat groups: all rewards equal",
};
const RESULTS = { any: "any result", passed: "passed", failed: "not passed", unscored: "could not be scored" };
const KINDS = { train: "training", eval: "held-out" };

export function Page({ run }) {
  useTitle(`Episodes of ${run}`);
  const [query, setQuery] = useState(location.search);
  useEffect(() => {
    const back = () => setQuery(location.search);
    addEventListener("popstate", back);
    return () => removeEventListener("popstate", back);
  }, []);
  const go = (fields) => {
    const next = new URLSearchParams(Object.entries(fields).filter(([, value]) => value !== "" && value !== null));
    const text = next.size ? `?${next}` : "";
    history.pushState(null, "", `${location.pathname}${text}`);
    setQuery(text);
  };
  const fields = Object.fromEntries(new URLSearchParams(query));
  return html`<p class="path"><a href="/runs">Runs</a> / <a href=${address("runs", run)}>${printable(run)}</a></p>
    <h1>Episodes</h1>
    <${Filters} key=${query} run=${run} fields=${fields} go=${go} />
    <${Results} run=${run} fields=${fields} go=${go} />`;
}

function Filters({ run, fields, go }) {
  const form = useRef(null);
  const send = (event) => {
    event?.preventDefault();
    const asked = Object.fromEntries(new FormData(form.current));
    go(asked.part ? asked : { ...asked, part: "", bound: "", limit: "" });
  };
  const choice = (name, label, known, usual) => html`<label>${label}<select name=${name} onChange=${send}>
    ${Object.entries(known).map(([value, text]) => html`<option value=${value} selected=${value === (fields[name] || usual)}>${text}</option>`)}</select></label>`;
  return html`<form class="filters" ref=${form} onSubmit=${send} role="search" aria-label="Episodes">
    ${choice("kind", "tasks", KINDS, "train")}${choice("order", "order", ORDERS, "newest")}${choice("result", "result", RESULTS, "any")}
    <label class="long">text in the prompt or completion<input type="search" name="text" value=${fields.text || ""} /></label>
    <label class="short">from step<input name="first" inputmode="numeric" pattern="[0-9]*" value=${fields.first || ""} /></label>
    <label class="short">to step<input name="last" inputmode="numeric" pattern="[0-9]*" value=${fields.last || ""} /></label>
    <${Part} run=${run} fields=${fields} />
    <button>Search</button></form>`;
}

// Filters by one part of the reward, submitted with the form's other fields. It loads the list of parts itself, so that
// text typed into the other fields survives when the list arrives.
function Part({ run, fields }) {
  const parts = useData(`/api${address("runs", run)}`).data?.parts || [];
  if (!parts.length) return null;
  const known = Object.fromEntries([["", "any part of the reward"], ...parts.map((name) => [name, printable(name)])]);
  const options = (all, chosen) => Object.entries(all).map(([value, text]) => html`<option value=${value} selected=${value === chosen}>${text}</option>`);
  return html`<label>part of the reward<select name="part">${options(known, fields.part || "")}</select></label>
    <label>is<select name="bound">${options({ most: "at most", least: "at least" }, fields.bound || "most")}</select></label>
    <label class="short">value<input name="limit" inputmode="decimal" pattern="-?[0-9]*[.]?[0-9]*" value=${fields.limit || "0"} /></label>`;
}

// Requests rows until a page is full or none are left; results are shown as they arrive.
function useSearch(run, fields) {
  const [found, set] = useState({ rows: [], looked: 0, total: 0, next: null, busy: true, error: "" });
  const stopped = useRef(false);
  const key = JSON.stringify(fields);
  useEffect(() => {
    let open = true;
    stopped.current = false;
    set({ rows: [], looked: 0, total: 0, next: null, busy: true, error: "" });
    (async () => {
      let rows = [];
      let start = fields.start || "0";
      while (open) {
        const page = await ask(`/api${address("runs", run)}/episodes?${new URLSearchParams({ ...fields, start })}`);
        rows = [...rows, ...page.rows];
        const busy = page.next !== null && rows.length < PAGE && !stopped.current;
        if (open) set({ ...page, rows, busy, error: "" });
        if (!busy) return;
        start = String(page.next);
      }
    })().catch((error) => open && set((old) => ({ ...old, busy: false, error: error.message })));
    return () => { open = false; };
  }, [run, key]);
  return [found, () => { stopped.current = true; }];
}

function Results({ run, fields, go }) {
  const [found, stop] = useSearch(run, fields);
  const what = fields.order === "flat" ? "groups" : "episodes";
  const { rows, busy, next, looked, total, error } = found;
  return html`
    <p class="soft" role="status" id="looked">${busy && !looked ? "Searching …"
      : `${rows.length} shown; searched ${grouped(looked)}${total === null ? "" : ` of ${grouped(total)}`} ${what}${busy ? " …" : "."}`}
      ${busy && looked > 0 && html` <button type="button" onClick=${stop}>Stop</button>`}</p>
    ${error && html`<${Failed} error=${error} />`}
    ${!busy && !rows.length && !error && html`<p class="box">${looked ? `None of the ${grouped(looked)} ${what} match. Try fewer filters, or the other tasks.` : `This run stored no ${what} of this kind.`}</p>`}
    <ol class="episodes">${rows.map((row) => html`<${Row} key=${`${row.step}.${row.group}.${row.index}`} run=${run} row=${row} />`)}</ol>
    ${!busy && next !== null && html`<p><button type="button" onClick=${() => { go({ ...fields, start: next }); scrollTo(0, 0); }}>Next page</button></p>`}`;
}

function Row({ run, row }) {
  const to = address("runs", run, "episodes", row.kind, row.step, row.group, row.index);
  const result = row.reward === null ? "! not scored" : row.passed ? "✓ passed" : "✗ not passed";
  return html`<li class="box">
    <h2><a href=${to}>step ${row.step}, task ${row.group}, completion ${row.index}</a></h2>
    <p class="soft">${result}${row.reward === null ? "" : ` · reward ${number(row.reward)}`}${row.advantage === null ? "" : ` · advantage ${number(row.advantage)}`}
      ${` · ${row.length} tokens`}${row.stop === "length" ? " · truncated" : ""}${row.answers ? ` · one of ${row.answers} completions with the same reward` : ""}</p>
    <p class="asked">${printable(row.prompt)}</p>
    <p class="said">${row.text ? printable(row.text) : "(empty)"}${row.cut ? " …" : ""}</p>
    ${row.error && html`<p class="note">${printable(row.error)}</p>`}</li>`;
}
