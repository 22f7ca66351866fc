"""The reward-hacking explorer: a rule, a reward model that is right near the start, and two runs that show the rest."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page
from starlette.datastructures import QueryParams
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection, connect

from posttrain.lab.explore import goodhart, hacking, pair
from posttrain.lab.explore.goodhart import LONGEST, STOP, WORDS, Optimisation, World
from posttrain.lab.explore.hacking import Asked
from posttrain.lab.explore.pair import Pair
from posttrain.types import ConfigError
from tests.lab_server import Opened, accessibility, opened, too_wide

STEPS = 80
texts = st.lists(st.sampled_from(WORDS), max_size=LONGEST).map(" ".join)


@pytest.fixture(scope="module")
def world() -> World:
    return goodhart.make_world(0)


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("welcome we are open from nine to six near the station", 3 + 0.5 - 0.25),  # three facts, polite, 11 words
        ("open from nine to six near the station thanks", 3 + 0.5),
        ("open from ten to six near the harbour", 1 - 1 - 1),
        ("thanks thanks", -0.5),  # polite twice is not polite once, and a word is said again
        ("nine " * 12, 1 - 11 * 0.5 - 2 * 0.25),
        ("", 0),
    ],
)
def test_the_true_reward_is_what_the_rule_says(answer: str, worth: float) -> None:
    assert float(goodhart.true_reward(goodhart.read(answer)[None])) == worth


@given(texts)
def test_an_answer_is_read_as_it_was_written_and_its_parts_add_up(text: str) -> None:
    answer = goodhart.read(text)
    assert goodhart.written(answer) == text
    assert sum(float(p) for p in goodhart.points(answer[None]).values()) == float(goodhart.true_reward(answer[None]))


@given(texts, st.sampled_from(WORDS))
def test_saying_a_word_again_never_raises_the_true_reward_but_a_liked_word_raises_the_score(
    text: str, word: str
) -> None:
    words = [*text.split(), word][-LONGEST + 1 :]
    once, twice = goodhart.read(" ".join(words))[None], goodhart.read(" ".join([*words, word]))[None]
    assert float(goodhart.true_reward(twice)) < float(goodhart.true_reward(once))
    assert float((goodhart.counts(twice) - goodhart.counts(once)).sum()) == 1  # which is all that the model sees


# --- the policy and the reward model --------------------------------------------------------------------------------


def test_the_probabilities_of_all_answers_add_up_to_one_and_sampling_follows_them(world: World) -> None:
    answers = goodhart.sample(world.start, 4000, torch.Generator().manual_seed(1))
    logp, mask = goodhart.log_probabilities(world.start, answers)
    assert mask[:, 0].all() and (mask.sum(1) == (answers != STOP).sum(1).add(1).clamp(max=LONGEST)).all()
    first = answers[:, 0].bincount(minlength=STOP + 1) / len(answers)
    every = torch.full((STOP + 1, LONGEST), STOP)
    every[:, 0] = torch.arange(STOP + 1)
    said, _ = goodhart.log_probabilities(world.start, every)
    assert float(said[:, 0].exp().sum()) == pytest.approx(1, abs=1e-5)
    assert first.tolist() == pytest.approx(said[:, 0].exp().tolist(), abs=0.03)
    assert logp[mask].max() <= 0


def test_the_reward_model_is_right_near_the_start_and_starts_at_the_true_mean(world: World) -> None:
    answers = goodhart.sample(world.start, 2000, torch.Generator().manual_seed(2))
    proxy, true = goodhart.counts(answers) @ world.weights + world.bias, goodhart.true_reward(answers)
    found = goodhart.agreement(proxy, true)
    assert found is not None and found > 0.85 and world.agreement > 0.85
    assert float(proxy.mean()) == pytest.approx(float(true.mean()), abs=0.15)


def test_agreement_is_the_share_of_ordered_pairs() -> None:
    true = torch.tensor([0.0, 1.0, 1.0, 2.0])  # five pairs differ
    assert goodhart.agreement(torch.tensor([0.0, 1.0, 5.0, 2.0]), true) == pytest.approx(4 / 5)
    assert goodhart.agreement(torch.tensor([3.0, 2.0, 1.0]), torch.ones(3)) is None


def test_a_run_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(world: World) -> None:
    before = torch.get_rng_state()
    alone = [told["on"] for told in play(Pair(world, 0.2, 5), 10)]
    pairs = [Pair(world, 0.2, 5) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:  # three viewers at once
        together = list(pool.map(lambda pair: [told["on"] for told in play(pair, 10)], pairs))
    assert together == [alone] * 3
    assert torch.equal(before, torch.get_rng_state())
    other = play(Pair(world, 0.2, 6), 2)
    assert other[1]["on"]["samples"] != alone[1]["samples"]


def play(pair: Pair, steps: int) -> list[dict[str, Any]]:
    return [pair.step() for _ in range(steps + 1)]


def test_a_run_is_the_same_however_many_threads_there_are_and_leaves_them_as_they_were() -> None:
    threads, told = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            goodhart.make_world.cache_clear()
            told.append(play(Pair(goodhart.make_world(7), 0.2, 7), 5))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert told[0] == told[1]


def test_both_runs_begin_as_the_start_with_no_distance(world: World) -> None:
    first = Pair(world, 0.3, 0).step()
    assert first["off"] == first["on"] and first["off"]["kl"] == 0 and first["step"] == 0


# --- the discovery --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_penalty_the_proxy_rises_and_the_truth_falls_and_the_penalty_holds_both(seed: int) -> None:
    told = play(Pair(goodhart.make_world(seed), 0.3, seed), STEPS)
    off, on, start = told[-1]["off"], told[-1]["on"], told[0]["off"]
    assert off["proxy"] > start["proxy"] + 2
    assert off["true"] < off["best"][1] - 2 and off["true"] < start["true"]
    assert on["true"] > start["true"] + 0.5 and on["true"] > off["true"] + 2
    assert abs(on["proxy"] - on["true"]) < 1.5 < off["proxy"] - off["true"]
    assert on["kl"] < off["kl"] / 3
    gained = off["exploited"]
    assert gained["now"] > gained["before"] and gained["weight"] > 0
    assert gained["gained"] == pytest.approx((gained["now"] - gained["before"]) * gained["weight"], abs=1e-3)


def test_a_strong_penalty_ends_nearer_and_a_stop_ends_a_run_at_once(world: World) -> None:
    go = threading.Event()
    strong, weak = (pair.ending(world, beta, 0, 60, go) for beta in (1.0, 0.2))
    assert strong["kl"] < weak["kl"] and strong["proxy"] < weak["proxy"]
    run = Optimisation(world, 1.0, 0)
    steps = [run.step() for _ in range(61)]
    assert strong["true"] == pytest.approx(sum(float(s.true.mean()) for s in steps[-10:]) / 10, abs=1e-3)


# --- the address and the socket -------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "beta=x&seed=0&steps=40", "beta=3&seed=0&steps=40", "beta=nan&seed=0&steps=40",
                                   "beta=0&seed=-1&steps=40", "beta=0&seed=0&steps=9999"])  # fmt: skip
def test_what_cannot_be_asked_is_said_in_one_sentence(query: str) -> None:
    with pytest.raises(ConfigError, match="is not"):
        Asked.of(QueryParams(query))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    with opened(tmp_path_factory.mktemp("empty")) as lab:
        yield lab


def talk(lab: Opened, query: str, path: str = "") -> ClientConnection:
    address = lab.address.replace("http", "ws")
    return connect(f"{address}/live/explore/hacking{path}?{query}&token={lab.token}", origin=lab.address)  # type: ignore[arg-type]


def test_a_socket_plays_pauses_steps_and_ends_with_its_page(lab: Opened) -> None:
    with talk(lab, "beta=0.3&seed=0&steps=20") as socket:
        ready, first = json.loads(socket.recv(600)), json.loads(socket.recv(600))
        assert (ready["kind"], first["step"]) == ("ready", 0) and len(ready["weights"]) == len(ready["words"])
        socket.send("fast")
        for step in (1, 2):
            socket.send("step")
            assert json.loads(socket.recv(600))["step"] == step
        with pytest.raises(TimeoutError):
            socket.recv(0.3)  # nothing more was asked for
        threads = count_threads(lab)
        socket.send("play")
        told = [json.loads(socket.recv(600)) for _ in range(19)]
        assert [t.get("step") for t in told] == [*range(3, 21), None] and told[-1]["kind"] == "end"
    with talk(lab, "beta=0&seed=0&steps=300", "/frontier") as socket:
        assert json.loads(socket.recv(600))["betas"][-1] == 0
    deadline = time.time() + 600
    while cpu_grows(lab) and time.time() < deadline:
        pass
    assert not cpu_grows(lab), "a run goes on after its page was closed"
    assert count_threads(lab) <= threads + 2


def count_threads(lab: Opened) -> int:
    return len(list(Path(f"/proc/{lab.process.pid}/task").iterdir()))


def cpu_grows(lab: Opened) -> bool:
    """Whether the lab works for more than a tenth of half a second."""

    def used() -> int:
        fields = Path(f"/proc/{lab.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # hundredths of a second

    before = used()
    time.sleep(0.5)
    return used() - before > 5


@pytest.mark.parametrize(("query", "word"), [("beta=9&seed=0&steps=40", ""), ("beta=0&seed=0&steps=40", "dance")])
def test_a_socket_that_asks_for_nonsense_is_told_so_and_closed(lab: Opened, query: str, word: str) -> None:
    with talk(lab, query) as socket:
        if word:
            socket.send(word)
        messages: list[dict[str, Any]] = []
        with pytest.raises(ConnectionClosedError, match="1008"):
            while True:
                messages.append(json.loads(socket.recv(600)))
        assert "error" in messages[-1]


# --- in the browser -------------------------------------------------------------------------------------------------


def figures(page: Page, run: str) -> dict[str, float]:
    """The table of means: what a column says of each row."""
    table = page.locator("table", has_text="Means over 64 answers")
    heads = table.locator("thead th").all_inner_texts()
    column = next(i for i, head in enumerate(heads) if head.startswith(run))
    cells = [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]
    return {cell[0]: float(cell[column].replace("−", "-")) for cell in cells[:3]}


def test_a_reader_sees_the_proxy_run_away_and_the_penalty_hold_it(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/hacking?steps=100")
    page.get_by_label("maximum").check()
    page.get_by_role("button", name="One step").click()
    page.get_by_role("heading", name="Sample answers at step 1").wait_for()
    page.get_by_role("button", name="Start").click()
    page.get_by_role("heading", name="Sample answers at step 100").wait_for()
    start, off, on = (figures(page, run) for run in ("At the start", "Penalty off", "Penalty on"))
    score, true, far = "Reward model’s score", "True reward", "KL from the start, nats"
    assert off[score] > start[score] + 2 and off[true] < start[true] and on[true] > off[true] + 2
    assert off[far] > 3 * on[far]
    assert "below its best" in page.locator(".verdict p").first.inner_text()
    page.get_by_role("slider", name="Step shown").press("Home")
    page.get_by_role("heading", name="Sample answers at step 0").wait_for()
    assert figures(page, "Penalty off") == start and page.url.endswith("?steps=100&at=0")
    page.get_by_label("penalty on", exact=True).check()
    assert page.locator(".samples").count() == 1 and "show=on" in page.url


def test_a_link_reproduces_what_was_seen_and_another_penalty_starts_anew(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/hacking?beta=0.5&steps=40&at=30")
    page.get_by_role("heading", name="Sample answers at step 30").wait_for()
    told = play(Pair(goodhart.make_world(0), 0.5, 0), 30)[-1]
    shown = figures(page, "Penalty on")
    assert shown["True reward"] == pytest.approx(told["on"]["true"], abs=0.01)
    assert told["on"]["samples"][0]["text"] in page.locator(".samples").nth(1).inner_text()
    page.get_by_role("slider", name="KL penalty β").press("ArrowRight")
    page.get_by_role("heading", name="Sample answers at step 40").wait_for()
    assert "beta=0.55" in page.url and "at=" not in page.url


def test_the_frontier_arrives_run_by_run(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/hacking?steps=40")
    page.get_by_role("button", name="Run them all").click()
    page.locator(".frontiers tbody tr").first.wait_for()
    page.locator(".frontiers tbody tr").nth(len(hacking.BETAS) - 1).wait_for()
    rows = [row.locator("th, td").all_inner_texts() for row in page.locator(".frontiers tbody tr").all()]
    far = [float(row[1]) for row in rows]
    assert far == sorted(far) and float(rows[0][0]) == 2 and "frontier=true" in page.url


def test_a_page_whose_lab_was_closed_says_so(page: Page, tmp_path: Path) -> None:
    with opened(tmp_path) as lab:
        page.goto(f"{lab.address}/explore/hacking?steps=40")
        page.get_by_role("heading", name="Sample answers at step 0").wait_for()
        lab.process.terminate()
        page.get_by_text("Lost the connection to the lab, and these runs with it.").wait_for()
        page.get_by_role("button", name="Try again").wait_for()


def test_the_page_is_accessible_and_fits(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/hacking?steps=40&at=20")
    page.get_by_role("heading", name="Sample answers at step 20").wait_for()
    for width, scheme in product((1280, 390), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert accessibility(page) == [] and not too_wide(page), (width, scheme)
