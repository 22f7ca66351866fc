// The reward hacking explorer: two runs of a small policy side by side, computed live, with every step kept.

import { Chart, DASHES } from "./chart.js";
import { Choice, Formula, Slider, useAddress } from "./controls.js";
import { Frontier } from "./explore-frontier.js";
import { Failed, TOKEN, Table, html, number, percent, printable, useEffect, useMemo, useRef, useState, useTitle } from "./ui.js";

const DEFAULTS = { beta: 0.3, seed: 0, steps: 120, at: -1, show: "both", frontier: false };
const SPEEDS = [["slow", "slow"], ["steady", "normal"], ["fast", "maximum"]];
const LINES = ["reward model’s score", "true reward"];
const PAUSE = 250; // milliseconds without another change before a new pair of runs is opened

// {phase, about, history, say}: a pair of runs on the server. `phase` is preparing, ready, ended, lost or failed; `say`
// sends a command. Changing the settings opens a new pair.
function usePair(asked, round, ready) {
  const [shown, set] = useState({ phase: "preparing", about: null, history: [] });
  const socket = useRef(null);
  const query = new URLSearchParams(asked).toString();
  useEffect(() => {
    const history = [];
    let closed = false;
    let frame = 0;
    let news = {};
    const show = (change) => {
      news = { ...news, ...change };
      frame ||= requestAnimationFrame(() => { frame = 0; set((old) => ({ ...old, ...news, history: [...history] })); news = {}; });
    };
    const open = () => {
      show({ phase: "preparing", error: "" });
      const own = socket.current = new WebSocket(`ws://${location.host}/live/explore/hacking?${query}&token=${encodeURIComponent(TOKEN)}`);
      own.onmessage = (message) => {
        const said = JSON.parse(message.data);
        if (said.error) { closed = true; show({ phase: "failed", error: said.error }); }
        if (said.kind === "ready") show({ about: said });
        if (said.kind === "step") {
          history.push(said);
          show(said.step ? {} : { phase: "ready" });
          if (!said.step) ready((word) => own.send(word));
        }
        if (said.kind === "end") show({ phase: "ended" });
      };
      own.onclose = () => closed || show({ phase: "lost" });
    };
    const timer = setTimeout(open, socket.current ? PAUSE : 0);
    return () => { closed = true; clearTimeout(timer); cancelAnimationFrame(frame); socket.current?.close(); };
  }, [query, round]);
  return { ...shown, say: (word) => socket.current?.readyState === WebSocket.OPEN && socket.current.send(word) };
}

export function Page() {
  useTitle("Reward hacking");
  const [state, set] = useAddress(DEFAULTS);
  const [speed, setSpeed] = useState("steady");
  const [round, setRound] = useState(0);
  const [playing, setPlaying] = useState(state.at >= 0);
  const wants = useRef({});
  wants.current = { playing, speed: state.at >= 0 && round === 0 ? "fast" : speed };
  const { beta, seed, steps } = state;
  const pair = usePair({ beta, seed, steps }, round, (say) => { // a new pair keeps the speed and play state
    say(wants.current.speed);
    if (wants.current.playing) say("play");
  });
  const ended = pair.phase === "ended";
  const play = (on) => { setPlaying(on); pair.say(on ? "play" : "pause"); };
  const change = (what) => { set({ ...what, at: -1 }); };
  const again = () => { setPlaying(false); set({ at: -1 }); setRound(round + 1); };
  return html`<p class="path"><a href="/explore">Explore</a></p><h1>Reward hacking</h1>
    <p class="lead">What happens to quality when a proxy is optimised too hard?</p>
    <p>Nobody can write down exactly what a good answer is, so a <em>reward model</em> learns it from comparisons, and the policy is trained
      to please that model. Here the answers are so simple that we know their true reward. Press Start and watch both: the reward
      model’s score and the true reward.</p>
    <div class="split hacking"><div>
      <div class="buttons">
        <button type="button" disabled=${ended || pair.phase !== "ready"} onClick=${() => play(!playing)}>${playing && !ended ? "Pause" : "Start"}</button>
        <button type="button" class="quiet" disabled=${playing || pair.phase !== "ready"} onClick=${() => pair.say("step")}>One step</button>
        <button type="button" class="quiet" onClick=${again}>Reset</button>
      </div>
      <${Slider} label="KL penalty β" name="beta" min="0" max="1" step="0.05" value=${beta} text=${number(beta)} onChange=${(value) => change({ beta: value })} />
      <${Choice} legend="Runs shown" name="show" value=${state.show} onChange=${(show) => set({ show })}
        options=${[["both", "both"], ["off", "penalty off"], ["on", "penalty on"]]} />
      <${Choice} legend="Speed" name="speed" options=${SPEEDS} value=${speed} onChange=${(key) => { setSpeed(key); pair.say(key); }} />
      <${Slider} label="Steps" name="steps" min="40" max="200" step="20" value=${steps} onChange=${(value) => change({ steps: value })} />
      <${Slider} label="Seed" name="seed" min="0" max="19" step="1" value=${seed} onChange=${(value) => change({ seed: value })} />
      <p class="note">The seed determines everything: the demonstrations that the initial policy imitates, the judge’s mistakes and the sampled answers.</p>
    </div>
    <${Watched} pair=${pair} state=${state} set=${set} again=${again} /></div>
    ${pair.about && html`<${Frontier} query=${{ beta, seed, steps }} wanted=${state.frontier} want=${() => set({ frontier: true })} />
      <${Rules} about=${pair.about} beta=${beta} />`}`;
}

