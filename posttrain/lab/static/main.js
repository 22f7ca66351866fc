// Client-side router: shows the page for the current URL. Every link is a plain link, so the browser's own navigation
// handles history, focus and scrolling.

import { html, render } from "./ui.js";
import { Missing, Shell } from "./ui.js";

const PAGES = [
  [/^\/$/, () => import("./home.js"), []],
  [/^\/learn$/, () => import("./learn.js"), []],
  [/^\/learn\/([^/]+)$/, () => import("./course.js"), ["chapter"]],
  [/^\/explore$/, () => import("./explore.js"), []],
  [/^\/explore\/stages$/, () => import("./explore-stages.js"), []],
  [/^\/explore\/algorithms$/, () => import("./explore-algorithms.js"), []],
  [/^\/explore\/hacking$/, () => import("./explore-hacking.js"), []],
  [/^\/explore\/preferences$/, () => import("./explore-preferences.js"), []],
  [/^\/explore\/grpo$/, () => import("./explore-grpo.js"), []],
  [/^\/explore\/search$/, () => import("./explore-search.js"), []],
  [/^\/runs$/, () => import("./runs.js"), []],
  [/^\/runs\/([^/]+)$/, () => import("./run.js"), ["run"]],
  [/^\/runs\/([^/]+)\/episodes$/, () => import("./episodes.js"), ["run"]],
  [/^\/runs\/([^/]+)\/episodes\/([^/]+)\/(\d+)\/(\d+)\/(\d+)$/, () => import("./episode.js"),
    ["run", "kind", "step", "group", "index"]],
  [/^\/pipelines\/([^/]+)$/, () => import("./pipeline.js"), ["pipeline"]],
  [/^\/label$/, () => import("./label.js"), []],
  [/^\/label\/([^/]+)$/, () => import("./label.js"), ["queue"]],
  [/^\/chat$/, () => import("./chat.js"), []],
];

async function show() {
  const place = document.getElementById("lab");
  for (const [pattern, load, names] of PAGES) {
    const found = pattern.exec(location.pathname);
    if (!found) continue;
    const at = Object.fromEntries(names.map((name, i) => [name, decodeURIComponent(found[i + 1])]));
    const { Page } = await load();
    render(html`<${Shell}><${Page} ...${at} /></${Shell}>`, place);
    return;
  }
  render(html`<${Shell}><${Missing} /></${Shell}>`, place);
}

show();
