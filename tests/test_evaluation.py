"""Held-out evaluation: estimators against enumeration and published values, intervals, ties, unscored answers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.evaluation.accuracy import Estimate, bootstrap, majority, pass_at_k, summarise, wilson
from posttrain.rollout.collector import episode_stats
from posttrain.types import Episode, Span, StopReason


def episode(
    text: str, reward: float | None, passed: bool = False, stop: StopReason = "stop", length: int = 2
) -> Episode:
    spans = (Span("prompt", np.arange(3)), Span("model", np.arange(length), np.zeros(length, np.float32)))
    return Episode("t", 0, 0, spans, text, reward, passed, {}, stop)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_answer(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([i < correct for i in range(n)], k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 1, 4) == 1
    assert pass_at_k(10_000, 5000, 64) == pytest.approx(1)  # exact integers: no factorial overflows


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses_impossible_numbers(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs 1 ≤ k ≤ n"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    ("passed", "n", "low", "high"),
    [
        (8, 10, 0.490, 0.943),
        (0, 10, 0.0, 0.278),
        (10, 10, 0.722, 1.0),
        (81, 263, 0.2553, 0.3662),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_has_the_published_values(passed: int, n: int, low: float, high: float) -> None:
    """The last two are the examples of Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    estimate = wilson(passed, n)
    assert estimate.value == passed / n
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=6e-4), pytest.approx(high, abs=6e-4))


@given(st.integers(1, 300), st.data())
def test_wilsons_interval_holds_the_share_and_mirrors_for_failures(n: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, n))
    a, b = wilson(passed, n), wilson(n - passed, n)
    assert 0 <= a.low <= a.value + 1e-12 and a.value - 1e-12 <= a.high <= 1
    assert (a.low, a.high) == (pytest.approx(1 - b.high, abs=1e-12), pytest.approx(1 - b.low, abs=1e-12))


def test_nothing_measured_is_nan_with_the_widest_interval() -> None:
    for estimate in (wilson(0, 0), bootstrap([])):
        assert math.isnan(estimate.value) and (estimate.low, estimate.high, estimate.n) == (0, 1, 0)


def test_the_bootstrap_is_a_function_of_values_and_seed() -> None:
    values = [math.sin(i) for i in range(40)]
    assert bootstrap(values, 3) == bootstrap(values, 3)
    assert bootstrap(values, 3) != bootstrap(values, 4)


def test_the_bootstrap_interval_of_equal_values_is_a_point() -> None:
    assert bootstrap([0.5] * 7) == Estimate(0.5, 0.5, 0.5, 7)


def test_the_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    """400 fair coin flips: ± 1.96 · 0.5 / √400 = ± 0.049."""
    estimate = bootstrap([float(i % 2) for i in range(400)])
    assert (estimate.low, estimate.high) == (pytest.approx(0.451, abs=0.006), pytest.approx(0.549, abs=0.006))


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """100 data sets of 60 uniform numbers: 95 expected; 88 or fewer has probability under 0.01 at 95 % coverage."""
    draw = np.random.default_rng(0)
    covered = sum((e := bootstrap(draw.random(60).tolist(), i)).low <= 0.5 <= e.high for i in range(100))
    assert covered > 88


@pytest.mark.parametrize(
    ("answers", "passed", "right"),
    [
        (["1", "2", "2"], [False, True, True], True),
        (["1", "2"], [True, False], True),
        (["1", "2"], [False, True], False),
        (["3", "1", "2", "1", "2"], [False, True, False, True, False], True),
        (["", "", "4"], [False, False, True], False),
        (["7"], [True], True),
    ],
    ids=["most common", "tie to the first, right", "tie to the first, wrong", "tie of pairs", "no answer", "one"],
)
def test_the_majority_answer_decides_and_a_tie_goes_to_the_first(
    answers: list[str], passed: list[bool], right: bool
) -> None:
    assert majority(answers, passed) is right


def test_a_summary_by_hand() -> None:
    groups = [
        [episode("a", 1.0, True), episode("<think> b", 0.0, stop="length", length=6)],
        [episode("b", 0.0), episode("b", 0.0)],
    ]
    report = summarise(groups, 2, lambda text: text)
    assert report.accuracy.value == 0.25 and report.reward == 0.25
    assert (report.think_share, report.length, report.truncated) == (0.25, 3.0, 0.25)
    assert (report.tasks, report.samples, report.unscored) == (2, 2, 0)
    assert report.pass_at[2].value == 0.5 and report.pass_at.keys() == {2}
    assert report.maj_at[2].value == 0.5  # the first group is a tie, which goes to its first answer, a right one
    assert report.metrics()["eval/pass_at_2"] == 0.5 and report.metrics()["eval/accuracy"] == 0.25


def test_each_part_s_mean_is_over_the_scored_answers_that_have_it() -> None:
    parts: list[dict[str, Any]] = [{"a": 1.0, "b": 3}, {"a": 0.0, "b": math.nan, "c": "not a number"}, {"d": True}]
    scored = [replace(episode("x", 1.0), parts=own) for own in parts]
    unscored = replace(episode("x", None), parts={"a": 9.0})
    report = summarise([[*scored, unscored]], 4, lambda text: text)
    assert report.parts == {"a": 0.5, "b": 3.0, "d": 1.0}
    assert {n: v for n, v in report.metrics().items() if "part" in n} == {
        "eval/part/a": 0.5, "eval/part/b": 3.0, "eval/part/d": 1.0
    }  # fmt: skip
    seen = episode_stats([[*scored, unscored]], 0)
    assert {n: (s.total, s.count) for n, s in seen.items() if "part" in n} == {
        "part/a": (1, 2), "part/b": (3, 1), "part/d": (1, 1)
    }  # fmt: skip


def test_with_one_answer_a_task_the_interval_is_wilsons() -> None:
    report = summarise([[episode("a", 1.0, True)]] * 8 + [[episode("a", 0.0)]] * 2, 1, lambda text: text)
    assert report.accuracy == wilson(8, 10)
    assert report.pass_at == {} and report.maj_at == {}


def test_unscored_answers_are_counted_apart_and_never_as_wrong() -> None:
    groups = [[episode("a", 1.0, True), episode("b", None)], [episode("a", 1.0, True), episode("a", 0.0)]]
    report = summarise(groups, 2, lambda text: text)
    assert report.unscored == 1
    assert report.reward == pytest.approx(2 / 3)
    assert report.accuracy.n == report.pass_at[2].n == 1  # the whole group only
    single = summarise([[episode("a", 1.0, True)], [episode("b", None)]], 1, lambda text: text)
    assert single.accuracy == wilson(1, 1)


def test_an_estimate_prints_as_a_share_with_its_interval() -> None:
    assert str(wilson(8, 10)) == "80.0% [49.0%, 94.3%]"


def test_unanimous_tasks_are_not_certainty() -> None:
    assert bootstrap([1.0] * 5) == wilson(5, 5) and bootstrap([0.0]) == wilson(0, 1)
    assert bootstrap([1.0] * 5).low < 0.6 and bootstrap([0.5, 0.5]).low == 0.5