function Watched({ pair, state, set, again }) {
  const { phase, about, history } = pair;
  if (phase === "failed") return html`<div><${Failed} error=${pair.error} again=${again} /></div>`;
  if (phase === "lost") return html`<div><${Failed} error="Lost the connection to the lab, and these runs with it." again=${again} /></div>`;
  if (!history.length || !about) return html`<div class="coming"><p class="waiting" role="status">Training the initial policy and its reward model …</p></div>`;
  const newest = history.length - 1;
  const at = state.at >= 0 ? Math.min(state.at, newest) : newest;
  const shown = ["off", "on"].filter((name) => state.show === "both" || state.show === name);
  const titles = { off: "Penalty off", on: `Penalty on, β = ${number(state.beta)}` };
  return html`<div>
    <${Curves} history=${history} steps=${state.steps} shown=${shown} titles=${titles} at=${at} />
    <${Slider} label="Step shown" name="at" min="0" max=${newest || 1} step="1" value=${at} text=${`${at}${at === newest ? " (latest)" : ""}`}
      onChange=${(value) => set({ at: value >= newest ? -1 : value })} />
    <${Verdict} now=${history[at]} shown=${shown} about=${about} />
    <h2>Sample answers at step ${at}</h2>
    <p>“${about.question}”</p>
    <div class="two">${shown.map((name) => html`<section class="samples"><h3>${titles[name]}</h3>
      <ul>${history[at][name].samples.map((sample) => html`<${Sample} ...${sample} />`)}</ul></section>`)}</div>
    <${Numbers} first=${history[0]} now=${history[at]} shown=${shown} titles=${titles} at=${at} />
    <${Words} first=${history[0]} now=${history[at]} shown=${shown} titles=${titles} about=${about} />
  </div>`;
}

function Curves({ history, steps, shown, titles, at }) {
  const axis = useMemo(() => Array.from({ length: steps + 1 }, (_, i) => i), [steps]);
  const curve = (name, what) => axis.map((i) => (history[i] ? history[i][name][what] : null));
  const made = useMemo(() => Object.fromEntries(["off", "on"].map((name) => [name, ["proxy", "true"].map((what, i) =>
    ({ name: LINES[i], steps: axis, values: curve(name, what) }))])), [history, axis]);
  const far = useMemo(() => shown.map((name) => ({ name: titles[name], steps: axis, values: curve(name, "kl") })), [history, axis, ...shown]);
  const all = shown.flatMap((name) => history.flatMap((step) => [step[name].proxy, step[name].true]));
  const limits = [Math.min(-1, Math.floor(Math.min(...all))), Math.max(4, Math.ceil(Math.max(...all)))];
  const span = [0, steps];
  return html`<ul class="legend" aria-label="Curves">${LINES.map((name, i) => html`<li>
      <svg width="36" height="8" aria-hidden="true"><line x1="0" y1="4" x2="36" y2="4" class=${`line-${i}`} stroke-width="2.5" stroke-dasharray=${DASHES[i].join(" ")} /></svg> ${name}</li>`)}
      <li class="soft">mean of 64 answers, in points</li></ul>
    <div class="two">${shown.map((name) => html`<${Chart} key=${name} title=${titles[name]} series=${made[name]} span=${span} limits=${limits} at=${at} />`)}</div>
    <details><summary>KL from the start, in nats: ${shown.map((name, i) => html`${i > 0 && ", "}${titles[name].toLowerCase().split(",")[0]} <strong class="number">${number(history[at][name].kl)}</strong>`)}</summary>
      <${Chart} key=${shown.join()} title="KL(π ‖ start) per answer, nats" series=${far} span=${span} at=${at} /></details>`;
}

const signed = (value) => `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`;
const plain = (value) => (value < 0 ? `−${number(-value)}` : number(value));

