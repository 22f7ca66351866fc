// The list of runs, from which several can be selected for comparison.

import { Loaded, address, html, useData, useState, useTitle } from "./ui.js";
import { Empty, RunsTable } from "./runs-table.js";

export function Page() {
  useTitle("Runs");
  const runs = useData("/api/runs", 4000);
  return html`<h1>Runs</h1>
    <${Loaded} from=${runs} of="the runs">${(found) => (found.length
      ? html`<${Chooser} runs=${found} />` : html`<${Empty} folder="this folder" />`)}</${Loaded}>`;
}

function Chooser({ runs }) {
  const [chosen, choose] = useState([]);
  const toggle = (name) => choose(chosen.includes(name) ? chosen.filter((n) => n !== name) : [...chosen, name].slice(-4));
  const [first, ...others] = chosen;
  const to = first && `${address("runs", first)}?with=${others.map(encodeURIComponent).join(",")}`;
  return html`<p aria-live="polite">${others.length
    ? html`<a class="button" href=${to}>Compare ${chosen.length} runs</a>`
    : html`<span class="soft">Select two to four runs to compare their curves.</span>`}</p>
    <${RunsTable} runs=${runs} chosen=${chosen} toggle=${toggle} />`;
}
