"""The GRPO explorer: a real group of a real model, the library's own advantages, and a real update of a copy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Locator, Page, expect
from starlette.requests import Request

from posttrain.data.tasks.abacus import Problem, held_out
from posttrain.lab.explore import grpo
from posttrain.lab.explore.group import COMPARE, Writer, compare, describe
from posttrain.lab.explore.problems import BEYOND, listed, task_of
from posttrain.lab.explore.update import update
from posttrain.lab.folders import Place
from posttrain.models.load import trainable
from posttrain.objectives.advantages import group_relative, leave_one_out
from posttrain.rewards.skills import judge
from posttrain.types import ConfigError
from tests.lab_server import PATIENCE, Opened, accessibility, opened, too_wide

rewards = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=2, max_size=32)  # what the sliders can be
variants = pytest.mark.parametrize("how", grpo.VARIANTS)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    return Writer(Place(tmp_path_factory.mktemp("runs")))


def request(**query: object) -> Request:
    asked = "&".join(f"{name}={value}" for name, value in query.items()).replace("+", "%2B")
    return Request({"type": "http", "query_string": asked.encode(), "headers": []})


# --- what the page shows --------------------------------------------------------------------------------------------


@variants
@given(rewards=rewards)
def test_the_steps_shown_lead_to_the_advantages_that_train(how: str, rewards: list[float]) -> None:
    found = compare(rewards, how, 0)
    trains = COMPARE[how](torch.tensor([rewards], dtype=torch.float64))[0].tolist()
    assert found["advantages"] == trains and found["flat"] == (len(set(rewards)) == 1)
    if not found["flat"]:
        shown = [(r - b) / found["divisor"] for r, b in zip(rewards, found["baselines"], strict=True)]
        assert shown == pytest.approx(trains)


def test_every_variant_of_the_page_is_one_that_trains() -> None:
    assert tuple(COMPARE) == grpo.VARIANTS


def test_two_right_answers_of_eight_by_hand() -> None:
    found = compare([1, 0, 0, 0, 0, 1, 0, 0], "grpo", 0)
    std = math.sqrt((2 * 0.75**2 + 6 * 0.25**2) / 7)
    assert (found["mean"], found["std"]) == pytest.approx((0.25, std))
    assert found["advantages"] == pytest.approx([a / std for a in (0.75, *[-0.25] * 4, 0.75, -0.25, -0.25)])
    assert found["others"] == pytest.approx([0.875 / math.sqrt(1 / 8), 0])  # the only right one; all right


@variants
@given(size=st.integers(2, 32), reward=st.integers(1, 19).map(lambda n: n / 20))
def test_the_same_reward_is_good_beside_wrong_answers_and_bad_beside_right_ones(
    how: str, size: int, reward: float
) -> None:
    low, high = compare([reward] + [1.0] * (size - 1), how, 0)["others"]
    assert low > 0 > high


# --- the group ------------------------------------------------------------------------------------------------------


def test_the_problems_are_held_out_and_one_is_beyond_the_model() -> None:
    assert len(set(listed())) == len(listed()) and BEYOND in listed() and task_of(BEYOND).answer == "391"
    for problem in (one for one in listed() if one != BEYOND):
        task = task_of(problem)
        terms = sorted(problem.split("+"))  # the key of a sum's problem is ordered
        key = "+".join(terms) if "+" in problem else problem
        assert held_out(Problem(f"{task.meta['kind']}:{key}", "", "", "", "")), problem


@pytest.mark.parametrize(
    "problem", ["", "2**9", "1+2+3+4", "9999*9", "0*7", "7*0", "98 * 8", "__import__('os')", "8/2"]
)
def test_what_is_no_problem_of_the_page_is_refused(problem: str) -> None:
    with pytest.raises(ConfigError, match="unsupported problem"):
        task_of(problem)


def test_a_group_is_graded_by_the_verifier_and_comes_back_the_same(writer: Writer) -> None:
    group = writer.group("98*8", 3, 8)
    for answer in group.answers:
        assert answer.verdict == judge("784", {"skill": "reasoning", "kind": "products"}, answer.text)
    writer.group.cache_clear()
    again, larger = writer.group("98*8", 3, 8), writer.group("98*8", 3, 16)
    assert describe(again) == describe(group) and again is not group
    assert describe(larger)["answers"][:8] == describe(group)["answers"]
    for answer in describe(group)["answers"]:
        assert "".join(answer["tokens"]).endswith(f"{answer['said']}<eos>") or answer["cut"]


# --- the update -----------------------------------------------------------------------------------------------------


def test_one_step_makes_right_answers_likelier_and_leaves_the_model_as_it_was(writer: Writer) -> None:
    group = writer.group("98*8", 0, 8)
    graded = [answer.verdict.score for answer in group.answers]
    assert 0 < sum(graded) < 8
    before = {name: tensor.detach().clone() for name, tensor in trainable(writer.policy).items()}
    done = update(writer, group, graded, "grpo", 1e-4, 1, 0.2, 0.2)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainable(writer.policy).items())
    for answer, moved in zip(group.answers, done["answers"], strict=True):
        sampled = float(answer.completion.logprobs.mean())
        assert math.log(moved["before"]) == pytest.approx(sampled, abs=1e-4)
        assert moved["tokens"]["ratio"] == pytest.approx(
            [a / b for a, b in zip(moved["tokens"]["after"], moved["tokens"]["before"], strict=True)], rel=1e-3
        )
        assert moved["factor"] > 1 or not answer.verdict.passed
    lengths = torch.tensor([len(answer.completion.tokens) for answer in group.answers], dtype=torch.float64)
    mean = (group_relative(torch.tensor([graded]), "sample")[0] * lengths).sum() / lengths.sum()
    assert done["steps"][0]["loss"] == pytest.approx(-float(mean), abs=1e-5)  # every ratio is still 1
    assert done["steps"][0]["clipped"] == 0 and done["right"] > writer.group("98*8", 0, 64, "again").right


def test_a_flat_group_moves_nothing_and_a_clip_of_zero_stops_the_second_step_of_what_went_right(writer: Writer) -> None:
    group = writer.group(BEYOND, 0, 4)
    still = update(writer, group, [0, 0, 0, 0], "grpo", 1e-3, 2, 0.2, 0.2)
    assert all(step == {"loss": 0, "norm": 0, "clipped": 0} for step in still["steps"])
    assert all(moved["factor"] == 1 and moved["before"] == moved["after"] for moved in still["answers"])
    tight = update(writer, group, [1, 0, 0, 0], "grpo", 1e-4, 2, 0.0, 0.0)
    assert tight["steps"][0]["clipped"] == 0 and tight["steps"][1]["clipped"] > 0.5
    for moved, sign in zip(tight["answers"], (1, -1, -1, -1), strict=True):
        tokens = moved["tokens"]
        assert tokens["clipped"] == [sign * (ratio - 1) > 0 for ratio in tokens["ratio"]]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"size": 5}, "size=5 is not one of 4, 8, 16, 32"),
        ({"seed": -1}, "seed is '-1'; expected a number from 0 to 999999"),
        ({"seed": 1.5}, "seed is 1.5; expected a whole number"),
        ({"rewards": "1,0,2,0"}, "a reward is '2'; expected a number from 0 to 1"),
        ({"rewards": "1,0,nan,0"}, "a reward is 'nan'"),
        ({"rewards": "1,0"}, "got 2 rewards for 4 answers"),
        ({"how": "ppo"}, "how='ppo' is not one of grpo, dr-grpo, rloo, maxrl"),
        ({"lr": "inf"}, "lr is 'inf'"),
        ({"updates": 9}, "updates is '9'; expected a number from 1 to 4"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_a_model_is_opened(query: dict[str, Any], said: str) -> None:
    asked = {"problem": "98*8", "seed": 0, "size": 4, "rewards": "1,0,0,0", "how": "grpo", "lr": 1e-4, "clip": 0.2}
    with pytest.raises(ConfigError, match=re.escape(said)):
        grpo.read_update(Place(Path("nowhere")), request(**{**asked, "updates": 1, **query}))


# --- in the browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    with opened(tmp_path_factory.mktemp("empty")) as lab:
        yield lab


def go(page: Page, lab: Opened, query: str = "") -> None:
    page.goto(f"{lab.address}/explore/grpo{query}")
    becomes(page.locator(".grpo-worth .number").last, re.compile(r"\d"))


def becomes(place: Locator, text: str | re.Pattern[str]) -> None:
    """Waits until a place holds a text."""
    expect(place).to_have_text(text, timeout=PATIENCE)


def shown(page: Page) -> tuple[list[float], list[float]]:
    """Rewards and advantages as the page writes them."""
    given = [float(text) for text in page.locator(".grpo-answers .slider output").all_inner_texts()]
    worth = page.locator(".grpo-worth .number").all_inner_texts()
    return given, [float(text.replace("−", "-")) for text in worth]


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def expected(given: list[float]) -> list[float]:
    return group_relative(torch.tensor([given], dtype=torch.float64), "sample")[0].tolist()


def test_moving_one_reward_changes_every_advantage_to_the_librarys(page: Page, lab: Opened) -> None:
    go(page, lab)
    given, first = shown(page)
    assert given == [1, 0, 0, 0, 0, 1, 0, 0] and first == pytest.approx(expected(given), abs=5e-4)
    slider = page.get_by_role("slider", name="Reward 3")
    for _ in range(6):
        slider.press("ArrowRight")
    becomes(page.locator(".grpo-worth .number").nth(2), signed(expected([1, 0, 0.3, 0, 0, 1, 0, 0])[2]))
    now, second = shown(page)
    assert now == [1, 0, 0.3, 0, 0, 1, 0, 0] and second == pytest.approx(expected(now), abs=5e-4)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert "rewards=1%2C0%2C0.3%2C0%2C0%2C1%2C0%2C0" in page.url
    page.get_by_role("radio", name="RLOO").check()
    alone = leave_one_out(torch.tensor([now], dtype=torch.float64))[0].tolist()
    becomes(page.locator(".grpo-worth .number").first, signed(alone[0]))
    assert shown(page)[1] == pytest.approx(alone, abs=5e-4)


def test_an_answer_is_good_in_one_group_and_bad_in_another(page: Page, lab: Opened) -> None:
    go(page, lab)
    page.get_by_role("button", name="Give answer 1 half a point").click()
    page.get_by_role("button", name="Try it: give all other answers reward 0").click()
    becomes(page.locator(".grpo-worth .number").first, "+2.475")
    assert shown(page)[0] == [0.5, 0, 0, 0, 0, 0, 0, 0]
    page.get_by_role("button", name="Try it: give all other answers reward 1").click()
    becomes(page.locator(".grpo-worth .number").first, "−2.475")
    given, worth = shown(page)
    assert given == [0.5, 1, 1, 1, 1, 1, 1, 1] and worth == pytest.approx(expected(given), abs=5e-4)
    assert "The answer itself does not change" in page.locator(".grpo-elsewhere").inner_text()


def test_a_real_step_moves_the_bars_and_its_link_shows_the_same(page: Page, lab: Opened) -> None:
    go(page, lab)
    page.get_by_role("button", name="Take one real gradient step").click()
    page.get_by_text("of 64 new answers").wait_for()
    moved = page.locator(".grpo-shifts li").all_inner_texts()
    assert len(moved) == 8 and all("▲ more likely" in text for text in (moved[0], moved[5]))
    assert sum("▼ less likely" in text for text in moved) >= 4
    tokens = page.get_by_role("group", name="Tokens of answer 1")
    assert tokens.inner_text().startswith("<think>") and tokens.inner_text().endswith("784<eos>")
    read = page.locator(".read").inner_text()
    tokens.press("ArrowRight")
    assert page.locator(".read").inner_text() != read
    said = page.get_by_text("of 64 new answers").inner_text()
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    page.get_by_text("of 64 new answers").wait_for()
    assert page.get_by_text("of 64 new answers").inner_text() == said
    assert page.locator(".grpo-shifts li").all_inner_texts() == moved


def test_a_problem_that_is_never_solved_is_a_flat_group_and_teaches_nothing(page: Page, lab: Opened) -> None:
    go(page, lab)
    page.get_by_label("Problem").select_option(BEYOND)
    page.get_by_text("A flat group.").wait_for()
    assert "0 of 8 are right" in page.locator("main").inner_text() and set(shown(page)[1]) == {0.0}
    page.get_by_role("button", name="Take one real gradient step").click()
    page.get_by_text("The group is flat: the gradient is exactly 0").wait_for()
    page.get_by_role("button", name="Another problem").click()
    page.get_by_text("No steps taken yet.").wait_for()
    assert page.locator(".grpo-question").inner_text() == f"What is {listed()[2]}?"


def test_an_address_that_asks_for_nonsense_says_so_and_leaves_a_way_on(browser: Browser, lab: Opened) -> None:
    page = browser.new_page()  # the fixture's page must not be refused anything
    page.set_default_timeout(PATIENCE)
    page.goto(f"{lab.address}/explore/grpo?problem=<b>&how=x&watch=99&rewards=7,a")
    page.get_by_text("unsupported problem").wait_for()
    page.get_by_label("Problem").select_option("98*8")
    page.locator(".grpo-worth .fill").first.wait_for()
    assert shown(page)[0] == [1, 0, 0, 0, 0, 1, 0, 0]
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits(page: Page, lab: Opened, scheme: Any, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    go(page, lab, "?updates=2&watch=1&thinking=true")
    page.get_by_text("of 64 new answers").wait_for()
    page.locator(".grpo-worked .katex").first.wait_for()
    heads = [head.partition(" ")[0] for head in page.locator("main h1, main h2").all_inner_texts()]
    assert heads == ["GRPO:", "1.", "2.", "3.", "Why"]  # whichever answer of the server came first
    assert accessibility(page) == [] and not too_wide(page)
