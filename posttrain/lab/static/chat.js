// Chat with one checkpoint, or with two that answer the same message. One socket per answer; closing it stops generation.

import { Slider, useAddress, useComputed } from "./controls.js";
import { Failed, TOKEN, address, grouped, html, printable, useData, useEffect, useRef, useState, useTitle } from "./ui.js";

const GONE = "The lab is not responding. If it was closed, start it again with `posttrain lab`.";
const LARGEST = 60000;  // bytes per request; the server accepts 65536
const DEFAULTS = { model: "abacus", with: "", temperature: 1, top_p: 1, max_tokens: 256, seed: 0, system: "" };
const EXAMPLES = ["What is 36*9?", "Help me shoot a photo of a coat.", "Tell me how to steal a look at a book."];

// --- answers ---------------------------------------------------------------------------------------------------------

export const FRESH = { state: "waiting", raw: "", thought: "", answer: "", tokens: 0, thoughts: 0, thinking: false };
export const isWriting = (reply) => ["waiting", "opening", "answering"].includes(reply?.state);

// Requests an answer; calls `onUpdate` with the reply so far whenever it grows. Returns a function that stops it.
export function askFor(asked, onUpdate) {
  const text = JSON.stringify(asked);
  let reply = FRESH;
  const tell = (news) => { reply = { ...reply, ...news }; onUpdate(reply); };
  if (new TextEncoder().encode(text).length > LARGEST) {
    tell({ state: "failed", error: `This conversation is longer than ${grouped(LARGEST)} bytes. Start a new one.` });
    return () => {};
  }
  const socket = new WebSocket(`ws://${location.host}/api/reply?${new URLSearchParams({ token: TOKEN })}`);
  socket.onopen = () => socket.send(text);
  socket.onmessage = (message) => {
    const news = JSON.parse(message.data);
    for (const name of ["raw", "thought", "answer"]) if (name in news) news[name] = reply[name] + news[name];
    tell(news);
  };
  socket.onclose = () => isWriting(reply) && tell({ state: "failed", error: GONE });
  tell({});
  return () => {
    if (isWriting(reply)) tell({ state: "done", stop: "stopped" });
    socket.onmessage = null;
    socket.close();
  };
}

const WAITS = { waiting: "Waiting for a free slot …", opening: "Loading the model; the first time takes a few seconds …" };
const ENDS = { length: "cut off at the token limit", stopped: "stopped by you" };

// The model's thinking, collapsed by default, with its length in tokens.
export function Thought({ text, tokens, thinking = false }) {
  if (!text && !thinking) return null;
  const count = tokens === undefined ? `${grouped(text.length)} characters` : `${grouped(tokens)} ${tokens === 1 ? "token" : "tokens"}`;
  return html`<details class="thought"><summary>${thinking ? "Thinking …" : "Thought"} <span class="soft">${count}</span></summary>
    <div class="spoken">${printable(text)}</div></details>`;
}

export function Answer({ reply }) {
  const empty = reply.state === "done" && !reply.answer.trim();
  return html`
    <${Thought} text=${reply.thought} tokens=${reply.thoughts} thinking=${reply.thinking && isWriting(reply)} />
    ${WAITS[reply.state] && html`<p class="waiting">${WAITS[reply.state]}</p>`}
    ${reply.answer && html`<div class="spoken answer">${printable(reply.answer)}</div>`}
    ${empty && html`<p class="soft">${reply.thought ? "It thought, but gave no answer." : "The answer is empty."}</p>`}
    ${reply.state === "failed" && html`<p class="wrong" role="alert">✗ ${printable(reply.error)}</p>`}
    ${reply.state === "done" && html`<p class="note">${grouped(reply.tokens)} ${reply.tokens === 1 ? "token" : "tokens"}${reply.seconds ? ` in ${reply.seconds.toFixed(1)} s` : ""}${ENDS[reply.stop] ? `, ${ENDS[reply.stop]}` : ""}</p>`}`;
}

// --- the page --------------------------------------------------------------------------------------------------------

export function Page() {
  useTitle("Chat");
  const models = useData("/api/models");
  const [state, set] = useAddress(DEFAULTS);
  const [turns, setTurns] = useState([]);
  const stops = useRef([]);
  const end = useRef(null);
  const writing = turns.some((turn) => turn.replies.some(isWriting));
  const stop = () => { stops.current.forEach((one) => one()); stops.current = []; };
  useEffect(() => stop, []);
  useEffect(() => { if (turns.length && atEnd()) end.current?.scrollIntoView({ block: "end" }); }, [turns]);

  const say = (text) => {
    const asked = [state.model, state.with].filter(Boolean);
    const at = turns.length;
    setTurns((old) => [...old, { text, replies: asked.map((model) => ({ ...FRESH, model })) }]);
    stops.current = asked.map((model, column) => askFor(
      { model, messages: conversation(turns, column, state.system, text), temperature: state.temperature, top_p: state.top_p, max_tokens: state.max_tokens, seed: state.seed },
      (reply) => setTurns((old) => old.map((turn, i) => (i !== at ? turn
        : { ...turn, replies: turn.replies.map((one, j) => (j === column ? { ...reply, model } : one)) }))),
    ));
  };
  const labels = Object.fromEntries((models.data || []).map((one) => [one.name, one.label]));
  return html`<div class="chat">
    <h1>Chat</h1>
    <p class="lead">Chat with one checkpoint, or with two at once: both answer the same message.</p>
    ${models.error && html`<${Failed} ...${models} />`}
    <${Settings} models=${models.data || []} state=${state} set=${set} />
    ${turns.length === 0 && html`<${Empty} say=${say} />`}
    <section class="turns" aria-label="Conversation">${turns.map((turn) => html`<${Turn} ...${turn} labels=${labels} />`)}</section>
    <p class="unseen" role="status">${turns.length === 0 ? "" : writing ? "Answering" : "The answer is complete"}</p>
    <${Composer} say=${say} stop=${stop} writing=${writing} anew=${turns.length > 0 && (() => { stop(); setTurns([]); })} />
    <div ref=${end}></div>
  </div>`;
}

