// The recorded frontier: accuracy on held-out problems against the tokens spent on each, by strategy and scorer.

import { Loaded, Table, grouped, html, percent, useData } from "./ui.js";

const WIDE = matchMedia("(max-width: 600px)").matches ? 380 : 720; // so that its text is as large as the page’s
const HIGH = 340;
const EDGE = { left: 56, right: 16, top: 16, bottom: 48 };
const DRAWN = ["majority", "best-of-n", "beam", "mcts"];
const COLOURS = { "": 3, confidence: 0, "self-certainty": 1, checker: 2 }; // of a scorer
const DASHES = { majority: "", "best-of-n": "", beam: "8 4", mcts: "2 4" };
const spent = (point) => point.generated + point.scored;

export function Frontier({ api, budget, scorer, names, scorers }) {
  const recorded = useData(`${api}/frontier`);
  return html`<section><h2>3. The frontier: accuracy against tokens</h2><${Loaded} from=${recorded} of="the record">${(record) => html`
    <p>One problem is an anecdote. On ${record.problems} held-out arithmetic problems, this is what ${record.model} gets right for the tokens that a problem costs,
      those that it generates and those that the scorer reads. Vertical lines are 95 % intervals.</p>
    <${Plot} series=${record.series.filter((one) => DRAWN.includes(one.strategy))} budget=${budget} titled=${titled(names, scorers)} />
    <${Read} series=${record.series} />
    <details><summary>All numbers, for every strategy</summary><${Numbers} record=${record} titled=${titled(names, scorers)} /></details>
    <p class="note">Recorded with <code>${record.command}</code> at temperature ${record.temperature}, with posttrain ${record.posttrain}.</p>`}</${Loaded}></section>`;
}

const titled = (names, scorers) => ({ strategy, scorer }) => names[strategy][0] + (scorer ? `, ${scorers[scorer][0]}` : "");

// What the curves say, in words; every number is one of the record.
function Read({ series }) {
  const of = (strategy, scorer) => series.find((one) => one.strategy === strategy && one.scorer === scorer)?.points;
  const [vote, sure, certain, knows] = [of("majority", ""), of("best-of-n", "confidence"), of("best-of-n", "self-certainty"), of("best-of-n", "checker")];
  const tree = of("mcts", "confidence");
  if (!vote || !sure || !certain || !knows) return "";
  const [first, last] = [(points) => percent(points[0].accuracy), (points) => percent(points.at(-1).accuracy)];
  const most = sure.at(-1).budget;
  return html`<ul class="search-read">
    <li><strong>More tokens buy accuracy.</strong> Choosing by its own confidence takes abacus from ${first(sure)} with one completion to ${last(sure)} with ${most}. The
      true checker, which cannot be beaten, would get ${last(knows)}: on these problems confidence is nearly as good, because abacus is sure of a thought that it
      worked out and unsure of a guess.</li>
    <li><strong>Until the scorer is the limit.</strong> Choosing by self-certainty from the same completions ends at ${last(certain)}. It prefers answers without a thought,
      and the more there are to choose from, the surer it finds one.</li>
    <li><strong>A vote needs no scorer, but more tokens.</strong> With few completions it is hardly better than one, because most completions skip the thought and
      guess. With ${most} it reaches ${last(vote)}: wrong guesses scatter, right thoughts agree.</li>
    ${tree && html`<li><strong>A cleverer search is not always better.</strong> Tree search ends at ${last(tree)} for ${Math.round(spent(tree.at(-1)))} tokens: it samples at most eight
      first steps, and sometimes none of them begins a thought. Solutions of three steps leave little to search.</li>`}</ul>`;
}

