"""The training-stages explorer: what was recorded, what follows from it, and the page on the real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page

from bench import pipelines as full
from bench import recorded as bench
from posttrain.cli.arguments import find_recipe
from posttrain.evaluation.intervals import Estimate, difference, wilson
from posttrain.lab.chat import unfold
from posttrain.lab.checkpoints import FOLDER
from posttrain.lab.explore import stages
from posttrain.lab.folders import CardValue, Place
from posttrain.pipelines.recipe import read_pipeline
from posttrain.types import ConfigError
from tests.lab_server import HOSTILE, Opened, accessibility, opened, too_wide

SHIPPED = ("rlhf", "constitution", "r1", "r1-zero")
RECIPE = """
pipeline = "own"
[[stage]]
name = "base"
run = "model"
[[stage]]
name = "shown"
run = "demonstrations"
[[stage]]
name = "sft"
run = "sft"
model.path = "{base}"
data.tasks = "{shown}*2"
"""


def figure(value: float, n: int = 100) -> CardValue:
    return {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05), "n": n}


def write_pipeline(root: Path, name: str = "own", text: str = "<think>1+1=2</think>2") -> Path:
    """A finished pipeline of a given model, data and a trained model, whose weights are those of abacus."""
    folder = root / name
    cards = {"base-1": {"helpfulness": figure(0.5), "safety": figure(0.4), "reasoning": figure(0.8)},
             "sft-1": {"helpfulness": figure(0.9), "safety": figure(0.42), "reasoning": figure(0.6)}}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for stage, run in (("base", "model"), ("shown", "demonstrations"), ("sft", "sft")):
        own = folder / f"{stage}-1"
        own.mkdir(parents=True)
        card = cards.get(own.name)
        row = {"name": stage, "run": run, "folder": own.name, "seconds": 3.0, "made": None, "summary": None}
        rows.append({**row, "card": card, "card_folder": f"{own.name}/card-1" if card else ""})
        if card:
            (own / "card-1").mkdir()
            answer = {"capability": "reasoning", "prompt": f"1+1? {HOSTILE}", "answer": f"{stage}: {text}"}
            again = {**answer, "capability": "helpfulness", "answer": "asked twice, shown once"}
            lines = [json.dumps({**one, "passed": stage == "sft", "detail": ""}) for one in (answer, again)]
            (own / "card-1" / "answers.jsonl").write_text("\n".join(lines))
    rows[1]["made"] = {"rows": 12, "notes": ["x"], "bias": {"value": 0.25, "low": 0.2, "high": 0.3}}
    (folder / "pipeline.json").write_text(
        json.dumps({"pipeline": "own", "about": HOSTILE, "recipe": RECIPE, "stages": rows, "results": {}, "expect": {}})
    )
    shutil.copytree(FOLDER, folder / "sft-1" / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


# --- what was recorded ----------------------------------------------------------------------------------------------


def test_the_four_pipelines_are_recorded_and_small() -> None:
    assert tuple(stages.recorded()) == SHIPPED
    assert all(file.stat().st_size < bench.LARGEST for file in stages.RECORDED.glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_record_is_of_the_recipe_as_it_is_and_of_the_run_whose_results_ship(name: str) -> None:
    kept, recipe = stages.recorded()[name], read_pipeline(find_recipe(name))
    again = "run `python -m bench.recorded --from FOLDER` with a new full run"
    assert kept["recipe_sha256"] == full.recipe_sha256(recipe), f"the recipe has changed since; {again}"
    assert [(s["name"], s["run"]) for s in kept["stages"]] == [(s.name, s.run) for s in recipe.stages]
    results = json.loads((full.RESULTS / f"{name}.json").read_text())["results"]
    for stage in kept["stages"]:
        for figure, found in (stage["card"] or {}).items():
            assert found["value"] == results[f"{stage['name']}.{figure}"], f"{stage['name']}.{figure}; {again}"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_examined_model_of_a_record_answers_every_prompt(name: str) -> None:
    kept = stages.recorded()[name]
    examined = [stage["name"] for stage in kept["stages"] if stage["card"]]
    assert len(kept["prompts"]) >= 9 and len({row["prompt"] for row in kept["prompts"]}) == len(kept["prompts"])
    assert all(list(row["answers"]) == examined for row in kept["prompts"])


def test_helpfulness_rises_from_the_start_to_sft_to_rl_and_rl_alone_costs_reasoning() -> None:
    found = {stage["name"]: stage for stage in stages.explained(stages.recorded()["rlhf"])["stages"]}

    def verdict(stage: str, figure: str) -> str:
        return next(row["verdict"] for row in found[stage]["changes"] if row["name"] == figure)

    assert found["base"]["card"]["helpfulness"]["value"] < found["sft"]["card"]["helpfulness"]["value"]
    assert found["sft"]["card"]["helpfulness"]["value"] < found["ppo"]["card"]["helpfulness"]["value"]
    assert (verdict("sft", "helpfulness"), verdict("ppo", "helpfulness")) == ("gain", "gain")
    assert (verdict("sft", "reasoning"), verdict("ppo", "reasoning")) == ("gain", "cost")  # the alignment tax
    assert verdict("ppo-ptx", "reasoning") == "gain"


def test_a_record_holds_what_the_pipeline_kept_with_each_prompt_once(tmp_path: Path) -> None:
    write_pipeline(tmp_path)
    kept = stages.record(Place(tmp_path), "own")
    base, shown, sft = kept["stages"]
    assert (base["from"], shown["from"], sft["from"], sft["uses"]) == (None, None, "base", ["shown"])
    assert shown["counted"] == {"rows": 12, "bias": {"value": 0.25, "low": 0.2, "high": 0.3}}
    assert [list(row["answers"]) for row in kept["prompts"]] == [["base", "sft"]]
    assert kept["prompts"][0]["answers"]["sft"]["text"] == "sft: <think>1+1=2</think>2"
    assert stages.record(Place(tmp_path / "own"), "own") == kept, "the lab may be opened on the pipeline itself"


def test_the_models_of_a_pipeline_are_named_where_they_are_there(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path)
    found = stages.with_models(Place(tmp_path), "own")["stages"]
    assert [stage.get("model") for stage in found] == ["abacus", None, "own~sft-1"]
    shutil.rmtree(folder / "sft-1" / "model")
    found = stages.with_models(Place(tmp_path), "own")["stages"]
    assert [stage.get("model") for stage in found] == ["abacus", None, None]


def test_a_folder_that_is_no_finished_run_of_a_shipped_recipe_is_not_recorded(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path)
    record = json.loads((folder / "pipeline.json").read_text())
    (folder / "pipeline.json").write_text(json.dumps({**record, "pipeline": "rlhf", "mini": True}))
    with pytest.raises(ConfigError, match="not hold a finished full run"):
        bench.recorded(folder)


def test_numbers_are_kept_to_six_digits() -> None:
    assert bench.rounded({"a": [1.23456789, 7, "x", True, None]}) == {"a": [1.23457, 7, "x", True, None]}


# --- what follows from it -------------------------------------------------------------------------------------------


def test_the_change_of_a_share_by_hand() -> None:
    found = difference(Estimate(0.5, 0.4, 0.6, 100), Estimate(0.8, 0.77, 0.84, 80))
    assert (found.value, found.n) == (pytest.approx(0.3), 80)
    assert found.low == pytest.approx(0.3 - (0.03**2 + 0.1**2) ** 0.5)
    assert found.high == pytest.approx(0.3 + (0.04**2 + 0.1**2) ** 0.5)


@given(st.integers(0, 50), st.integers(0, 50))
def test_a_change_turned_round_is_the_same_change_with_the_other_sign(a: int, b: int) -> None:
    one, two = difference(wilson(a, 50), wilson(b, 50)), difference(wilson(b, 50), wilson(a, 50))
    assert (one.value, one.low, one.high) == pytest.approx((-two.value, -two.high, -two.low))
    assert one.low <= one.value <= one.high


def test_a_change_is_a_gain_a_cost_or_within_chance_by_what_is_better() -> None:
    before = {"helpfulness": figure(0.5), "over_refusal": figure(0.5), "reasoning": figure(0.5), "kl": figure(0.1)}
    after = {"helpfulness": figure(0.7), "over_refusal": figure(0.7), "reasoning": figure(0.56), "kl": figure(9.0)}
    found = {row["name"]: row["verdict"] for row in stages.changes(before, after)}
    assert found == {"helpfulness": "gain", "over_refusal": "cost", "reasoning": "unclear"}


def test_origins_come_from_the_recipe_and_an_unreadable_one_has_none() -> None:
    assert stages.origins(RECIPE)["sft"] == {"from": "base", "uses": ["shown"]}
    assert stages.origins("= nonsense") == {} and stages.origins('stage = "x"') == {}


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    root = tmp_path_factory.mktemp("stages")
    write_pipeline(root)
    (write_pipeline(root, "broken") / "pipeline.json").write_text('{"stages": [{"name": 1}], "results": {}}')
    with opened(root) as lab:
        yield lab


def visit(lab: Opened, page: Page, **state: Any) -> None:
    page.goto(f"{lab.address}/explore/stages?{urlencode(state)}")
    page.locator(".stop").first.wait_for()


def test_each_stage_shows_its_own_recorded_numbers_and_helpfulness_rises_at_every_one(lab: Opened, page: Page) -> None:
    kept = {stage["name"]: stage["card"] for stage in stages.recorded()["rlhf"]["stages"] if stage["card"]}
    shown: dict[str, float] = {}
    visit(lab, page)
    for name, card in kept.items():
        page.locator(".stop", has=page.get_by_text(name, exact=True)).click()
        for at, (measure, label) in enumerate(
            (("helpfulness", "helpfulness"), ("safety", "safety"), ("reasoning", "reasoning accuracy"))
        ):
            line = page.locator(".gauge .line").nth(at).inner_text()
            value, low, high = (f"{100 * card[measure][end]:.1f}" for end in ("value", "low", "high"))
            numbers = [
                float(word.strip("[],%")) for word in line.replace(label, "").split() if word[0] in "[0123456789"
            ]
            assert numbers == pytest.approx([float(value), float(low), float(high), card[measure]["n"]], abs=0.1001)
        shown[name] = float(page.locator(".gauge .line strong").first.inner_text().split()[0])
    assert shown["base"] < shown["sft"] < shown["ppo"]


def test_choosing_a_stage_shows_its_own_answers_to_the_same_prompts_and_those_before_it(
    lab: Opened, page: Page
) -> None:
    rows = stages.recorded()["rlhf"]["prompts"]
    visit(lab, page, view="alone")
    for name in ("base", "sft", "ppo"):
        page.locator(".stop", has=page.get_by_text(name, exact=True)).click()
        page.locator(f".reply[data-stage={name}]").first.wait_for()
        assert page.locator(".asking .asked").all_inner_texts() == [row["prompt"] for row in rows]
        answers = [unfold(row["answers"][name]["text"])[1].strip() for row in rows]
        assert [text.strip() for text in page.locator(".reply .answer").all_inner_texts()] == answers
    page.get_by_label("Before and after").check()
    page.locator(".reply[data-stage=sft]").first.wait_for()
    first = page.locator(".asking").first.locator(".reply")
    assert [one.split("\n")[0] for one in first.all_inner_texts()] == ["sft, before", "ppo, after"]
    for at, name in enumerate(("sft", "ppo")):
        assert unfold(rows[0]["answers"][name]["text"])[1].strip() in first.nth(at).inner_text()
    assert page.locator(".tax").inner_text().startswith("The alignment tax")
    page.get_by_role("radio", name="All models").check()
    assert page.locator(".asking").first.locator(".reply").count() == 4


def test_the_address_holds_what_is_seen_and_keys_reach_every_stage(lab: Opened, page: Page) -> None:
    visit(lab, page)
    page.get_by_label("Pipeline").select_option("r1")
    page.get_by_role("link", name="SFT cold-start").focus()
    page.keyboard.press("Enter")
    page.get_by_text("One metric is not enough").wait_for()  # 100 % helpful, 0 % safe
    page.get_by_label("Only this stage").check()
    state = page.url.partition("?")[2]
    assert set(state.split("&")) == {"pipeline=r1", "stage=cold-start", "view=alone"}
    page.reload()
    page.get_by_text("One metric is not enough").wait_for()
    assert page.locator(".stop[aria-current] strong").inner_text() == "cold-start"
    assert page.get_by_label("Only this stage").is_checked()
    page.get_by_role("navigation", name="Stages that produce data").get_by_role("link", name="reward").click()
    page.get_by_text("This stage does not produce a model that answers").wait_for()


def test_every_stage_of_a_finished_pipeline_in_the_folder_answers_a_new_prompt(lab: Opened, page: Page) -> None:
    visit(lab, page, pipeline="here:own")
    page.locator("[name=ask]").fill("What is 36*9?")
    page.get_by_role("button", name="Ask", exact=True).click()
    replies = page.locator(".asking-all .reply")
    replies.locator(".note").nth(1).wait_for()
    texts = replies.all_inner_texts()
    assert [text.split("\n")[0] for text in texts] == ["base", "sft"]
    answers = replies.locator(".answer").all_inner_texts()
    assert len(answers) == 2 and answers[0] == answers[1], "their weights are the same, and so is the seed"
    assert "ask=What+is+36*9%3F" in page.url


def test_what_a_pipeline_holds_is_text_and_a_damaged_one_says_so(lab: Opened, page: Page) -> None:
    visit(lab, page, pipeline="here:own", view="all")
    page.locator(".asking").first.wait_for()
    assert page.title() == "Training stages · posttrain lab" and page.locator("main img, main script").count() == 0
    assert page.locator(".asked").count() == 1 and "\\u202e" in page.locator(".asked").inner_text()
    for name, said in (("here:broken", "is damaged"), ("nothing", "no pipeline named 'nothing' is recorded")):
        page.goto(f"{lab.address}/explore/stages?pipeline={name}")
        page.get_by_text(said).wait_for()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_stages_are_accessible_and_fit(lab: Opened, page: Page, width: int, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    for state in ({"stage": "ppo"}, {"pipeline": "r1", "view": "all"}, {"pipeline": "here:own", "stage": "shown"}):
        visit(lab, page, **state)
        page.get_by_text("All metrics of all models").click()
        assert accessibility(page) == [] and not too_wide(page), state
