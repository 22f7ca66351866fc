"""The lab as a person sees it: real runs, the real server, the system's Chromium."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Page, expect

from posttrain.config import DataConfig
from posttrain.data.tasks.load import load_tasks
from posttrain.lab import episodes, tokens
from posttrain.lab.cards import read_answers
from posttrain.lab.curves import Feed, thin
from posttrain.lab.episodes import Query, search
from posttrain.lab.folders import Place, list_runs
from posttrain.lab.rejudge import Regraded, judge_again
from posttrain.lab.rescore import score_tokens
from posttrain.store.run import Event, Run
from posttrain.types import ConfigError, ResumeError
from tests import tiny
from tests.lab_server import HOSTILE, PATIENCE, Opened, header, hostile_run, opened, row, write_step

PIPELINE = {
    "pipeline": "small", "about": "Two models.", "recipe": "", "results": {"a.safety": 0.5},
    "expect": {"a.safety": [0.4, 0.6]},
    "stages": [
        {"name": "a", "run": "grpo", "folder": "a-1", "seconds": 2.0, "made": None,
         "card": {"safety": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}, "samples": 2}},
        {"name": "data", "run": "worked", "folder": "data-1", "seconds": 1.0, "made": {"rows": 12}, "card": None},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real run of two steps, one whose texts try to be markup, a damaged one and a pipeline."""
    root = tmp_path_factory.mktemp("lab")
    runs = root / "runs"
    tiny.two_steps(root / "tiny", runs / "real")
    hostile_run(runs / "hostile")
    hostile_run(runs / "broken")
    (runs / "broken" / "run.json").write_text("{")
    hostile_run(runs / "small" / "a-1")
    (runs / "small" / "pipeline.json").write_text(json.dumps(PIPELINE))
    return runs


# --- without a browser ----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-9, 9) | st.just(math.nan), min_size=1, max_size=4000), st.integers(1, 50))
@settings(max_examples=50)
def test_a_thinned_curve_is_part_of_the_curve_and_keeps_its_extremes_and_its_end(values: list[float], n: int) -> None:
    steps, full = np.arange(len(values)), np.array(values)
    at, kept = thin(steps, full, n)
    assert len(at) <= 2 * n + 1 and (np.diff(at) > 0).all() and at[-1] == steps[-1]
    np.testing.assert_array_equal(kept, full[at])
    if np.isfinite(full).any():
        assert np.nanmin(kept) == np.nanmin(full) and np.nanmax(kept) == np.nanmax(full)


def test_a_feed_reads_new_steps_only_and_starts_anew_when_the_run_was_wound_back(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", header()) as run:
        feed = Feed(run.folder)
        for step in range(1, 4):
            write_step(run, step, step / 10, [])
        feed.refresh()
        assert feed.since(["reward"], 1) == {"reward": [[2, 3], [0.2, 0.3]]} and feed.version == 0
        write_step(run, 4, math.nan, [])
        feed._looked = -9
        feed.refresh()
        assert feed.since(["reward"], 3) == {"reward": [[4], [None]]} and feed.version == 0
        run.rewind(3)
        for step in range(3, 6):
            write_step(run, step, 0.9, [])
        feed._looked = -9
        feed.refresh()
        assert feed.version == 1 and feed.curves(["reward"])["reward"] == [[1, 2, 3, 4, 5], [0.1, 0.2, 0.9, 0.9, 0.9]]


def test_a_search_finds_every_episode_once_page_by_page_in_its_order(place: Path) -> None:
    with Run.read(place / "hostile") as run:
        stored = [e for e in run.episodes("train") if e.reward is not None]
    for order, key in (("worst", lambda r: r["reward"]), ("longest", lambda r: -r["length"]),
                       ("oldest", lambda r: r["step"]), ("best", lambda r: -r["reward"])):  # fmt: skip
        found = search(place / "hostile", Query(order=order), page=7)
        rows = found.rows
        while found.next is not None:
            found = search(place / "hostile", Query(order=order, start=found.next), page=7)
            rows = rows + found.rows
        assert [key(r) for r in rows] == sorted(key(r) for r in rows), order
        scored = {(r["step"], r["group"], r["index"]) for r in rows if r["reward"] is not None}
        assert scored == {(e.step, e.group, e.index) for e in stored} and len(rows) - len(stored) in (0, 1)


def test_a_search_that_runs_out_of_time_says_where_to_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "LOOK", 1)
    found = search(place / "hostile", Query(order="oldest", text="needle"), seconds=-1.0)
    looks, rows = 1, found.rows
    while found.next is not None:
        found = search(place / "hostile", Query(order="oldest", text="needle", start=found.next), seconds=-1.0)
        looks, rows = looks + 1, rows + found.rows
    assert found.total is not None and looks == found.total + 1 and [r["text"] for r in rows] == ["needle in the hay"]