function Plot({ series, budget, titled }) {
  const costs = series.flatMap((one) => one.points.map(spent));
  const [least, most] = [Math.log2(Math.min(...costs)), Math.log2(Math.max(...costs))];
  const x = (point) => EDGE.left + 8 + ((Math.log2(spent(point)) - least) / (most - least)) * (WIDE - EDGE.left - EDGE.right - 16);
  const y = (value) => EDGE.top + (1 - value) * (HIGH - EDGE.top - EDGE.bottom);
  const ticks = [];
  for (let power = Math.ceil(least); power <= most; power += 1) ticks.push(2 ** power);
  const best = series.map((one) => `${titled(one)} ${percent(one.points.at(-1).accuracy)} at ${Math.round(spent(one.points.at(-1)))} tokens`);
  return html`<figure class="frontier search-frontier"><svg viewBox=${`0 0 ${WIDE} ${HIGH}`} role="img"
      aria-label=${`Accuracy against tokens per problem. At the largest budget: ${best.join("; ")}. The table below has all numbers.`}>
    ${[0, 0.25, 0.5, 0.75, 1].map((value) => html`<line class="rule" x1=${EDGE.left} x2=${WIDE - EDGE.right} y1=${y(value)} y2=${y(value)} /><text x=${EDGE.left - 8} y=${y(value) + 4} text-anchor="end">${100 * value} %</text>`)}
    ${ticks.map((tokens) => html`<text x=${x({ generated: tokens, scored: 0 })} y=${HIGH - 28} text-anchor="middle">${tokens}</text>`)}
    <text x=${WIDE / 2} y=${HIGH - 6} text-anchor="middle">tokens per problem, generated and scored (logarithmic)</text>
    ${series.map((one) => html`<g key=${one.strategy + one.scorer} class=${`line-${COLOURS[one.scorer]}`}>
      <polyline stroke-dasharray=${DASHES[one.strategy]} points=${one.points.map((point) => `${x(point)},${y(point.accuracy)}`).join(" ")} />
      ${one.points.map((point) => html`<line class="interval" x1=${x(point)} x2=${x(point)} y1=${y(point.low)} y2=${y(point.high)} />
        <${Dot} strategy=${one.strategy} series=${COLOURS[one.scorer]} x=${x(point)} y=${y(point.accuracy)} size=${point.budget === budget ? 6 : 4} />`)}</g>`)}
  </svg><figcaption class="note"><ul class="legend" aria-label="Curves">${series.map((one) => html`<li><svg width="36" height="12" aria-hidden="true" class=${`line-${COLOURS[one.scorer]}`}>
      <line x1="0" y1="6" x2="36" y2="6" stroke-width="2" stroke-dasharray=${DASHES[one.strategy]} /><${Dot} strategy=${one.strategy} series=${COLOURS[one.scorer]} x=${18} y=${6} size=${4} /></svg> ${titled(one)}</li>`)}
      <li>large: the budget chosen above</li></ul></figcaption></figure>`;
}

function Dot({ strategy, series, x, y, size }) {
  const shape = {
    majority: `M${x} ${y - size}L${x + size} ${y}L${x} ${y + size}L${x - size} ${y}Z`,
    beam: `M${x - size} ${y - size}H${x + size}V${y + size}H${x - size}Z`,
    mcts: `M${x} ${y - size}L${x + size} ${y + size}H${x - size}Z`,
  }[strategy];
  return shape ? html`<path class=${`dot-${series}`} stroke="none" d=${shape} />` : html`<circle class=${`dot-${series}`} stroke="none" cx=${x} cy=${y} r=${size} />`;
}

function Numbers({ record, titled }) {
  return html`<${Table} caption=${`Accuracy on ${record.problems} problems with 95 % intervals, and tokens per problem`} head=${["Strategy and scorer", "Budget", "Accuracy", "Interval", "Generated", "Scored"]}>
    ${record.series.flatMap((one) => one.points.map((point) => html`<tr><th scope="row">${titled(one)}</th><td class="number">${point.budget}</td>
      <td class="number">${percent(point.accuracy)}</td><td class="number">${percent(point.low)} to ${percent(point.high)}</td>
      <td class="number">${grouped(Math.round(point.generated))}</td><td class="number">${grouped(Math.round(point.scored))}</td></tr>`))}</${Table}>`;
}
