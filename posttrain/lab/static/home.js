// The home page: the folder's runs and pipelines, or how to start a first run.

import { Loaded, address, grouped, html, printable, useData, useTitle } from "./ui.js";
import { Explorers } from "./explore.js";
import { Empty, RunsTable } from "./runs-table.js";

export function Page() {
  useTitle("Home");
  const home = useData("/api/home", 5000);
  return html`<h1>See what post-training does to a model</h1>
    <p class="lead">Watch your runs as they train, take <a href="/learn">a course in six chapters</a>, or try the six explorers. All of it runs on the library's own training functions.</p>
    <section><h2>Explore</h2><${Explorers} /></section>
    <${Loaded} from=${home} of="the folder">${(found) => (found.count || found.pipelines.length
      ? html`<${Here} ...${found} />` : html`<${Empty} folder=${found.folder} />`)}</${Loaded}>`;
}

function Here({ folder, runs, count, running, pipelines }) {
  return html`<section><h2>Runs</h2>
    <p>${grouped(count)} ${count === 1 ? "run" : "runs"} in <code>${printable(folder)}</code>${", "}
      ${running ? `${running} ${running === 1 ? "is" : "are"} training now.` : "none is training now."}</p>
    ${runs.length > 0 && html`<${RunsTable} runs=${runs} />
      ${count > runs.length && html`<p><a href="/runs">All ${grouped(count)} runs</a></p>`}`}</section>
    ${pipelines.length > 0 && html`<section><h2>Pipelines</h2><ul class="cards">${pipelines.map((one) => html`
      <li class="box"><h3><a href=${address("pipelines", one.name)}>${printable(one.name)}</a></h3>
        <p>${printable(one.about)}</p>
        <p class="soft">${one.stages.length} ${one.stages.length === 1 ? "stage" : "stages"} finished${one.finished ? "; the pipeline is complete" : ", more to come"}.</p>
      </li>`)}</ul></section>`}`;
}
