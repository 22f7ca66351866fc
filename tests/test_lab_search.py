"""The page "Think longer": real searches of a real model, their trees and costs, and the recorded frontier."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from starlette.requests import Request

from bench import search_frontier
from posttrain.data.answers import final_answer
from posttrain.lab.course import worked_search
from posttrain.lab.course.working import one
from posttrain.lab.explore import budgets
from posttrain.lab.explore import search as routes
from posttrain.lab.explore.problems import BEYOND, task_of
from posttrain.lab.explore.trees import Searcher, describe, open_searcher, verify
from posttrain.lab.folders import Place
from posttrain.search.mcts import ROLLOUT
from posttrain.search.run import search as run_search
from posttrain.search.strategies import STRATEGIES
from posttrain.types import ConfigError
from tests.lab_server import PATIENCE, Opened, accessibility, opened, too_wide

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return open_searcher(Place(tmp_path_factory.mktemp("runs")))


# --- what the page shows --------------------------------------------------------------------------------------------


def test_the_page_offers_strategies_and_problems_that_exist() -> None:
    assert set(budgets.STRATEGIES) <= set(STRATEGIES) and {"majority", "best-of-n", "beam", "mcts"} <= {
        *budgets.STRATEGIES
    }
    assert {name for name in budgets.STRATEGIES if STRATEGIES[name].scores == "none"} == {*budgets.UNSCORED}
    assert {name for name in budgets.STRATEGIES if STRATEGIES[name].scores == "steps"} == {*budgets.LIMITED}
    offered = budgets.offered_problems()
    assert offered[:3] == [budgets.FIRST, budgets.OVERRATED, BEYOND] and len({*offered}) == len(offered)
    assert all(task_of(problem) for problem in offered)


@pytest.mark.parametrize("strategy", budgets.STRATEGIES)
def test_what_is_shown_is_what_the_library_finds(searcher: Searcher, strategy: str) -> None:
    found = searcher.found(budgets.FIRST, 1, strategy, "confidence", 4)
    engine, judge = searcher.engine(), None if strategy in budgets.UNSCORED else searcher.scorer("confidence")
    result = run_search(task_of(budgets.FIRST), engine, judge, budgets.settings(strategy, "confidence", 4), 1)
    assert found == describe(result, strategy)
    assert found["answer"] == final_answer(result.answer)
    assert found["generated"] == sum(node["tokens"] for node in found["nodes"]) == engine.generated
    for i, (shown, node) in enumerate(zip(found["nodes"], result.tree.nodes, strict=True)):
        above = found["nodes"][shown["parent"]] if shown["parent"] is not None else None
        assert (above is None) == (i == 0) and (shown["parent"] or 0) <= i  # a node comes after the one above it
        assert (shown["score"], shown["rollout"]) == (node.score, node.note == ROLLOUT)
        assert (shown["passed"] is None) == (not node.ended)
        if node.ended:
            assert shown["passed"] == verify(result.task, node.text).passed
    assert found["right"] == sum(bool(node["passed"]) for node in found["nodes"])
    if found["chosen"] is not None:
        assert found["passed"] == found["nodes"][found["chosen"]]["passed"]


def test_more_tokens_find_the_answer_and_then_the_scorer_is_the_limit(searcher: Searcher) -> None:
    """The discoveries to which the page leads, on the problems that it offers first."""
    assert not searcher.found(budgets.FIRST, 0, "majority", "confidence", 1)["passed"]
    assert not searcher.found(budgets.FIRST, 0, "best-of-n", "confidence", 1)["passed"]
    for strategy in ("best-of-n", "beam"):
        assert searcher.found(budgets.FIRST, 0, strategy, "confidence", 16)["passed"], strategy
    sure = {n: searcher.found(budgets.OVERRATED, 0, "best-of-n", "confidence", n) for n in budgets.BUDGETS}
    assert not any(one["passed"] for one in sure.values())
    known = searcher.found(budgets.OVERRATED, 0, "best-of-n", "checker", budgets.BUDGETS[-1])
    assert (
        known["passed"] and sure[budgets.BUDGETS[-1]]["right"] == known["right"] > 0
    )  # the same completions, differently chosen
    assert searcher.found(BEYOND, 0, "best-of-n", "checker", budgets.BUDGETS[-1])["right"] == 0


def test_reading_completions_again_costs_tokens_and_confidence_and_votes_cost_none(searcher: Searcher) -> None:
    found = {scorer: searcher.found(budgets.FIRST, 0, "best-of-n", scorer, 4) for scorer in budgets.SCORERS}
    assert {scorer for scorer, one in found.items() if one["scored"]} == {"self-certainty"}
    prompt = len(searcher.chat.prompt_tokens(task_of(budgets.FIRST).messages))
    assert found["self-certainty"]["scored"] == found["self-certainty"]["generated"] + 4 * prompt
    assert searcher.found(budgets.FIRST, 0, "majority", "self-certainty", 4)["scored"] == 0


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"problem": "2**9"}, "unsupported problem '2**9'"),
        ({"strategy": "revise"}, "strategy='revise' is not one of majority, best-of-n"),
        ({"scorer": "luck"}, "scorer='luck' is not one of confidence"),
        ({"budget": "3"}, "budget=3 is not one of 1, 2, 4"),
        ({"budget": "-1"}, "budget is '-1'; expected a whole number"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"strategy": "beam", "scorer": "checker"}, "beam scores unfinished completions"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_model_is_opened(query: dict[str, str], said: str) -> None:
    asked = {"problem": "36*9", "seed": "0", "strategy": "majority", "scorer": "confidence", "budget": "4", **query}
    text = "&".join(f"{name}={value}" for name, value in asked.items())
    with pytest.raises(ConfigError, match=re.escape(said)):
        routes.read_tree(Place(Path("nowhere")), Request({"type": "http", "query_string": text.encode()}))


# --- the course's numbers -------------------------------------------------------------------------------------------


def test_the_worked_numbers_of_searches_are_those_worked_by_hand() -> None:
    found = {name: example() for name, example in worked_search.EXAMPLES.items()}
    assert [step.result for step in found["weighted-vote"].steps] == ["371", "324"]  # 2 votes; 0.91 against 0.51
    assert found["vote-by-size"].rows[0] == ("1", one(4 / 12))
    assert found["vote-by-size"].rows[-1] == ("12", "1.000")  # 4 votes against 2
    assert found["decided"].rows[3] == ("4 to 0", one(1 - 0.5**5), "yes")
    assert found["decided"].rows[4] == ("4 to 1", one(1 - (1 + 6) / 2**6), "no")  # at most one of six heads
    powers = [math.exp(s / 0.2) for s in (0.9, 0.8, 0.5, 0.2)]
    assert found["next-steps"].steps[0].result == one(8 * powers[0] / sum(powers), 2)
    assert [row[2:] for row in found["next-steps"].rows] == [
        ("4", "4", "2"), ("4", "3", "2"), ("0", "1", "2"), ("0", "0", "2")]  # fmt: skip
    rows = found["visits"].rows
    assert rows[0] == ("1", "0.600", "0.300", "0.100", "1")  # only priors, and N counts as 1
    assert rows[1][1:3] == (one(0.2 + 0.6 * 1 / 2), "0.300")  # step 1 has been visited once
    assert rows[4][2] == one(0.6 + 0.3 * math.sqrt(4) / 2) and [row[4] for row in rows] == list("11122222")
    thought = [row[0] for row in found["forced-thinking"].rows]
    assert thought[1] == "writes “Wait”" and thought[-1] == "lets it say “784”"
    assert [row[1] for row in found["forced-thinking"].rows] == ["3", "3", "7", "8"]  # the closing tag is taken back


# --- the recorded frontier ------------------------------------------------------------------------------------------


def curve(strategy: str, scorer: str) -> list[dict[str, Any]]:
    (found,) = [one for one in budgets.frontier()["series"] if (one["strategy"], one["scorer"]) == (strategy, scorer)]
    return found["points"]


def test_the_frontier_has_every_curve_and_budget_and_says_how_it_was_made() -> None:
    record = budgets.frontier()
    assert record["command"] == "python -m bench.search_frontier" and record["problems"] == search_frontier.PROBLEMS
    pairs = {(one["strategy"], one["scorer"]) for one in record["series"]}
    assert pairs == {*search_frontier.SAMPLED, *search_frontier.SEARCHED}
    for series in record["series"]:
        assert [point["budget"] for point in series["points"]] == [*budgets.BUDGETS]
        spent = [point["generated"] + point["scored"] for point in series["points"]]
        assert spent == sorted(spent) and spent[0] > 0
        assert all(0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1 for point in series["points"])


def test_more_tokens_buy_accuracy_until_the_scorer_is_the_limit() -> None:
    vote, sure, knows = curve("majority", ""), curve("best-of-n", "confidence"), curve("best-of-n", "checker")
    for points in (vote, sure, knows):
        assert points[-1]["low"] > points[0]["high"]
        assert all(b["accuracy"] >= a["accuracy"] for a, b in zip(points, points[1:], strict=False))
    certain = curve("best-of-n", "self-certainty")
    assert certain[-1]["high"] < certain[0]["low"]  # a bad scorer: more to choose from makes it worse
    for points in (sure, certain):  # nothing chooses better than the checker from the same completions
        assert all(a["accuracy"] <= b["accuracy"] for a, b in zip(points, knows, strict=True))
    assert vote[0]["accuracy"] == sure[0]["accuracy"] == knows[0]["accuracy"]  # one completion: nothing to choose


def test_the_record_is_what_the_searches_give(searcher: Searcher) -> None:
    tasks = search_frontier.tasks_of(4)
    assert [task.prompt for task in tasks][0] == f"What is {budgets.FIRST}?"
    rows = search_frontier.by_subsets(searcher, tasks, "best-of-n", "checker", (1, 4))
    for place, task in enumerate(tasks):
        problem = task.prompt.removeprefix("What is ").removesuffix("?")
        page = searcher.found(problem, 0, "best-of-n", "checker", 4)
        assert rows[0][1][place] == pytest.approx(page["right"] / 4)  # the share of right completions
        assert rows[1][1][place] == float(page["passed"])
    ((_, passed, generated, scored),) = search_frontier.by_searches(searcher, tasks[:2], "beam", "confidence", (4,))
    pages = [searcher.found(task.id.partition(":")[2], 0, "beam", "confidence", 4) for task in tasks[:2]]
    assert passed == [float(page["passed"]) for page in pages] and scored == 0
    assert generated == sum(page["generated"] for page in pages) / 2


# --- in the browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    with opened(tmp_path_factory.mktemp("empty")) as lab:
        yield lab


def go(page: Page, lab: Opened, query: str = "") -> None:
    page.goto(f"{lab.address}/explore/search{query}")
    searched(page)


def searched(page: Page) -> None:
    """Waits until every strategy has answered."""
    expect(page.locator(".search-verdict")).to_contain_text(re.compile("Right|Wrong"))


def card(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=name, exact=True)


def budget(page: Page, completions: int) -> None:
    """Moves the budget with the keyboard."""
    slider, at = page.get_by_role("slider", name="Budget"), budgets.BUDGETS.index(completions)
    slider.press("Home")
    for _ in range(at):
        slider.press("ArrowRight")
    expect(page.locator(".search-asking output")).to_have_text(re.compile(f"^{completions} completion"))
    searched(page)


def test_more_tokens_buy_the_right_answer(page: Page, lab: Opened) -> None:
    go(page, lab, "?budget=1")
    for name in ("Majority", "Best of n"):
        expect(card(page, name)).to_contain_text("✗ wrong")
    expect(page.locator(".search-verdict")).to_contain_text("No completion is right")
    few = int(card(page, "Best of n").locator("dd").first.inner_text())
    budget(page, 16)
    expect(card(page, "Best of n")).to_contain_text("✓ right")
    expect(card(page, "Best of n").locator(".search-answer strong")).to_have_text("324")
    expect(card(page, "Majority")).to_contain_text("✗ wrong")
    expect(page.locator(".search-verdict")).to_contain_text("Majority had a right completion, but it was outvoted")
    assert int(card(page, "Best of n").locator("dd").first.inner_text()) > 2 * few
    assert card(page, "Beam search").get_by_role("img").get_attribute("aria-label", timeout=PATIENCE)
    assert "budget" not in page.url  # 16 is the default


def test_until_the_scorer_is_the_limit(page: Page, lab: Opened) -> None:
    go(page, lab)
    page.get_by_role("combobox", name="Problem").select_option(budgets.OVERRATED)
    budget(page, 32)
    expect(card(page, "Best of n")).to_contain_text("✗ wrong")
    expect(card(page, "Best of n")).to_contain_text("although 1 of 32 completions is right")
    expect(page.locator(".search-verdict")).to_contain_text("here the scorer is the limit")
    page.get_by_role("radio", name="the true checker").check()
    expect(card(page, "Best of n")).to_contain_text("✓ right")
    expect(card(page, "Beam search")).to_contain_text("the checker can only judge finished ones")
    page.get_by_role("radio", name="self-certainty").check()
    expect(card(page, "Best of n").locator("dd").last).not_to_have_text("0")


def test_the_tree_grows_and_its_list_says_every_step(page: Page, lab: Opened) -> None:
    go(page, lab)
    tree, listed = page.locator(".search-tree.large"), page.get_by_role("region", name="The tree of Beam search")
    whole = tree.locator("circle").count()
    expect(listed.locator(".search-entry")).to_have_count(whole - 1)
    assert listed.locator(".search-entry.chosen").last.inner_text().startswith("270+54=324</think>324")
    page.get_by_role("slider", name="Nodes sampled so far").press("Home")
    expect(tree.locator("circle")).to_have_count(1)
    expect(listed.locator(".search-entry")).to_have_count(0)
    page.get_by_role("button", name="Watch it grow").click()
    expect(tree.locator("circle")).to_have_count(whole)
    expect(listed.locator(".search-entry")).to_have_count(whole - 1)
    card(page, "Tree search").get_by_role("radio").check()
    expect(page.get_by_role("region", name="The tree of Tree search")).to_contain_text("visits, mean")


def test_a_problem_of_ones_own_more_strategies_and_a_link_to_all_of_it(page: Page, lab: Opened) -> None:
    go(page, lab, "?budget=4")
    page.get_by_label("Your own").fill("47 * 6")
    page.get_by_label("Your own").press("Enter")
    expect(page.locator(".search-question")).to_have_text("What is 47*6?")
    page.locator(".search-asking summary").click()
    page.get_by_role("checkbox", name="Rebase").check()
    expect(card(page, "Rebase").locator(".search-answer")).to_be_visible()
    searched(page)
    shown = page.locator(".search-answer").all_inner_texts()
    assert len(shown) == 5
    page.goto(page.url)
    searched(page)
    expect(page.locator(".search-answer")).to_have_text(shown)


def test_an_address_that_asks_for_nonsense_says_so_and_leaves_a_way_on(browser: Browser, lab: Opened) -> None:
    page = browser.new_page()  # the fixture's page must not be refused anything
    page.set_default_timeout(PATIENCE)
    page.goto(f"{lab.address}/explore/search?problem=<b>&scorer=x&budget=7&strategies=no,majority&watch=9")
    page.get_by_text("unsupported problem").first.wait_for()
    page.get_by_role("combobox", name="Problem").select_option("36*9")
    page.get_by_role("radio", name="its own confidence").check()
    page.get_by_role("slider", name="Budget").press("ArrowRight")
    expect(card(page, "Majority").locator(".search-answer")).to_be_visible()
    page.close()


def test_the_frontier_shows_every_recorded_number(page: Page, lab: Opened) -> None:
    go(page, lab)
    page.get_by_text("All numbers, for every strategy").click()
    rows = page.get_by_role("region", name="Accuracy on 128 problems").locator("tbody tr")
    record = budgets.frontier()
    expect(rows).to_have_count(sum(len(one["points"]) for one in record["series"]))
    best = curve("best-of-n", "confidence")[-1]["accuracy"]
    expect(page.locator(".search-read")).to_contain_text(f"to {100 * best:.1f} % with 32")
    assert "python -m bench.search_frontier" in page.locator("main").inner_text()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_the_page_is_accessible_and_fits(page: Page, lab: Opened, scheme: Any, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    go(page, lab, "?watch=mcts")
    heads = [head.partition(" ")[0] for head in page.locator("main h1, main h2").all_inner_texts()]
    assert heads == ["Think", "1.", "2.", "3.", "What"]
    assert accessibility(page) == [] and not too_wide(page)