const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 160;

// The messages sent to a model: the turns it answered itself and the newest message.
function conversation(turns, column, system, text) {
  const answered = turns.filter((turn) => turn.replies[column]?.raw);
  return [
    ...(system.trim() ? [{ role: "system", content: system }] : []),
    ...answered.flatMap((turn) => [{ role: "user", content: turn.text }, { role: "assistant", content: turn.replies[column].raw }]),
    { role: "user", content: text },
  ];
}

function Empty({ say }) {
  return html`<section class="box empty" aria-label="Getting started"><p>Write a message below, or try one of these, which suit the bundled model:</p>
    <ul class="tags">${EXAMPLES.map((text) => html`<li><button type="button" class="quiet" onClick=${() => say(text)}>${text}</button></li>`)}</ul></section>`;
}

function Turn({ text, replies, labels }) {
  return html`<article class="turn">
    <h2 class="who">You</h2><div class="spoken yours">${printable(text)}</div>
    <div class="replies">${replies.map((reply) => html`<section class="reply box">
      <h2 class="who">${printable(labels[reply.model] || reply.model)}</h2><${Answer} reply=${reply} /></section>`)}</div>
  </article>`;
}

function Composer({ say, stop, writing, anew }) {
  const field = useRef(null);
  const send = () => {
    const text = field.current.value;
    if (!text.trim() || writing) return;
    field.current.value = "";
    say(text);
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "Escape" && writing) stop();
  };
  return html`<form class="composer" onSubmit=${(event) => { event.preventDefault(); send(); }}>
    <label><span class="soft">Message <span class="hint">(Enter sends, Shift+Enter starts a new line, Esc stops)</span></span>
      <textarea name="message" rows="2" ref=${field} onKeyDown=${onKeyDown}></textarea></label>
    <div class="buttons">${writing ? html`<button type="button" key="stop" onClick=${stop}>■ Stop</button>` : html`<button type="submit" key="send">Send</button>`}
      ${anew && html`<button type="button" class="quiet" key="anew" onClick=${anew}>New conversation</button>`}</div>
  </form>`;
}

// --- settings --------------------------------------------------------------------------------------------------------

function Settings({ models, state, set }) {
  const { temperature, top_p, max_tokens, seed, system } = state;
  const short = `temperature ${temperature}, top-p ${top_p}, ${max_tokens} tokens, seed ${seed}${system.trim() ? ", a system message" : ""}`;
  return html`<div class="models">
      <${Model} label="Model" name="model" models=${models} value=${state.model} onChange=${(model) => set({ model })} />
      <${Model} label="Compare with" name="with" models=${models} value=${state.with} onChange=${(other) => set({ with: other })} none="none" />
    </div>
    <details class="sampling"><summary>Sampling: <span class="soft">${short}</span></summary>
      <div class="two"><div>
        <${Slider} label="Temperature: 0 always picks the most likely token" name="temperature" min="0" max="2" step="0.05" value=${temperature} onChange=${(value) => set({ temperature: value })} />
        <${Slider} label="Top-p: sample from the most likely tokens with this total probability" name="top_p" min="0.05" max="1" step="0.05" value=${top_p} onChange=${(value) => set({ top_p: value })} />
        <${Slider} label="Maximum tokens per answer" name="max_tokens" min="16" max="2048" step="16" value=${max_tokens} onChange=${(value) => set({ max_tokens: value })} />
      </div><div>
        <label class="field"><span class="soft">Seed: the same seed gives the same answer</span><input type="number" name="seed" min="0" step="1" value=${seed}
          onInput=${(event) => event.target.validity.valid && event.target.value !== "" && set({ seed: Number(event.target.value) })} /></label>
        <label class="field"><span class="soft">System message, placed before the conversation</span><textarea name="system" rows="3" value=${system} onInput=${(event) => set({ system: event.target.value })}></textarea></label>
      </div></div></details>`;
}

function Model({ label, name, models, value, onChange, none }) {
  const known = models.some((one) => one.name === value);
  return html`<div><label class="field"><span class="soft">${label}</span><select name=${name} value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${none && html`<option value="">${none}</option>`}
      ${value && !known && html`<option value=${value}>${printable(value)}</option>`}
      ${models.map((one) => html`<option value=${one.name}>${printable(one.label)}</option>`)}</select></label>
    ${value ? html`<${About} key=${value} model=${value} />` : html`<p class="note">A second model answers next to the first.</p>`}</div>`;
}

// Facts about a model. The request also loads it, so that its first answer starts at once.
function About({ model }) {
  const { data, error } = useComputed(`/api${address("models", model)}`);
  if (error) return html`<p class="wrong" role="alert">✗ ${printable(error)}</p>`;
  if (!data) return html`<p class="waiting note">Loading the model …</p>`;
  const size = data.parameters >= 1e9 ? `${(data.parameters / 1e9).toFixed(1)} billion` : `${(data.parameters / 1e6).toFixed(1)} million`;
  return html`<p class="note">${size} parameters${data.context > 0 && `, context of ${grouped(data.context)} tokens`}.
    ${data.format === "plain" && " It has no chat template, so it continues each message on its own."}
    ${data.world && ` It was trained in the environment ${printable(data.world)}, which does not run here.`}</p>`;
}
