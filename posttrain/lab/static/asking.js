// Requests over one open WebSocket, which is faster than an HTTP request each. Falls back to HTTP without a socket.

import { TOKEN, ask, understood } from "./ui.js";

const waiting = new Map();
let count = 0;
let opened = null;

function socket() {
  opened ||= new Promise((resolve, reject) => {
    const one = new WebSocket(`ws://${location.host}/ask?${new URLSearchParams({ token: TOKEN })}`);
    one.onopen = () => resolve(one);
    one.onmessage = (message) => {
      const { id, status, body } = JSON.parse(message.data);
      waiting.get(id)?.([status, body]);
      waiting.delete(id);
    };
    one.onclose = () => {
      opened = null;
      reject(new Error("closed"));
      for (const answer of waiting.values()) answer(null);
      waiting.clear();
    };
  });
  return opened;
}

// Returns what `path` computes, like `ask`.
export async function askQuickly(path) {
  const one = await socket().catch(() => null);
  if (!one || one.readyState !== WebSocket.OPEN) return ask(path);
  const id = ++count;
  const answer = await new Promise((resolve) => {
    waiting.set(id, resolve);
    one.send(JSON.stringify({ id, path }));
  });
  if (!answer) return ask(path);
  const [status, body] = answer;
  return understood(status === 200, status, body);
}
