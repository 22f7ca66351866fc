// The labeler: which of two answers is better? Keys 1, 2, 0 and u. Labels wait in the browser until the lab stores them.

import { Failed, Loaded, Table, address, ask, html, printable, useData, useEffect, useRef, useState, useTitle } from "./ui.js";
import { send, useAddress } from "./controls.js";
import { newId, unsent, useOutbox } from "./label-outbox.js";
import { Results } from "./label-results.js";

const NAME = "posttrain-annotator";
const LOW = 6; // below this number of pairs on the page, more are requested

export function Page({ queue }) {
  return queue ? html`<${Labelling} queue=${queue} />` : html`<${Queues} />`;
}

// --- all queues ------------------------------------------------------------------------------------------------------

function Queues() {
  useTitle("Label");
  const found = useData("/api/label", 5000);
  const [error, setError] = useState("");
  const start = (source) => send("/api/label", { source }).then(
    (made) => location.assign(address("label", made.queue)), (failed) => setError(failed.message));
  return html`<h1>Label</h1>
    <p class="lead">Choose the better of two answers. Your labels can train a reward model, or a policy with DPO.</p>
    ${error && html`<${Failed} error=${error} />`}
    <${Loaded} from=${found} of="the queues">${({ folder, queues, sources }) => html`
      ${queues.length > 0 && html`<section><h2>Queues</h2>
        <${Table} caption="Labelling queues" head=${["queue", "source", "pairs", "labelled"]}>${queues.map((one) => html`<tr>
          <th scope="row"><a href=${address("label", one.name)}>${printable(one.name)}</a></th><td>${printable(one.source)}</td>
          <td class="number">${one.pairs}</td><td>${Object.entries(one.done).map(([who, n]) => `${printable(who)} ${n}`).join(", ") || "none yet"}</td></tr>`)}</${Table}></section>`}
      ${sources.length > 0 && html`<section><h2>Start a queue</h2>
        <${Table} caption="Files of pairs, and runs that stored several completions per task" head=${["source", "type", "start"]}>${sources.map(({ source, kind, name }) => html`<tr>
          <th scope="row">${printable(name)}</th><td>${kind === "run" ? "completions of a run" : "pairs in a file"}</td>
          <td><button type="button" onClick=${() => start(source)} aria-label=${`Label ${printable(name)}`}>Label</button></td></tr>`)}</${Table}></section>`}
      ${!queues.length && !sources.length && html`<div class="box empty"><h2>There is nothing to label yet</h2>
        <p>Put a file such as <code>pairs.jsonl</code> into <code>${printable(folder)}</code>, with one row per pair:</p>
        <pre class="command"><code>{"prompt": "What is 2+3?", "a": "5", "b": "It is 5."}</code></pre>
        <p>Rows with <code>chosen</code> and <code>rejected</code>, or with a list of <code>responses</code>, also work. You can also
          label the completions of a run that samples several per task.</p></div>`}`}</${Loaded}>`;
}

// --- one queue -------------------------------------------------------------------------------------------------------

function Labelling({ queue }) {
  useTitle(`Label ${queue}`);
  const [at, setAt] = useAddress({ as: "" });
  const found = useData(`/api${address("label", queue)}?as=${encodeURIComponent(at.as)}`);
  return html`<p class="path"><a href="/label">Label</a></p><h1>${printable(queue)}</h1>
    <${Loaded} from=${found} of="the queue">${(state) => at.as
      ? state.name === queue && html`<${Desk} key=${at.as} first=${state} queue=${queue} who=${at.as} leave=${() => setAt({ as: "" })} />`
      : html`<${WhoAreYou} onName=${(as) => setAt({ as })} />`}</${Loaded}>`;
}

function WhoAreYou({ onName }) {
  const [name, setName] = useState(localStorage.getItem(NAME) || "");
  const go = (event) => {
    event.preventDefault();
    if (!name.trim()) return;
    localStorage.setItem(NAME, name.trim());
    onName(name.trim());
  };
  return html`<form class="who-are-you" onSubmit=${go}>
    <p>Labels are stored under your name, so that agreement between people can be measured. The name stays in this folder.</p>
    <label>Your name<input name="annotator" maxlength="60" required value=${name} onInput=${(event) => setName(event.target.value)} /></label>
    <button type="submit">Start labelling</button></form>`;
}