@pytest.mark.parametrize(
    ("query", "texts"),
    [
        (Query(text="needle"), ["needle in the hay"]),
        (Query(text="NEEDLE"), ["needle in the hay"]),
        (Query(text="100%"), []),  # a per cent sign is text and no pattern
        (Query(text="_"), []),
        (Query(result="unscored"), ["late answer"]),
        (Query(result="failed", first=6, last=6), ["needle in the hay"]),
        (Query(part="correct", bound="most", limit=0.25, first=6), ["needle in the hay", "late answer"]),
        (Query(part="correct", bound="least", limit=0.5, first=6), []),
        (Query(part="x\"' OR 1", bound="least", limit=-9), []),
        (Query(order="flat", last=1), [f"{HOSTILE} 1.0.0"]),
        (Query(kind="eval"), []),
    ],
)
def test_filters_keep_what_they_say(place: Path, query: Query, texts: list[str]) -> None:
    assert [row["text"] for row in search(place / "hostile", query).rows] == texts


@pytest.mark.parametrize(
    "given",
    [{"order": "random"}, {"kind": "x"}, {"result": "1 OR 1"}, {"first": "-1"}, {"start": "9" * 20}, {"limit": "nan"}],
)
def test_a_search_for_what_cannot_be_asked_is_an_error(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="use one of|whole number|not a finite number"):
        Query.of(given)


@pytest.mark.parametrize("order", episodes.ORDERS)
def test_no_order_of_episodes_sorts_in_memory(place: Path, order: str) -> None:
    asked: list[str] = []
    with sqlite3.connect(place / "hostile" / "run.db") as database:
        database.set_trace_callback(asked.append)
        next(iter(episodes._candidates(database, Query(order=order))))
        database.set_trace_callback(None)
        plan = [line[3] for line in database.execute(f"EXPLAIN QUERY PLAN {asked[0]}")]
    database.close()
    assert not [line for line in plan if "TEMP B-TREE" in line], plan


def test_pieces_of_tokens_are_the_text_of_all_of_them(tmp_path: Path) -> None:
    source = tiny.chatty(tmp_path) / "tokenizer.json"
    from tokenizers import Tokenizer

    text = "a b\nnaïve 日本 🙂!"
    ids = np.array([1, *Tokenizer.from_file(str(source)).encode(text, add_special_tokens=False).ids, 2])
    found = tokens.pieces(source, ids)
    assert len(found) == len(ids) and "".join(found) == f"<bos>{text}<eos>"


def test_an_episode_has_its_tokens_and_a_missing_one_is_an_error(place: Path) -> None:
    with Run.read(place / "real") as run:
        stored = run.episodes("train", 2)[0]
    found = tokens.read_episode(place / "real", "train", 2, stored.group, stored.index)
    written = [t for t in found["tokens"] if t["model"]]
    assert found["tokenizer"] and len(written) == stored.length and len(found["answers"]) == 4
    assert [t["logp"] for t in written] == pytest.approx(stored.logprobs[stored.loss_mask].tolist(), rel=1e-4)
    with pytest.raises(ResumeError, match="contains no train episode 99.0 of step 2"):
        tokens.read_episode(place / "real", "train", 2, 99, 0)


