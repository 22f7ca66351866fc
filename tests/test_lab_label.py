"""The labeler: no label that was acknowledged is ever lost, and what people said comes back as a model's scores."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, expect

from posttrain.data.files import Row
from posttrain.data.preferences import row_to_preference
from posttrain.lab.folders import Place
from posttrain.lab.label import agreement, export, sources, store
from posttrain.lab.label.scores import agreement as agreement_with_model
from posttrain.lab.label.store import Label, Pair, Queue
from posttrain.lab.label.training import Trainings, steps_of
from posttrain.types import ConfigError, DataError, Message, Preference, ResumeError
from tests import tiny
from tests.lab_server import PATIENCE, Opened, accessibility, hostile_run, opened, too_wide


def pairs_file(path: Path, count: int) -> Path:
    """Pairs that differ in length; every prompt is another."""
    rows = [
        {"prompt": f"What is {n}+3?", "a": f"{n + 3}", "b": f"The sum of {n} and 3 is {n + 3}."} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def queue_of(root: Path, count: int = 6) -> Queue:
    pairs_file(root / "sums.jsonl", count)
    return Queue.find(root, sources.start(Place(root), "file:sums.jsonl")["queue"])


def said(pair: str, annotator: str, preferred: str, left: str = "a") -> Label:
    return Label(f"{pair}{annotator}", pair, annotator, preferred, left, 1.0)


def body(number: int, annotator: str, choice: str = "left") -> dict[str, Any]:
    return {
        "id": f"{annotator}{number}",
        "pair": f"sums.jsonl:{number}",
        "annotator": annotator,
        "choice": choice,
        "seconds": 2.5,
    }


# --- agreement and position ------------------------------------------------------------------------------------------


def test_kappa_of_a_table_worked_by_hand() -> None:
    # 20 both a, 5 only the first a, 10 only the second a, 15 both b: p = 35/50, c = (25·30 + 25·20)/50² = 0.5
    one = ["a"] * 25 + ["b"] * 25
    other = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    agreed, beyond = agreement.kappa(one, other)
    assert (agreed.value, agreed.n, beyond.chance) == (0.7, 50, 0.5)
    assert beyond.value == pytest.approx(0.4) and beyond.low is not None and beyond.high is not None
    assert beyond.low == pytest.approx((0.5625 - 0.5) / 0.5, abs=1e-3)  # Wilson's ends of 35 of 50: 0.562 and 0.809
    assert beyond.high == pytest.approx((0.8090 - 0.5) / 0.5, abs=1e-3)


said_by_two = st.lists(st.tuples(st.sampled_from(["a", "b", "tie"]), st.sampled_from(["a", "b", "tie"])), min_size=1)


@given(said_by_two)
def test_kappa_does_not_depend_on_who_comes_first_and_is_one_where_all_agree(labels: list[tuple[str, str]]) -> None:
    one, other = [list(x) for x in zip(*labels, strict=True)]
    assert agreement.kappa(one, other) == agreement.kappa(other, one)
    _, perfect = agreement.kappa(one, one)
    assert perfect.value is None if len(set(one)) == 1 else perfect.value == pytest.approx(1)
    _, beyond = agreement.kappa(one, other)
    if beyond.value is not None and beyond.low is not None and beyond.high is not None:
        assert beyond.low <= beyond.value + 1e-9 and beyond.value <= beyond.high + 1e-9 and beyond.value <= 1 + 1e-9


def test_a_person_who_always_takes_the_left_answer_is_found_out() -> None:
    labels = [said(f"p{n}", "ada", "a" if n % 2 else "b", "a" if n % 2 else "b") for n in range(40)]
    labels += [said(f"p{n}", "bo", "a", "a" if n % 2 else "b") for n in range(40)]
    ada, bo = agreement.habits([*labels, said("p99", "bo", "tie")])
    assert ada["left"]["value"] == 1 and ada["left"]["low"] > 0.9
    assert (bo["left"]["value"], bo["left"]["n"], bo["ties"], bo["labels"]) == (0.5, 40, 1, 41)
    assert bo["left"]["low"] < 0.5 < bo["left"]["high"]


def test_sides_are_a_fair_coin_of_their_own_for_each_annotator() -> None:
    sides = {who: [store.left_of("q", who, f"p{n}") for n in range(2000)] for who in ("ada", "bo")}
    for one in sides.values():
        assert 900 < one.count("a") < 1100  # 4.5 standard deviations either side
    same = sum(a == b for a, b in zip(sides["ada"], sides["bo"], strict=True))
    assert 900 < same < 1100


# --- what can be labelled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"prompt": "Q?", "chosen": "yes", "rejected": "no", "label": 0.5}, [("yes", "no")]),
        ({"prompt": "Q?", "a": "yes", "b": "no"}, [("yes", "no")]),
        ({"prompt": "Q?", "first": "yes", "second": "no", "preferred": "second"}, [("yes", "no")]),
        ({"question": "Q?", "responses": ["x", "y", "x", "z"]}, [("x", "y"), ("x", "z"), ("y", "z")]),
    ],
)
def test_rows_of_two_or_several_answers_become_pairs(row: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    found = sources.pairs_of_row(Row("f.jsonl:1", row))
    assert [(p.chosen, p.rejected, p.label) for p in found] == [(*pair, 1.0) for pair in pairs]
    assert all(p.prompt == (Message("user", "Q?"),) for p in found) and len({p.id for p in found}) == len(found)


@pytest.mark.parametrize(
    "row", [{"prompt": "Q?", "a": "yes"}, {"prompt": "Q?", "responses": ["x", "x"]}, {"a": "x", "b": "y"}]
)
def test_a_row_without_a_pair_is_an_error_that_names_it(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:7"):
        sources.pairs_of_row(Row("f.jsonl:7", row))


def test_files_and_runs_of_the_folder_are_offered_and_what_is_no_pair_is_not(tmp_path: Path) -> None:
    pairs_file(tmp_path / "sums.jsonl", 3)
    (tmp_path / "texts.jsonl").write_text('{"text": "no pair"}\n')
    (tmp_path / "broken.jsonl").write_text("{")
    hostile_run(tmp_path / "hostile")
    pairs_file(tmp_path / "hostile" / "pairs.jsonl", 2)
    found = sources.list_sources(Place(tmp_path))
    assert [one["source"] for one in found] == ["file:sums.jsonl", "file:hostile/pairs.jsonl", "run:hostile"]
    made = sources.start(Place(tmp_path), "run:hostile")
    pairs = Queue.find(tmp_path, "hostile").pairs()
    assert made["pairs"] == len(pairs) == 11 and all(pair.a != pair.b for pair in pairs)
    with pytest.raises(ResumeError, match="nothing named"):
        sources.start(Place(tmp_path), "file:../secret.jsonl")


# --- the store -------------------------------------------------------------------------------------------------------


def test_a_label_sent_twice_is_one_label_and_the_newest_of_a_pair_counts(tmp_path: Path) -> None:
    queue = queue_of(tmp_path)
    for _ in range(3):
        assert queue.add(body(1, "ada")) == "ada1"
    queue.add({**body(1, "ada", "tie"), "id": "second thoughts"})
    (label,) = queue.labels()
    assert label.preferred == "tie" and queue.progress() == (6, {"ada": 1})
    queue.undo("second thoughts")
    queue.undo("second thoughts")
    (label,) = queue.labels()
    assert label.id == "ada1" and label.preferred == label.left == store.left_of("sums", "ada", "sums.jsonl:1")
    queue.undo("ada1")
    queue.add(body(1, "ada"))  # a copy that was on its way when it was taken back
    assert queue.labels() == [] and len(queue.waiting("ada", 99)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "id is ''"),
        ({"annotator": "x" * 61}, "1 to 60"),
        ({"choice": "both"}, "left, right or tie"),
        ({"seconds": -1}, "seconds are -1"),
        ({"seconds": None}, "seconds are None"),
        ({"pair": "nothing"}, "no pair 'nothing'"),
    ],
)
def test_what_is_no_label_is_refused_and_not_stored(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    queue = queue_of(tmp_path)
    with pytest.raises(ConfigError, match=message):
        queue.add({**body(1, "ada"), **change})
    assert queue.labels() == []


def test_finding_a_queue_opens_its_file_only_and_no_file_outside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, pair = queue_of(tmp_path), Preference("1", (Message("user", "?"),), "a", "b")
    for name in ("other", "third"):
        store.create(tmp_path, name, "elsewhere", [pair])
    opened_files, connect = [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **more: (opened_files.append(path), connect(path, **more))[1])
    assert Queue.find(tmp_path, queue.name).pairs()
    assert opened_files and all("/sums.db" in uri for uri in opened_files)
    for name in ("nobody", "../labels/sums", "sums.db"):
        with pytest.raises(ResumeError, match="no queue named"):
            Queue.find(tmp_path, name)


def test_two_who_start_the_same_queue_share_it_and_another_source_of_that_name_is_refused(tmp_path: Path) -> None:
    pairs_file(tmp_path / "sums.jsonl", 40)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: sources.start(Place(tmp_path), "file:sums.jsonl")["queue"], range(4)))
    assert made == ["sums"] * 4 and len(Queue.find(tmp_path, "sums").pairs()) == 40
    with pytest.raises(ConfigError, match="already exists"):
        store.create(tmp_path, "sums", "elsewhere", [])


# --- the export ------------------------------------------------------------------------------------------------------

PAIRS = [Pair(f"p{n}", (Message("user", f"Q{n}?"),), "yes", "no") for n in range(4)]
LABELS = [
    said("p0", "ada", "a"), said("p0", "bo", "a"), said("p0", "cy", "b"),
    said("p1", "ada", "b"), said("p1", "bo", "tie"),
    said("p2", "ada", "tie"), said("p2", "bo", "tie"), said("p2", "cy", "a"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("who", "ties", "expected"),
    [
        (
            "each",
            "drop",
            [("yes", 1.0, "ada"), ("yes", 1.0, "bo"), ("no", 1.0, "cy"), ("no", 1.0, "ada"), ("yes", 1.0, "cy")],
        ),
        ("majority", "keep", [("yes", 1.0, "ada, bo, cy"), ("yes", 0.5, "ada, bo"), ("yes", 0.5, "ada, bo, cy")]),
        ("majority", "drop", [("yes", 1.0, "ada, bo, cy")]),
        ("share", "keep", [("yes", 2 / 3, "ada, bo, cy"), ("no", 0.75, "ada, bo"), ("yes", 2 / 3, "ada, bo, cy")]),
    ],
)
def test_an_export_holds_what_annotators_said(who: str, ties: str, expected: list[tuple[str, float, str]]) -> None:
    found = export.rows(PAIRS, LABELS, who, ties)
    assert [(row["chosen"], pytest.approx(row["label"]), row["annotator"]) for row in found] == expected
    for n, row in enumerate(found):  # the reader of `posttrain reward` and `posttrain dpo`
        read = row_to_preference(Row(f"f:{n}", row))
        assert isinstance(read, Preference) and (read.chosen, read.label) == (row["chosen"], row["label"])
        assert read.prompt == (Message("user", f"Q{row['id'][1:]}?"),)


def test_exports_are_named_by_what_they_hold_and_kept(tmp_path: Path) -> None:
    queue = queue_of(tmp_path)
    with pytest.raises(DataError, match="no labels to export"):
        export.write(queue)
    queue.add(body(1, "ada"))
    first, count = export.write(queue)
    assert count == 1 and export.write(queue)[0] == first
    queue.add(body(2, "ada"))
    second, count = export.write(queue)
    assert count == 2 and list(export.written(tmp_path, "sums").values()) == sorted([first, second])
    with pytest.raises(ConfigError, match="each, majority, share"):
        export.write(queue, "loudest")


def test_training_is_refused_where_a_new_run_would_lie_inside_another_and_for_what_is_no_number(tmp_path: Path) -> None:
    folder = hostile_run(tmp_path / "alone")
    made = sources.start(Place(folder), "run:alone")
    queue = Queue.find(folder, made["queue"])
    queue.add({**body(1, "ada"), "pair": queue.pairs()[0].id})
    with pytest.raises(ConfigError, match="Open the folder above"):
        Trainings(Place(folder)).start(queue, "each", "keep", "abacus", 1)
    for steps in (0, "4", True, 10_001):
        with pytest.raises(ConfigError, match="whole number from 1"):
            steps_of(steps)


def test_a_model_is_judged_on_prompts_it_did_not_see_and_ties_and_unread_pairs_are_left_out() -> None:
    scores = {"p0": (2.0, 1.0), "p1": (0.0, 1.0), "p2": (1.0, 0.0), "p3": None}
    rows = {row["name"]: row for row in agreement_with_model([*LABELS, said("p3", "ada", "a")], scores, {"p1"})}
    assert rows["ada"]["held_out"] == pytest.approx({"value": 1.0, "low": 0.2065, "high": 1.0, "n": 1}, abs=1e-3)
    assert (rows["cy"]["held_out"]["value"], rows["cy"]["held_out"]["n"]) == (0.5, 2)  # p0 wrong, p2 right
    assert (rows["everyone"]["held_out"]["n"], rows["everyone"]["trained"]["n"]) == (4, 1)
    assert rows["bo"]["trained"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0}


# --- a lab that is killed --------------------------------------------------------------------------------------------


def call(lab: Opened, path: str, sent: dict[str, Any] | None = None) -> Any:
    headers = {"x-lab-token": lab.token, "content-type": "application/json", "origin": lab.address}
    data = None if sent is None else json.dumps(sent).encode()
    request = urllib.request.Request(lab.address + path, data, headers)
    return json.loads(urllib.request.urlopen(request, timeout=600).read())


def test_sigkill_at_random_moments_loses_no_acknowledged_label(tmp_path: Path) -> None:
    queue = queue_of(tmp_path, 4000)
    acknowledged: list[str] = []
    draw = random.Random(7)
    numbers = iter(range(1, 4001))
    lock = threading.Lock()

    def label(lab: Opened, who: str) -> None:
        while True:
            with lock:
                number = next(numbers)
            try:
                stored = call(lab, "/api/label/sums/labels", body(number, who))["stored"]
            except (OSError, urllib.error.URLError, ValueError):
                return  # killed before it said that it was stored: the label may be there or not
            acknowledged.append(stored)

    for _ in range(3):
        before = len(acknowledged)
        with opened(tmp_path) as lab:
            people = [threading.Thread(target=label, args=(lab, who)) for who in ("ada", "bo")]
            for one in people:
                one.start()
            deadline = time.monotonic() + PATIENCE / 1000
            while len(acknowledged) < before + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.3))
            lab.process.kill()
            for one in people:
                one.join(PATIENCE / 1000)
        assert len(acknowledged) >= before + 3
        stored = {one.id for one in queue.labels()}
        assert set(acknowledged) <= stored and len(stored) <= len(acknowledged) + 2 * (1 + _)
        with sqlite3.connect(queue.path) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.close()


# --- in the browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, a run whose answers try to be markup, and one whose model is small enough to train."""
    root = tmp_path_factory.mktemp("label")
    hostile_run(root / "base")
    tiny.chatty(root / "base" / "model")
    pairs_file(root / "together.jsonl", 12)
    pairs_file(root / "loop.jsonl", 24)
    return root


