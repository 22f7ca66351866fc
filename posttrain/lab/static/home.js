// The first page: what is here, or how to make the first run.

import { Command, Loaded, address, grouped, html, printable, useData, useTitle } from "./ui.js";
import { Explorers } from "./explore.js";
import { RunsTable } from "./runs.js";

export function Page() {
  useTitle("Home");
  const home = useData("/api/home", 5000);
  return html`<h1>Post-training, looked at</h1>
    <p class="lead">Your runs as they train, <a href="/learn">a course in six chapters</a>, and five explorers. All of them call the functions that train.</p>
    <section><h2>Explore</h2><${Explorers} /></section>
    <${Loaded} from=${home} of="the folder">${(found) => (found.count || found.pipelines.length
      ? html`<${Here} ...${found} />` : html`<${Empty} folder=${found.folder} />`)}</${Loaded}>`;
}

export function Empty({ folder }) {
  return html`<section class="box empty">
    <h2>No runs yet</h2>
    <p>The lab looks into <code>${printable(folder)}</code>, and nothing has trained there. This makes the first run, in minutes, with the model that ships:</p>
    <${Command}>posttrain demo</${Command}>
    <p>It shows up here while it trains. Runs that are elsewhere are opened with:</p>
    <${Command}>posttrain lab FOLDER</${Command}>
  </section>`;
}

function Here({ folder, runs, count, running, pipelines }) {
  return html`<section><h2>Runs</h2>
    <p>${grouped(count)} ${count === 1 ? "run" : "runs"} in <code>${printable(folder)}</code>${", "}
      ${running ? `${running} training now.` : "none training now."}</p>
    ${runs.length > 0 && html`<${RunsTable} runs=${runs} />
      ${count > runs.length && html`<p><a href="/runs">All ${grouped(count)} runs</a></p>`}`}</section>
    ${pipelines.length > 0 && html`<section><h2>Pipelines</h2><ul class="cards">${pipelines.map((one) => html`
      <li class="box"><h3><a href=${address("pipelines", one.name)}>${printable(one.name)}</a></h3>
        <p>${printable(one.about)}</p>
        <p class="soft">${one.stages.length} stages have ended, ${one.finished ? "the pipeline is finished" : "more are to come"}.</p>
      </li>`)}</ul></section>`}`;
}
