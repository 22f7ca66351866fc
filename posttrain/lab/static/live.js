// Live curves: one WebSocket per run, which sends everything once and then only updates.

import { TOKEN, address, useEffect, useState } from "./ui.js";

const WAITS = [500, 1000, 2000, 4000, 8000];

// {curves: {metric: [steps, values]}, names, status, step, changes, state}; `state` is loading, live, lost or an error.
export function useLive(run, metrics = "") {
  const [shown, set] = useState({ state: "loading", curves: {}, names: [], changes: [], status: "", step: null });
  useEffect(() => {
    let socket;
    let timer;
    let closed = false;
    let tries = 0;
    const open = () => {
      const query = new URLSearchParams({ token: TOKEN, metrics });
      socket = new WebSocket(`ws://${location.host}/live${address(run)}?${query}`);
      socket.onmessage = (message) => {
        const news = JSON.parse(message.data);
        tries = 0;
        if (news.error) { closed = true; set((old) => ({ ...old, state: "failed", error: news.error })); return; }
        set((old) => ({ ...old, ...news, names: news.names || old.names, state: "live",
          curves: news.whole ? news.curves : extended(old.curves, news.curves) }));
      };
      socket.onclose = () => {
        if (closed) return;
        set((old) => ({ ...old, state: "lost" }));
        timer = setTimeout(open, WAITS[Math.min(tries++, WAITS.length - 1)]);
      };
    };
    open();
    return () => { closed = true; clearTimeout(timer); socket.close(); };
  }, [run, metrics]);
  return shown;
}

function extended(curves, news) {
  const joined = { ...curves };
  for (const [name, [steps, values]] of Object.entries(news)) {
    const [oldSteps, oldValues] = curves[name] || [[], []];
    joined[name] = [oldSteps.concat(steps), oldValues.concat(values)];
  }
  return joined;
}