def test_a_folder_lists_its_runs_those_of_stages_and_damaged_ones(place: Path, tmp_path: Path) -> None:
    found = {line["name"]: line for line in list_runs(Place(place))}
    assert {name: line["status"] for name, line in found.items()} == {
        "real": "finished", "hostile": "finished", "broken": "damaged", "small~a-1": "finished",
    }  # fmt: skip
    assert "run.json is not JSON" in found["broken"]["note"] and found["hostile"]["metrics"]["reward"] == 0.9
    assert list(Place(place / "real").runs()) == ["real"] and list_runs(Place(tmp_path / "none")) == []


# --- in the browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(place: Path) -> Iterator[Opened]:
    with opened(place) as lab:
        yield lab


def test_a_run_is_found_from_the_first_page_and_its_curves_are_drawn(page: Page, lab: Opened) -> None:
    page.goto(lab.address)
    page.get_by_role("link", name="real", exact=True).click()
    page.wait_for_selector(".chart canvas")
    titles = page.locator(".chart figcaption").all_inner_texts()
    assert {"reward", "accuracy", "eval/accuracy", "length"} <= set(titles)
    label = page.locator(".chart .canvas").first.get_attribute("aria-label") or ""
    assert "Chart of reward over steps" in label and "at step 2" in label
    inked = page.locator(".chart canvas").first.evaluate(
        "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
    )
    assert inked > 3
    page.locator(".chart .canvas").first.press("ArrowRight")
    assert page.locator(".chart .read").first.inner_text().startswith("step 1:")
    page.get_by_role("region", name="What posttrain doctor says").or_(page.get_by_text("had no data")).first.wait_for()


def test_markup_that_a_model_wrote_is_shown_as_text(page: Page, lab: Opened) -> None:
    for path in ("/runs/hostile/episodes", "/runs/hostile/episodes/train/1/0/0", "/runs/hostile"):
        page.goto(lab.address + path)
        page.get_by_text('<script>document.title="owned"</script>').first.wait_for()
        assert page.locator("main script, main img").count() == 0 and "owned" not in page.title()
        text = page.locator("main").inner_text()
        assert "\x1b" not in text and "\u202e" not in text and "\\u001b" in text and "\\u202e" in text


