"""What holds of every page of the lab, whichever part adds it: it opens, it is titled, it fits, everybody can read it.

A page's address in PAGES needs an example here, with names of the small folder that these tests open.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from posttrain.lab.app import PAGES
from posttrain.lab.folders import Place
from posttrain.lab.label import sources
from tests.lab_server import PATIENCE, Opened, accessibility, hostile_run, opened, too_wide

EXAMPLES: dict[str, str] = {
    "/": "/",
    "/learn": "/learn",
    "/learn/{chapter}": "/learn/why",
    "/explore": "/explore",
    "/explore/stages": "/explore/stages",
    "/explore/algorithms": "/explore/algorithms",
    "/explore/hacking": "/explore/hacking",
    "/explore/grpo": "/explore/grpo",
    "/explore/preferences": "/explore/preferences",
    "/explore/search": "/explore/search",
    "/runs": "/runs",
    "/runs/{run}": "/runs/one?with=two",
    "/runs/{run}/episodes": "/runs/one/episodes",
    "/runs/{run}/episodes/{kind}/{step:int}/{group:int}/{index:int}": "/runs/one/episodes/train/1/0/1",
    "/pipelines/{pipeline}": "/pipelines/small",
    "/label": "/label",
    "/label/{queue}": "/label/pairs",
    "/chat": "/chat",
}
"""Address in PAGES → one that exists in the folder of these tests."""

CARD = {
    "helpfulness": {"value": 0.61, "low": 0.52, "high": 0.7, "n": 64},
    "safety": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 64},
    "kl": {"value": 3.25, "low": 2.5, "high": 4.0, "n": 128},
    "samples": 2,
}
PIPELINE = {
    "pipeline": "small", "about": "Two models.", "recipe": "", "results": {"a.safety": 0.5},
    "expect": {"a.safety": [0.4, 0.6]},
    "stages": [
        {"name": "data", "run": "worked", "folder": "data-1", "seconds": 1.0, "made": {"rows": 12}, "card": None},
        {"name": "a", "run": "grpo", "folder": "a-1", "seconds": 2.0, "made": None, "card": CARD},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """Two runs and a pipeline, all of whose texts try to be markup, and a queue of pairs to label."""
    runs = tmp_path_factory.mktemp("pages") / "runs"
    for name in ("one", "two", "small/a-1"):
        hostile_run(runs / name)
    (runs / "small" / "pipeline.json").write_text(json.dumps(PIPELINE))
    pair = {"prompt": "Which?", "chosen": "<b>this</b>", "rejected": "that"}
    (runs / "pairs.jsonl").write_text("".join(json.dumps({**pair, "id": f"p{i}"}) + "\n" for i in range(4)))
    assert sources.start(Place(runs), "file:pairs.jsonl")["queue"] == "pairs"
    with opened(runs) as lab:
        yield lab


def test_every_page_has_an_example() -> None:
    assert set(EXAMPLES) == set(PAGES), "give each address of posttrain.lab.app.PAGES an example in EXAMPLES"
    for pattern, example in EXAMPLES.items():
        shape = re.sub(r"\\{\w+:int\\}", r"\\d+", re.sub(r"\\{\w+\\}", "[^/]+", re.escape(pattern)))
        assert re.fullmatch(shape, example.partition("?")[0]), f"{example} is no example of {pattern}"


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_a_page_opens_is_titled_fits_a_phone_and_is_accessible_in_light_and_dark(
    page: Page, lab: Opened, pattern: str
) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    answer = page.goto(lab.address + EXAMPLES[pattern])
    assert answer is not None and answer.status == 200
    expect(page.locator("main h1")).to_have_count(1, timeout=PATIENCE)
    page.wait_for_load_state("networkidle")
    expect(page.locator(".waiting")).to_have_count(0, timeout=PATIENCE)
    assert page.locator(".failed").count() == 0, page.locator(".failed").first.inner_text()
    assert page.title().endswith(" · posttrain lab") and page.locator("main h1").inner_text().strip()
    assert accessibility(page) == [] and not too_wide(page)
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    page.set_viewport_size({"width": 390, "height": 844})
    assert accessibility(page) == []
    assert not too_wide(page), "scrolls sideways on a phone"