function Verdict({ now, shown }) {
  return html`<div class="verdict" role="status">${shown.map((name) => {
    const { proxy, true: worth, best, exploited } = now[name];
    const fell = best[1] - worth;
    return html`<p><strong>${name === "off" ? "Without the penalty" : "With the penalty"}</strong> the model’s score is ${plain(proxy)}; the true
      reward is ${plain(worth)}${fell > 0.5 ? `, ${number(fell)} below its best (${plain(best[1])} at step ${best[0]})` : ""}.
      ${now.step > 0 && exploited.gained > 0.05 && html` The largest gain in score comes from “${exploited.word}”: ${number(exploited.before, 2)} times
        per answer at the start, ${number(exploited.now, 2)} now, each worth ${signed(exploited.weight)} to the model.`}</p>`;
  })}</div>`;
}

function Sample({ text, proxy, true: worth, parts }) {
  const sum = Object.entries(parts).map(([name, value]) => `${name} ${signed(value)}`).join(", ");
  return html`<li><span class="said">${text ? printable(text) : "(empty)"}</span>
    <span class="note">model ${plain(proxy)} · true <strong>${plain(worth)}</strong>${sum && `: ${sum}`}</span></li>`;
}

function Numbers({ first, now, shown, titles, at }) {
  const rows = [["Reward model’s score", "proxy", plain], ["True reward", "true", plain], ["KL from the start, nats", "kl", plain],
    ["Pairs of answers that the model ranks correctly", "agreement", (value) => (value === null ? "all answers tie" : percent(value))]];
  return html`<${Table} caption=${`Means over 64 answers at step ${at}`} head=${["Mean", "At the start", ...shown.map((name) => titles[name])]}>
    ${rows.map(([label, key, write]) => html`<tr><th scope="row">${label}</th><td class="number">${write(first.off[key])}</td>
      ${shown.map((name) => html`<td class="number">${write(now[name][key])}</td>`)}</tr>`)}</${Table}>`;
}

function Words({ first, now, shown, titles, about }) {
  const changed = about.words.map((word, i) => ({ word, i, by: Math.max(...shown.map((name) => Math.abs(now[name].words[i] - first.off.words[i]))) }));
  const rows = changed.sort((a, b) => b.by - a.by || a.i - b.i).slice(0, 8);
  return html`<h2>What the policy exploits</h2>
    <p>The reward model gives a word its points <em>every time</em> it occurs; the true rule takes ${number(-about.repeat)} away for each
      repetition. In the first answers that hardly matters. The words whose use has changed most:</p>
    <${Table} caption="Mean occurrences per answer; points are the reward model’s for each occurrence" head=${["Word", "Points", "At the start", ...shown.map((name) => titles[name])]}>
      ${rows.map(({ word, i }) => html`<tr><th scope="row">${word}</th><td class="number">${signed(about.weights[i])}</td>
        <td class="number">${first.off.words[i].toFixed(2)}</td>${shown.map((name) => html`<td class="number">${now[name].words[i].toFixed(2)}</td>`)}</tr>`)}</${Table}>`;
}

function Rules({ about, beta }) {
  return html`<h2>How this works</h2><div class="two rules"><div>
      <h3>The true reward is a rule</h3>
      <table><caption>Points for an answer of up to ${about.longest} words</caption><tbody>${about.rule.map(([text, value]) => html`
        <tr><td class="number">${signed(value)}</td><td>${text}</td></tr>`)}</tbody></table>
    </div><div>
      <h3>The proxy is learned</h3>
      <p>A judge who knows the rule, but makes mistakes, compared ${about.pairs} pairs of the initial policy’s answers. From those a
        Bradley–Terry model learned one weight per word. On new answers of the initial policy it ranks <strong>${percent(about.agreement)}</strong>
        of the pairs as the rule does. It never saw an answer that repeats a word ten times, because the initial policy never wrote one.</p>
      <h3>The policy is optimised against it</h3>
      <p>A network with ${about.parameters} parameters writes ${about.answers} answers per step; each score is compared with the scores of the
        others (RLOO), and Adam makes the better answers more likely. With the penalty, here β = ${number(beta)}, it maximises</p>
      <${Formula} display tex=${`\\mathbb{E}_{y \\sim \\pi_\\theta}\\left[ r_\\phi(y) \\right] - \\beta\\, D_{\\mathrm{KL}}(\\pi_\\theta \\,\\|\\, \\pi_{\\mathrm{start}})`} />
      <p>The penalty keeps the answers close to those the reward model was trained on. With too little, the policy runs away; with too much, it
        learns nothing.</p>
    </div></div>`;
}
