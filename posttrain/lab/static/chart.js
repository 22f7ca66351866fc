// A chart with one curve per run over steps. Runs differ in dash pattern as well as colour; arrow keys read values.

import { html, number, printable, useEffect, useRef, useState } from "./ui.js";

export const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
const HEIGHT = 190;
const dark = matchMedia("(prefers-color-scheme: dark)");

// `series`: [{name, steps, values}]; the order assigns colours and dashes. If given, `span` and `limits`, [low, high]
// each, fix the axes, and a vertical line marks step `at`.
export function Chart({ title, series, span = null, limits = null, at = null }) {
  const place = useRef(null);
  const look = useRef({});
  look.current = { span, limits, at };
  const chart = useRef(null);
  const [read, setRead] = useState("");
  const names = series.map((one) => one.name).join("\n");

  useEffect(() => {
    let width = place.current.clientWidth;
    const build = () => {
      chart.current?.destroy();
      chart.current = new uPlot(options(series, width, (text) => setRead(text), look), joined(series), place.current);
    };
    build();
    const resized = new ResizeObserver(() => {
      const now = place.current.clientWidth;
      if (now && now !== width) chart.current.setSize({ width: (width = now), height: HEIGHT });
    });
    resized.observe(place.current);
    dark.addEventListener("change", build);
    return () => { resized.disconnect(); dark.removeEventListener("change", build); chart.current.destroy(); };
  }, [names]);

  useEffect(() => { chart.current?.setData(joined(series)); }, [series, at, limits?.[0], limits?.[1]]);

  const move = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const steps = chart.current.data[0];
    if (!by || !steps.length) return;
    event.preventDefault();
    const at = Math.min(steps.length - 1, Math.max(0, (chart.current.cursor.idx ?? (by > 0 ? -1 : steps.length)) + by));
    chart.current.setCursor({ left: chart.current.valToPos(steps[at], "x"), top: HEIGHT / 2 });
  };
  return html`<figure class="chart">
    <figcaption>${printable(title)}</figcaption>
    <div class="canvas" ref=${place} role="img" tabindex="0" onKeyDown=${move} aria-label=${summary(title, series)}></div>
    <p class="read" aria-live="polite">${read || last(series)}</p>
  </figure>`;
}

function joined(series) {
  if (series.length === 1) return [series[0].steps, series[0].values];
  return uPlot.join(series.map((one) => [one.steps, one.values]));
}

function options(series, width, tell, look) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  return {
    width, height: HEIGHT, legend: { show: false }, padding: [8, 16, 0, 0],
    cursor: { y: false, drag: { x: true, y: false }, points: { size: 7 } },
    scales: {
      x: { time: false, range: (_, low, high) => look.current.span || [low, high] },
      y: look.current.limits ? { range: (_, low, high) => look.current.limits || [low, high] } : {},
    },
    axes: [{ ...axis, size: 28 }, { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => number(tick, 4)) }],
    series: [{}, ...series.map((one, i) => ({
      label: one.name, stroke: colour(`--series-${i}`), width: 1.75, dash: DASHES[i],
      points: { show: one.steps.length < 25, size: 5 },
    }))],
    hooks: { draw: [(u) => {
      if (look.current.at === null) return;
      const x = Math.round(u.valToPos(look.current.at, "x", true));
      u.ctx.fillStyle = colour("--soft");
      u.ctx.fillRect(x, u.bbox.top, devicePixelRatio, u.bbox.height);
    }], setCursor: [(u) => {
      const at = u.cursor.idx;
      if (at === null || at === undefined) { tell(""); return; }
      const values = u.series.slice(1).map((one, i) => [one.label, u.data[i + 1][at]]).filter(([, v]) => v !== null && v !== undefined);
      tell(`step ${u.data[0][at]}: ${values.map(([label, v]) => (u.series.length > 2 ? `${printable(label)} ${number(v, 4)}` : number(v, 4))).join(", ")}`);
    }] },
  };
}

function last(series) {
  const ends = series.filter((one) => one.steps.length).map((one) => {
    const end = Math.max(0, one.values.findLastIndex((v) => v !== null));
    const step = one.steps[end];
    const value = number(one.values[end], 4);
    return series.length > 1 ? `${printable(one.name)} ${value} at ${step}` : `step ${step}: ${value}`;
  });
  return ends.join(" · ") || "no data yet";
}

function summary(title, series) {
  const told = series.map((one) => {
    const finite = one.values.filter((v) => v !== null);
    if (!finite.length) return `${one.name}: no data`;
    const low = finite.reduce((a, b) => Math.min(a, b));
    const high = finite.reduce((a, b) => Math.max(a, b));
    return `${one.name}: from ${number(finite[0])} to ${number(finite[finite.length - 1])} at step ${one.steps[one.values.findLastIndex((v) => v !== null)]}, lowest ${number(low)}, highest ${number(high)}`;
  });
  return printable(`Chart of ${title} over steps. ${told.join(". ")}. Use the arrow keys to read values.`);
}

// The legend: which line belongs to which run.
export function Legend({ names, marks = {} }) {
  return html`<ul class="legend" aria-label="Runs in the charts">${names.map((name, i) => html`<li>
    <svg width="36" height="8" aria-hidden="true"><line x1="0" y1="4" x2="36" y2="4" class=${`line-${i}`}
      stroke-width="2.5" stroke-dasharray=${DASHES[i].join(" ")} /></svg> ${marks[name] || printable(name)}</li>`)}</ul>`;
}
