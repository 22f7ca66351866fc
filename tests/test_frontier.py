"""The frontier of test-time compute: interpolation, thirds, coverage, over-optimisation and advice, worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.search import frontier
from posttrain.search.choose import classes, expected_vote
from posttrain.search.compare import estimated
from posttrain.search.frontier import Point, advice, at_tokens, best_at, over_optimised, power_law, thirds
from posttrain.search.report import Outcome, mean, summarise
from posttrain.search.solve import Searched
from posttrain.types import Json, Message, Task


def flat(strategy: str, budget: int, passed: list[float], tokens: float, scores: tuple[float, ...] = ()) -> Point:
    return Point(strategy, budget, tuple(passed), (tokens,) * len(passed), scores)


def test_accuracy_between_two_budgets_is_interpolated_in_log_tokens() -> None:
    points = [flat("a", 1, [0, 1], 10), flat("a", 10, [1, 1], 1000)]
    found = at_tokens(points, 100)  # halfway between 10 and 1000
    assert found is not None and found.tolist() == [0.5, 1]
    whole = {10: [0, 1], 1000: [1, 1], 5000: [1, 1]}  # beyond the last point tokens need not be spent
    for tokens, expected in whole.items():
        rates = at_tokens(points, tokens)
        assert rates is not None and rates.tolist() == expected
    assert at_tokens(points, 9) is None


def test_the_best_strategy_at_equal_tokens_is_not_the_one_with_the_highest_accuracy_at_its_own() -> None:
    cheap = [flat("cheap", 1, [1, 0, 0, 0], 10), flat("cheap", 2, [1, 1, 0, 0], 20)]
    dear = [flat("dear", 1, [0, 0, 0, 0], 10), flat("dear", 2, [1, 1, 1, 1], 1000)]
    best = {tokens: best_at([*cheap, *dear], tokens) for tokens in (5, 20, 1000)}
    assert best[5] is None
    assert best[20] and (best[20].strategy, best[20].accuracy.value) == ("cheap", 0.5)
    assert best[1000] and (best[1000].strategy, best[1000].second) == ("dear", "cheap")
    assert best[1000].ahead and best[1000].ahead.value == 0.5 and frontier.common_tokens([*cheap, *dear]) == 20


def test_thirds_are_by_falling_pass_rate_and_ties_keep_their_order() -> None:
    assert thirds([0.1, 0.9, 0.5, 0.5, 0.0]) == {"easy": [1, 2], "middle": [0, 3], "hard": [4]}
    assert thirds([1.0]) == {"easy": [0], "middle": [], "hard": []}


def test_each_third_has_its_own_best_strategy() -> None:
    a, b = flat("a", 1, [1, 1, 0], 10), flat("b", 1, [0, 0, 1], 10)
    found = frontier.by_difficulty([a, b], [0.9, 0.5, 0.1], 10)
    assert {name: best.strategy for name, best in found.items()} == {"easy": "a", "middle": "a", "hard": "b"}


@given(st.floats(-3, -0.1), st.floats(-1.5, -0.1))
def test_the_fit_recovers_a_power_law(a: float, b: float) -> None:
    shares = {k: math.exp(a * k**b) for k in (1, 2, 4, 8, 16)}
    law = power_law({k: share for k, share in shares.items() if share < 1})
    assert law and law.a == pytest.approx(a, rel=1e-6) and law.b == pytest.approx(b, rel=1e-6)
    assert law.at(32) == pytest.approx(math.exp(a * 32**b))


def test_a_power_law_needs_two_shares_between_0_and_1() -> None:
    assert power_law({1: 0.0, 2: 0.5, 4: 1.0}) is None


def test_coverage_is_the_mean_of_pass_at_k() -> None:
    found = frontier.coverage([[True, False, False, False], [False] * 4], [1, 2, 4, 8])
    assert {k: one.value for k, one in found.items()} == {1: 0.125, 2: 0.25, 4: 0.5}  # 8 were not sampled


def test_a_scorer_is_over_optimised_if_accuracy_falls_while_its_score_rises() -> None:
    def points(last: list[float], scores: tuple[float, ...]) -> list[Point]:
        first = flat("best-of-n", 4, [1.0] * 20, 10, (0.1,) * 20)
        return [flat("best-of-n", 1, [0.0] * 20, 5, (0.0,) * 20), first, flat("best-of-n", 64, last, 99, scores)]

    fallen = [0.0] * 10 + [1.0] * 10
    (found,) = over_optimised(points(fallen, (0.5,) * 20))
    assert (found.strategy, found.peak, found.budget) == ("best-of-n", 4, 64)
    assert found.accuracy.value == -0.5 and found.accuracy.high < 0 and found.score.value == pytest.approx(0.4)
    assert over_optimised(points([1.0] * 20, (0.5,) * 20)) == []  # accuracy holds
    assert over_optimised(points(fallen, (0.05,) * 20)) == []  # the score falls, too
    assert over_optimised([flat("majority", 1, [1.0] * 9, 1), flat("majority", 4, [0.0] * 9, 4)]) == []  # no scores


def test_the_advice_names_a_strategy_only_if_it_is_clearly_ahead() -> None:
    majority = [flat("majority", 1, [0.0] * 30, 10), flat("majority", 4, [0.0] * 20 + [1.0] * 10, 40)]
    ahead = [flat("beam", 1, [0.0] * 30, 10), flat("beam", 4, [1.0] * 30, 40)]
    assert advice([*majority, *ahead]).startswith("Use beam: at about 40 tokens per problem its accuracy is 100.0%")
    even = [flat("beam", 4, [0.0] * 19 + [1.0] * 11, 40)]
    assert advice([*majority, *even]).startswith("Use majority, the simplest: at about 40 tokens per problem no ")
    also = [flat("mcts", 4, [1.0] * 29 + [0.0], 40)]
    assert advice([*majority, *ahead, *also]).startswith("Use beam or mcts, between which nothing is clear")


def searched(texts: list[str], right: list[bool], scores: list[float | None], cut: int = -1) -> Searched:
    nodes: list[Json] = [{"parent": None, "text": "", "end": ""}]
    nodes += [{"parent": 0, "text": t, "end": "length" if i == cut else "stop"} for i, t in enumerate(texts)]
    numbers = tuple(range(1, len(nodes)))
    one = Outcome(0, "t", right[0], 1, texts[0], 10 * len(texts), 4, numbers, tuple(right), tuple(scores))
    task = Task("t", "sums", (Message("user", "?"),), "1")
    return Searched(summarise([one], "best-of-n", len(texts), "x"), [task], [one], [{"nodes": nodes}], "\n")


@given(st.lists(st.tuples(st.sampled_from("123"), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=6), st.data())
def test_smaller_budgets_are_the_mean_over_all_subsets_of_the_sample(
    drawn: list[tuple[str, float]], data: st.DataObject
) -> None:
    texts, scores = [text for text, _ in drawn], [score for _, score in drawn]
    right = [text == "1" for text in texts]
    n = data.draw(st.integers(1, len(texts)))
    subsets = list(itertools.combinations(range(len(texts)), n))
    found = searched(texts, right, [*scores])

    def voted(subset: tuple[int, ...]) -> float:
        counts = {t: sum(texts[i] == t for i in subset) for t in {texts[i] for i in subset}}
        top = [t for t, count in counts.items() if count == max(counts.values())]
        return ("1" in top) / len(top)

    def picked(subset: tuple[int, ...]) -> float:
        best = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
        return float(np.mean([right[i] for i in best]))

    for name, rule in {"majority": voted, "best-of-n": picked}.items():
        (rate,) = estimated(name, found, n).passed
        assert rate == pytest.approx(np.mean([rule(subset) for subset in subsets]))
    assert expected_vote(classes(texts), right, n) == pytest.approx(estimated("majority", found, n).passed[0])


def test_the_tokens_of_n_of_N_completions_are_their_share_and_a_vote_reads_no_scores() -> None:
    found = searched(["1", "2", "2", "1"], [True, False, False, True], [0.1, 0.2, 0.3, 0.4])
    assert estimated("majority", found, 1).tokens == (10.0,)
    assert estimated("best-of-n", found, 1).tokens == (11.0,)
    assert estimated("best-of-n", found, 4).scores == (0.4,)


def test_completions_that_were_cut_or_not_scored_are_chosen_last() -> None:
    found = searched(["1", "2"], [True, False], [0.9, 0.1], cut=0)
    assert estimated("best-of-n", found, 2).passed == (0.0,) and estimated("majority", found, 2).passed == (0.0,)
    assert estimated("best-of-n", searched(["1", "2"], [True, False], [None, 0.1]), 2).passed == (0.0,)


def test_equal_numbers_of_tokens_have_no_interval() -> None:
    assert (mean([3, 3, 3]).low, mean([3, 3, 3]).high) == (3, 3) and mean([0, 0]).high == 0
    assert mean([1, 3]).low < 2 < mean([1, 3]).high
