// Why people compare instead of rate: rate the same answers from 1 to 10, and see whether the ratings match the choices.

import { Table, html, number, printable, useEffect, useRef, useState } from "./ui.js";

const PAIRS = 3;
const ORDER = [[0, "left"], [1, "right"], [2, "left"], [0, "right"], [2, "right"], [1, "left"]];
const MARKS = Array.from({ length: 10 }, (_, i) => i + 1);

export function Rating({ pairs, labels, seconds }) {
  const [given, setGiven] = useState([]); // [{mark, seconds}] in ORDER
  const [open, setOpen] = useState(false);
  const shownAt = useRef(performance.now());
  useEffect(() => { shownAt.current = performance.now(); }, [given.length, open]);
  const rate = (mark) => setGiven((old) => [...old, { mark, seconds: (performance.now() - shownAt.current) / 1000 }]);
  const again = () => { setGiven([]); setOpen(true); };
  return html`<section class="rating"><h2>Why not just rate?</h2>
    <p>A rating from 1 to 10 seems to say more than a choice. But a rating needs a scale, and yours drifts from answer to answer and differs
      from everyone else's. A choice needs none, because both answers are in front of you. Try it.</p>
    ${labels.length < PAIRS ? html`<p class="soft">First compare ${PAIRS} pairs above; then rate the same ${2 * PAIRS} answers one by one.</p>`
    : !open ? html`<p><button type="button" class="quiet" onClick=${again}>Rate the answers of your first ${PAIRS} pairs</button></p>`
    : given.length < ORDER.length ? html`<${Rate} pairs=${pairs} at=${given.length} rate=${rate} />`
    : html`<${Compared} pairs=${pairs} labels=${labels} seconds=${seconds} given=${given} /><p><button type="button" class="quiet" onClick=${again}>Rate them again</button></p>`}</section>`;
}

function Rate({ pairs, at, rate }) {
  const [pair, side] = ORDER[at];
  return html`<div class="box" data-keys><p class="note">Answer ${at + 1} of ${ORDER.length}, to: ${printable(pairs[pair].prompt)}</p>
    <p class="said">${printable(pairs[pair][side])}</p>
    <div class="marks" role="group" aria-label="Your rating, 10 is best">${MARKS.map((mark) => html`<button type="button" class="quiet" onClick=${() => rate(mark)}>${mark}</button>`)}</div></div>`;
}

function Compared({ pairs, labels, seconds, given }) {
  const mark = (pair, side) => given[ORDER.findIndex(([p, s]) => p === pair && s === side)].mark;
  const rows = [0, 1, 2].map((pair) => {
    const [left, right] = [mark(pair, "left"), mark(pair, "right")];
    const rated = left === right ? "0" : left > right ? "1" : "2";
    return { pair, left, right, rated, said: labels[pair] };
  });
  const same = rows.filter(({ rated, said }) => rated === said).length;
  const words = { 0: "tie", 1: "A", 2: "B" };
  const known = seconds.slice(0, PAIRS).filter((value) => value !== undefined);
  return html`<${Table} caption="Your choices, and what your ratings say about the same pairs" head=${["prompt", "you chose", "ratings of A and B", "the ratings say", ""]}>
      ${rows.map(({ pair, left, right, rated, said }) => html`<tr><td>${printable(pairs[pair].prompt)}</td><td>${words[said]}</td><td class="number">${left} and ${right}</td>
        <td>${words[rated]}</td><td>${rated === said ? "✓ same" : rated === "0" ? "equal ratings" : "✗ different"}</td></tr>`)}</${Table}>
    <p role="status">Your ratings agree with your choices on ${same} of ${PAIRS} pairs. A rating took you ${number(middle(given.map((one) => one.seconds)), 2)} s, and a pair needs two of them${known.length
      ? html`; a choice took you ${number(middle(known), 2)} s` : ""}.</p>`;
}

function middle(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