def test_a_search_in_the_address_bar_and_in_the_form_is_the_same(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/runs/hostile/episodes")
    page.get_by_label("text in the prompt or completion").fill("needle")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("needle in the hay").wait_for()
    assert "text=needle" in page.url and page.locator(".episodes li").count() == 1
    page.reload()
    page.get_by_text("needle in the hay").wait_for()
    page.get_by_label("text in the prompt or completion").fill("nobody wrote this")
    page.keyboard.press("Enter")
    page.get_by_text("episodes match").wait_for()


def test_an_answer_shows_who_wrote_each_token_and_its_numbers_by_keyboard(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/runs/real/episodes/train/2/0/1")
    page.wait_for_selector(".span.model .t")
    assert page.locator(".span").first.inner_text().startswith("prompt")
    page.locator(".tokens").press("ArrowLeft")
    assert "log-probability" in page.locator("p.read").inner_text()
    page.get_by_label("advantage").check()
    page.get_by_text("likely; the same for every token").or_(page.get_by_text("neither: all")).first.wait_for()


def test_runs_are_compared_in_one_chart(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/runs")
    for name in ("real", "hostile"):
        page.get_by_label(f"Compare {name}", exact=True).check()
    page.get_by_role("link", name="Compare 2 runs").click()
    page.wait_for_selector(".chart canvas")
    assert page.locator(".legend li").count() == 2 and page.url.endswith("/runs/real?with=hostile")
    expect(page.locator(".chart .canvas").first).to_have_attribute(
        "aria-label", re.compile("hostile: from"), timeout=PATIENCE
    )


def test_a_pipeline_shows_its_cards_and_leads_to_its_runs(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/pipelines/small")
    page.get_by_text("50.0 %").first.wait_for()
    assert "✓ met" in page.locator("main").inner_text()
    page.get_by_role("region", name="Stages in the order they ran").get_by_role("link", name="a", exact=True).click()
    page.wait_for_selector(".chart canvas")


def test_a_live_run_grows_without_reloading_and_a_lost_lab_is_said(page: Page, tmp_path: Path) -> None:
    with Run.create(tmp_path / "live", header()) as run, opened(tmp_path) as lab:
        page.goto(f"{lab.address}/runs/live")
        page.get_by_text("No metrics yet").wait_for()
        for step in (1, 2, 3):
            write_step(run, step, step / 10, [row(step, 0, 0, "x", 1.0)], [Event("info", "a", "b")])
            expect(page.locator("#step")).to_have_text(str(step), timeout=PATIENCE)
        expect(page.locator(".chart .read").first).to_have_text("step 3: 0.3", timeout=PATIENCE)
        lab.process.kill()
        page.get_by_text("The lab is not responding").wait_for()


def test_an_empty_folder_says_which_command_makes_the_first_run(page: Page, tmp_path: Path) -> None:
    with opened(tmp_path / "runs") as lab:
        page.goto(lab.address)
        page.get_by_text("posttrain demo").wait_for()
        page.goto(f"{lab.address}/nothing")
        page.get_by_role("heading", name="Page not found").wait_for()
        page.goto(f"{lab.address}/runs/nothing")
        page.get_by_text("contains no run named 'nothing'").wait_for()


# --- the inspector of one answer ------------------------------------------------------------------------------------


def test_the_kl_of_tokens_is_their_stored_log_probability_less_the_starting_models(place: Path) -> None:
    from posttrain import api
    from posttrain.train.forward import sample_logprobs
    from posttrain.types import Sample

    row = tokens.read_row(place / "real", "train", 2, 0, 1)
    found = score_tokens(place / "real", row)
    sample = Sample(row.tokens.astype(np.int64), row.loss_mask.copy(), row.logprobs.copy(), np.zeros(len(row.tokens)))
    (reference,) = sample_logprobs(api.open_policy(str(place.parent / "tiny")), [sample], 4096)
    wanted = (row.logprobs - reference)[row.loss_mask]
    assert found["kl"] is not None
    assert [v for v in found["kl"]["values"] if v is not None] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert [v is None for v in found["kl"]["values"]] == [not own for own in row.loss_mask]
    assert found["kl"]["total"] == pytest.approx(wanted.sum(), abs=1e-4)


def test_entropy_is_computed_with_the_nearest_weights_and_says_how_near_they_are(place: Path) -> None:
    first, last = (tokens.read_row(place / "real", "eval", step, 0, 0) for step in (0, 2))
    start, end = (score_tokens(place / "real", row)["entropy"] for row in (first, last))
    assert start is not None and end is not None
    assert (start["weights"], start["wanted"], end["weights"], end["wanted"]) == (0, 0, 2, 2)
    assert start["apart"] < 1e-5 and end["apart"] < 1e-5, "the very weights that wrote the answers"
    assert all(0 <= v <= math.log(600) for v in end["values"] if v is not None)


def test_a_run_whose_models_are_elsewhere_has_neither_and_says_where_it_started(place: Path) -> None:
    row = tokens.read_row(place / "hostile", "train", 1, 0, 0)
    assert score_tokens(place / "hostile", row) == {"kl": None, "entropy": None, "start": "nowhere/model"}


def test_a_reason_is_asked_for_again_only_where_that_runs_nothing(place: Path, tmp_path: Path) -> None:
    def asked(reward: str, **more: Any) -> Regraded:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        recipe = {"model": {"path": "abacus"}, "data": {"tasks": "sums", "count": 8}, "reward": {"name": reward}}
        task = load_tasks(DataConfig(tasks="sums", count=8), 0).test[0]
        stored = replace(row(1, 0, 0, f"It is {task.answer}.", 1.0), task_id=task.id)
        with Run.create(folder, {"algorithm": "grpo", "recipe": {**recipe, **more}}) as run:
            write_step(run, 1, 1.0, [stored])
        return judge_again(folder, tokens.read_row(folder, "train", 1, 0, 0))

    found = asked("numeric")
    assert (found["score"], found["passed"], found["error"]) == (1.0, True, None) and found["answer"] in found["detail"]
    for reward, why in (("code", "runs programs"), ("mine.py:judge", "runs code"), ("model:there", "loads a model")):
        with pytest.raises(ConfigError, match=why):
            asked(reward)
    with pytest.raises(ConfigError, match="comes from an environment"):
        asked("numeric", env={"name": "calculator"})
    with pytest.raises(ConfigError, match="was a Python function"):
        judge_again(place / "real", tokens.read_row(place / "real", "train", 2, 0, 1))


def test_an_answer_leads_to_those_stored_before_and_after_it(place: Path) -> None:
    at, seen = [1, 0, 0], [[1, 0, 0]]
    while (after := episodes.read_neighbours(place / "hostile", "train", *at)["after"]) is not None:
        assert episodes.read_neighbours(place / "hostile", "train", *after)["before"] == at
        at = after
        seen.append(at)
    with Run.read(place / "hostile") as run:
        assert seen == [[e.step, e.group, e.index] for e in run.episodes("train")]


def test_recorded_answers_stand_side_by_side_and_no_path_leads_out_of_the_pipeline(tmp_path: Path) -> None:
    rows = {"a": ["helpful", "safe"], "b": ["helpful"]}
    for name, asked in rows.items():
        (tmp_path / name).mkdir()
        lines = [
            {"capability": c, "prompt": "P?", "answer": f"{name} {c}", "passed": True, "detail": "d"} for c in asked
        ]
        (tmp_path / name / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages = [
        {"name": name, "card_folder": folder} for name, folder in (("A", "a"), ("B", "b"), ("C", "../"), ("D", ""))
    ]
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": stages}))
    (tmp_path.parent / "answers.jsonl").write_text('{"capability": "x", "prompt": "secret", "answer": ""}\n')
    found = read_answers(tmp_path)
    assert found["stages"] == ["A", "B"] and [p["capability"] for p in found["prompts"]] == ["helpful", "safe"]
    assert [[a and a["text"] for a in p["answers"]] for p in found["prompts"]] == [
        ["a helpful", "b helpful"],
        ["a safe", None],
    ]


def test_colours_of_an_answer_come_from_models_here_and_keys_lead_to_the_next_answer(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/runs/real/episodes/train/2/0/1")
    page.get_by_label("KL from the starting model").check()
    page.get_by_text("Over the completion it adds up to").wait_for()
    assert page.url.endswith("?colour=kl") and page.locator(".span.model .t[class*=kl-]").count() > 0
    page.get_by_label("entropy").check()
    page.get_by_text("computed just now with the weights of step").wait_for()
    assert page.locator(".group li").count() == 4
    page.keyboard.press("Shift+ArrowRight")
    page.get_by_role("heading", name="Completion 2 of task 0, step 2").wait_for()
    page.get_by_text("computed just now with the weights of step").wait_for()
    page.keyboard.press("Shift+ArrowLeft")
    page.get_by_role("heading", name="Completion 1 of task 0, step 2").wait_for()
    page.get_by_role("button", name="Ask the verifier for its reason").click()
    page.get_by_text("its reward was a Python function, which the run does not keep").wait_for()
