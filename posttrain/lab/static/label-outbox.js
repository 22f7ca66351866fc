// The outbox for labels. Each label stays in the browser's storage under its own key until the lab confirms that it is
// on disk, so that a closed tab, a stopped lab or a second tab neither loses nor duplicates one.

import { TOKEN, useEffect, useRef, useState } from "./ui.js";

const PREFIX = "posttrain-label";
const WAITS = [500, 1000, 2000, 3000];
let token = TOKEN;
let gone = false; // the last request did not reach the lab
let turn = 0;

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The unsent labels of a queue, oldest first: [[key, body]].
export function unsent(queue) {
  const mine = `${PREFIX}/${queue}/`;
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(mine)).sort();
  return keys.map((key) => [key, JSON.parse(localStorage.getItem(key))]);
}

// {waiting, trouble, put}: the number of labels not stored yet, the reason, and a function that adds one. `onStored` is
// called whenever all labels are stored.
export function useOutbox(queue, onStored) {
  const [state, set] = useState({ waiting: unsent(queue).length, trouble: "" });
  const busy = useRef(false);
  const timer = useRef(0);
  const tries = useRef(0);
  const stored = useRef(onStored);
  stored.current = onStored;

  const drain = async () => {
    if (busy.current) return;
    busy.current = true;
    clearTimeout(timer.current);
    let trouble = "";
    const refused = new Set();
    for (let first; (first = unsent(queue).find(([key]) => !refused.has(key))); ) {
      const [key, body] = first;
      const answer = await deliver(queue, body);
      if (answer.stored) localStorage.removeItem(key);
      else if (answer.refused) refused.add(key);
      trouble = answer.trouble || trouble;
      set({ waiting: unsent(queue).length, trouble });
      if (answer.trouble && !answer.refused) break;
    }
    busy.current = false;
    const waiting = unsent(queue).length;
    set({ waiting, trouble: waiting ? trouble : "" });
    if (waiting) timer.current = setTimeout(drain, WAITS[Math.min(tries.current++, WAITS.length - 1)]);
    else { tries.current = 0; stored.current(); }
  };

  useEffect(() => {
    drain();
    const now = () => { tries.current = 0; drain(); };
    addEventListener("online", now);
    return () => { clearTimeout(timer.current); removeEventListener("online", now); };
  }, [queue]);

  const put = (body) => {
    localStorage.setItem(`${PREFIX}/${queue}/${Date.now()}-${String(turn++).padStart(6, "0")}-${body.id || body.undo}`, JSON.stringify(body));
    set((old) => ({ ...old, waiting: unsent(queue).length }));
    drain();
  };
  return { ...state, put };
}

// Sends one label: {stored} once the lab confirms that it is on disk, {refused, trouble} if the lab will never accept
// it, {trouble} if it is worth retrying.
async function deliver(queue, body, renewed = false) {
  let answer;
  try {
    if (gone) await renew();
    gone = false;
    const headers = { "x-lab-token": token, "content-type": "application/json" };
    answer = await fetch(`/api/label/${encodeURIComponent(queue)}/labels`, { method: "POST", body: JSON.stringify(body), headers });
  } catch {
    gone = true;
    return { trouble: "The lab is not responding. If it was closed, start it again with `posttrain lab`." };
  }
  if (answer.ok) return { stored: true };
  if (answer.status === 403 && !renewed && (await renew().catch(() => false))) return deliver(queue, body, true);
  const said = await answer.json().catch(() => ({}));
  return { refused: answer.status === 400, trouble: said.error || `The lab returned HTTP status ${answer.status}.` };
}

// A restarted lab has a new token, which is in its page; only this origin can read that page.
async function renew() {
  const text = await (await fetch(location.pathname)).text();
  const found = new DOMParser().parseFromString(text, "text/html").querySelector("meta[name=lab-token]");
  if (!found || found.content === token) return false;
  token = found.content;
  return true;
}

export const currentToken = () => token;