// The labelling page of one annotator. Nothing here waits for the lab: the next pair is shown at once.
function Desk({ first, queue, who, leave }) {
  const [pairs, setPairs] = useState(first.next);
  const [done, setDone] = useState(first.done[who] || 0);
  const [heard, setHeard] = useState(0);
  const given = useRef([]); // what can be undone: [{id, pair}], newest last
  const said = useRef(new Set(unsent(queue).map(([, body]) => body.pair))); // pairs labelled on this page, even if an older response still lists them
  const shownAt = useRef(performance.now());
  useEffect(() => { if (first.last) given.current = [first.last]; }, []);

  const acts = useRef(0);
  const refresh = () => {
    const before = acts.current;
    return ask(`/api${address("label", queue)}?as=${encodeURIComponent(who)}`).then((state) => {
      if (acts.current === before && !unsent(queue).length) setDone(state.done[who] || 0); // else the response is outdated
      setPairs((old) => merged(old, state.next.filter((pair) => !said.current.has(pair.id))));
      setHeard((count) => count + 1);
    }, () => {}); // the outbox reports that the lab is gone
  };
  const outbox = useOutbox(queue, refresh);
  const current = pairs.find((pair) => !said.current.has(pair.id));
  useEffect(() => { shownAt.current = performance.now(); }, [current?.id]);

  const choose = (choice) => {
    if (!current || said.current.has(current.id)) return; // a second press before the next pair is shown
    const id = newId();
    acts.current += 1;
    said.current.add(current.id);
    given.current.push({ id, pair: current });
    setPairs((old) => old.filter((pair) => pair.id !== current.id));
    setDone((count) => count + 1);
    outbox.put({ id, pair: current.id, annotator: who, choice, seconds: (performance.now() - shownAt.current) / 1000 });
  };
  const undo = () => {
    const last = given.current.pop();
    if (!last) return;
    acts.current += 1;
    said.current.delete(last.pair.id);
    setPairs((old) => [last.pair, ...old.filter((pair) => pair.id !== last.pair.id)]);
    setDone((count) => Math.max(0, count - 1));
    outbox.put({ undo: last.id });
  };
  useKeys({ 1: () => choose("left"), 2: () => choose("right"), 0: () => choose("tie"), u: undo });
  useEffect(() => { if (pairs.length < LOW && !outbox.waiting && done + pairs.length < first.pairs) refresh(); }, [pairs.length]);

  return html`<div>
    <p class="soft">Labelling as <strong>${printable(who)}</strong>. <button type="button" class="as-link" onClick=${leave}>Switch annotator</button></p>
    <div class="progress"><progress max=${first.pairs} value=${done} aria-label="Pairs labelled"></progress>
      <span class="number">${done} of ${first.pairs} labelled</span></div>
    <${Delivery} ...${outbox} />
    ${current ? html`<div><${Two} pair=${current} />
      <div class="choices" role="group" aria-label="Which answer is better?">
        <button type="button" onClick=${() => choose("left")}>A is better <kbd>1</kbd></button>
        <button type="button" onClick=${() => choose("tie")}>Tie <kbd>0</kbd></button>
        <button type="button" onClick=${() => choose("right")}>B is better <kbd>2</kbd></button>
        <button type="button" class="quiet" onClick=${undo} disabled=${!given.current.length}>Undo <kbd>u</kbd></button></div></div>`
    : html`<div class="box empty"><h2>${done >= first.pairs ? "You have labelled every pair" : "Waiting for more pairs"}</h2>
        <p>${done >= first.pairs ? "Below you can see how well you agree with others, and train a reward model." : "The lab has not sent the next ones yet."}</p>
        <button type="button" class="quiet" onClick=${undo} disabled=${!given.current.length}>Undo <kbd>u</kbd></button></div>`}
    <${Results} queue=${queue} heard=${heard} /></div>`;
}

function merged(old, more) {
  const known = new Set(old.map((pair) => pair.id));
  return [...old, ...more.filter((pair) => !known.has(pair.id))];
}

function Two({ pair }) {
  const [last, ...before] = [...pair.prompt].reverse();
  return html`<section class="pair" aria-label="The pair">
    ${before.length > 0 && html`<details><summary>Earlier messages (${before.length})</summary>
      ${before.reverse().map((turn) => html`<p class="who">${printable(turn.role)}</p><p class="said">${printable(turn.content)}</p>`)}</details>`}
    <p class="who">${before.length ? printable(last.role) : "prompt"}</p><p class="asked said">${printable(last.content)}</p>
    <div class="answers">
      <article aria-labelledby="answer-a"><h2 id="answer-a">A</h2><p class="said">${printable(pair.left)}</p></article>
      <article aria-labelledby="answer-b"><h2 id="answer-b">B</h2><p class="said">${printable(pair.right)}</p></article></div></section>`;
}

function Delivery({ waiting, trouble }) {
  const labels = `${waiting} ${waiting === 1 ? "label" : "labels"}`;
  if (trouble && waiting) {
    return html`<p class="connection lost" role="status"><strong>✗ ${labels} not stored yet.</strong> ${printable(trouble)}
      They are kept in this browser and sent when the lab is back. You can continue labelling.</p>`;
  }
  return html`<p class="delivery soft" role="status">${waiting ? `Sending ${labels} …` : "✓ All labels are stored."}</p>`;
}

function useKeys(keys) {
  const now = useRef(keys);
  now.current = keys;
  useEffect(() => {
    const pressed = (event) => {
      const typing = event.target.closest?.("input:not([type=radio], [type=checkbox]), select, textarea");
      if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
      const action = now.current[event.key.toLowerCase()];
      if (action) { event.preventDefault(); action(); }
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}