@pytest.fixture(scope="module")
def lab(place: Path) -> Iterator[Opened]:
    with opened(place) as lab:
        yield lab


def start(page: Page, lab: Opened, source: str, queue: str, who: str) -> None:
    """Opens a queue from the list and gives a name."""
    page.goto(f"{lab.address}/label")
    page.get_by_role("button", name=f"Label {source}", exact=True).or_(
        page.get_by_role("link", name=queue, exact=True)
    ).first.click()
    page.get_by_label("Your name").fill(who)
    page.keyboard.press("Enter")
    page.get_by_role("region", name="The pair").wait_for()


def press_longer(page: Page) -> str:
    """Takes the longer answer of the pair that is shown, by keyboard; returns which key that was."""
    answers = page.locator(".answers .said")
    expect(answers).to_have_count(2, timeout=PATIENCE)  # a page that has run out of pairs asks the lab for more
    left, right = answers.all_inner_texts()
    key = "1" if len(left) > len(right) else "2"
    page.keyboard.press(key)
    return key


def progress(page: Page, done: int, count: int) -> None:
    """Waits until the page says so."""
    expect(page.locator(".progress")).to_contain_text(f"{done} of {count} labelled", timeout=PATIENCE)


def test_two_people_in_two_browsers_at_once_lose_no_label(
    page: Page, browser: Browser, lab: Opened, place: Path
) -> None:
    start(page, lab, "together.jsonl", "together", "ada")
    context = browser.new_context(reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    other = context.new_page()
    start(other, lab, "together.jsonl", "together", "bo")
    for n in range(12):
        press_longer(page)
        if n == 3:  # one label taken back and given anew
            progress(page, 4, 12)
            page.keyboard.press("u")
            progress(page, 3, 12)
            press_longer(page)
        other.get_by_role("button", name="A is better").click() if n % 2 else other.keyboard.press("0")
        progress(page, n + 1, 12)
        progress(other, n + 1, 12)
    for one in (page, other):
        one.get_by_text("✓ All labels are stored.").wait_for()
        one.get_by_text("You have labelled every pair").wait_for()
        progress(one, 12, 12)
    labels = Queue.find(place, "together").labels()
    assert Counter(x.annotator for x in labels) == {"ada": 12, "bo": 12}
    assert {x.preferred for x in labels if x.annotator == "ada"} == {"b"}  # the longer one, on whichever side it stood
    assert Counter(x.preferred == "tie" for x in labels if x.annotator == "bo") == {True: 6, False: 6}
    assert {x.left for x in labels if x.annotator == "ada"} == {"a", "b"} and all(x.seconds >= 0 for x in labels)
    row = page.get_by_role("row", name="ada and bo")
    expect(row).to_contain_text("of 12", timeout=PATIENCE)
    shown = row.inner_text()
    agreed, beyond = agreement.kappa(
        *([x.preferred for x in sorted(labels, key=lambda x: x.pair) if x.annotator == who] for who in ("ada", "bo"))
    )
    assert f"{100 * agreed.value:.1f} %" in shown and beyond.value is not None
    context.close()


def test_labels_wait_in_the_page_while_the_lab_is_gone_and_arrive_when_it_is_back(page: Page, tmp_path: Path) -> None:
    queue = queue_of(tmp_path, 10)
    with opened(tmp_path) as lab:
        page.goto(f"{lab.address}/label/sums?as=ada")
        page.get_by_role("region", name="The pair").wait_for()
        press_longer(page)
        page.get_by_text("✓ All labels are stored.").wait_for()
        page.get_by_text("1 of 10 labelled").wait_for()
        lab.process.kill()
        lab.process.wait()
        for n in range(3):
            press_longer(page)
            progress(page, n + 2, 10)
        page.keyboard.press("u")
        page.get_by_text("labels not stored yet.").wait_for()
        progress(page, 3, 10)
        assert len(queue.labels()) == 1
    with opened(tmp_path, "--port", str(lab.port)):  # another launch, whose token is new
        page.get_by_text("✓ All labels are stored.").wait_for()
        assert len(queue.labels()) == 3 and {x.preferred for x in queue.labels()} == {"b"}
        page.reload()
        page.get_by_text("3 of 10 labelled").wait_for()
        page.keyboard.press("u")  # what was said before the reload can be taken back, too
        page.get_by_text("2 of 10 labelled").wait_for()
        page.get_by_text("✓ All labels are stored.").wait_for()
        assert len(queue.labels()) == 2


def test_labels_become_a_reward_model_whose_scores_come_back_to_the_page(page: Page, lab: Opened, place: Path) -> None:
    start(page, lab, "loop.jsonl", "loop", "ada")
    for n in range(24):
        press_longer(page)
        progress(page, n + 1, 24)
    page.get_by_text("✓ All labels are stored.").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert len(rows) == 24 and all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    page.get_by_role("button", name="Write the file and show the commands").click()
    command = page.locator(".command").first.inner_text()
    assert command.startswith("posttrain reward --model abacus --data ") and str(place / "labels" / "loop-") in command
    page.get_by_label("start from").select_option("base")
    page.get_by_label("updates").fill("6")
    with page.expect_response(lambda answer: answer.url.endswith("/models")):  # asked every few seconds
        pass
    page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)))")
    expect(page.get_by_label("updates")).to_have_value("6")
    page.get_by_role("button", name="Train a reward model").click()
    page.get_by_role("heading", name="Scores of").wait_for(timeout=4 * PATIENCE)
    run = next(path for path in place.iterdir() if path.name.startswith("loop-reward-"))
    page.get_by_role("cell", name="finished").wait_for()
    judged = page.get_by_role("region", name="Agreement of model and annotators")
    judged.wait_for(timeout=4 * PATIENCE)
    row = judged.get_by_role("row", name="ada").inner_text()
    assert "of 6" in row and "of 18" in row  # a quarter of the prompts was held out
    again = call(lab, "/api/label/loop/train", {"model": "base", "steps": 6})  # the same once more starts nothing
    assert again["run"] == run.name and len(list(place.glob("loop-reward-*"))) == 1
    shown = page.locator(".scored li").first
    assert shown.inner_text().count("score ") == 2 and "preferred by ada" in shown.inner_text()
    assert "▲" in shown.inner_text()
    page.get_by_role("link", name=run.name).click()
    page.get_by_role("heading", name=run.name).wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_labeler_is_accessible_and_fits_a_phone(page: Page, lab: Opened, place: Path, scheme: Any) -> None:
    sources.start(Place(place), "run:base")
    queue = Queue.find(place, "base")
    for who in ("ada", "bo"):
        for pair in queue.waiting(who, 99)[:6]:
            queue.add({"id": f"{who}{pair.id}", "pair": pair.id, "annotator": who, "choice": "left", "seconds": 1})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for path, ready in (
        ("/label", "Queues"),
        ("/label/base", "Start labelling"),
        ("/label/base?as=ada", "Train a reward model"),
    ):
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(lab.address + path)
            page.get_by_text(ready).first.wait_for()
            assert accessibility(page) == [] and not too_wide(page), (path, width)
    assert page.locator("main script, main img").count() == 0 and "owned" not in page.title()


def test_an_empty_folder_says_what_to_put_there(page: Page, tmp_path: Path) -> None:
    with opened(tmp_path) as lab:
        page.goto(f"{lab.address}/label")
        page.get_by_role("heading", name="There is nothing to label yet").wait_for()
        page.goto(f"{lab.address}/label/nothing?as=ada")
        page.get_by_text("contains no queue named 'nothing'").wait_for()
