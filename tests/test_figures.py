"""Figures of pipelines: what is counted, what is fitted, what is drawn, and what a recipe may say."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.pipelines import best_of_n, over_kl
from posttrain.pipelines.counting import Counts, add, count, equations, thought, value_of
from posttrain.pipelines.equal_kl import equal_kl
from posttrain.pipelines.figure import Figure, Finished, binned, estimate_of
from posttrain.pipelines.figures import FIGURES, as_json, draw, read_figure
from posttrain.pipelines.over_steps import interval
from posttrain.pipelines.overoptimisation import FITS, columns, fit_points, fit_tasks, peak_of
from posttrain.pipelines.plots import spread
from posttrain.store.run import EpisodeRow, Run
from posttrain.types import ConfigError
from tests import tiny

# --- counting -------------------------------------------------------------------------------------------------------


def test_a_thought_is_between_the_marks_or_to_the_end_where_it_never_closes() -> None:
    assert thought("<think>7+8=15</think>15") == "7+8=15"
    assert thought("<think>7+8=15, then") == "7+8=15, then"
    assert thought("15") == "" and thought("</think>15") == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("20*5=100, 7*5=36, 100+35=135", [("20*5", "100", True), ("7*5", "36", False), ("100+35", "135", True)]),
        ("12*4=40+8=48", [("12*4", "40+8", True), ("40+8", "48", True)]),
        ("so 3 × 4 = 12 and 9 ÷ 2 = 4.5", [("3×4", "12", True), ("9÷2", "4.5", True)]),
        ("(2+3)*4=20", [("(2+3)*4", "20", True)]),
        ("that (20+5=25) is it", [("20+5", "25", True)]),
        ("8-11=-3", [("8-11", "-3", True)]),
        ("0.1+0.2=0.3", [("0.1+0.2", "0.3", True)]),
        ("x = 5, 5 = 5, a2+3=5, 7/0=1, 2+2=4x, x - 3*2 = 4", []),
        ("- 3*2 = 6\n- 2 + 2 = 4", [("3*2", "6", True), ("2+2", "4", True)]),
    ],
)
def test_equations_are_read_as_written_and_judged_exactly(text: str, found: list[tuple[str, str, bool]]) -> None:
    assert [(e.left, e.right, e.right_is_true) for e in equations(text)] == found


@given(st.lists(st.integers(0, 999), min_size=2, max_size=5), st.data())
def test_the_value_of_an_expression_is_that_of_exact_arithmetic(numbers: list[int], data: st.DataObject) -> None:
    signs = [data.draw(st.sampled_from("+-*")) for _ in numbers[1:]]
    text = str(numbers[0]) + "".join(f"{s}{n}" for s, n in zip(signs, numbers[1:], strict=True))
    assert value_of(text) == Fraction(eval(text))
    assert [e.right_is_true for e in equations(f"well, {text}={eval(text)}.")] == [True]


@given(st.text(alphabet="0123456789+-*/=(). <think>a", max_size=300))
def test_any_text_can_be_counted_and_no_part_exceeds_the_whole(text: str) -> None:
    found = count(text)
    assert found.right <= found.equations and found.checks <= found.equations and found.corrected <= found.corrections


def test_checking_is_counted_by_hand() -> None:
    found = count("7+8=16, wait, let me check again: 7+8=15. 7+8=15, 8+7=15, 10+5=15. Checked, verify")
    assert (found.equations, found.right) == (5, 4)
    assert (found.corrections, found.corrected, found.repeated, found.recomputed) == (1, 1, 1, 2)
    assert found.words == {"wait": 1, "check": 3, "again": 1, "let me": 1}
    assert found.checks == 4
    plain = count("20*5=100, 7*5=35, 100+35=135")
    assert plain == Counts(3, 3), "working a problem out is not checking it"
    assert add([found, plain]).equations == 8 and add([]) == Counts()


def test_a_long_text_without_an_equation_is_read_quickly() -> None:
    assert count("1+" * 4000 + "x") == Counts() and count("1" * 9000 + "x") == Counts()


# --- Gao et al.'s curves --------------------------------------------------------------------------------------------


def test_the_curves_by_hand() -> None:
    d = np.array([0.0, 1.0, math.e])
    assert columns(d, "best-of-n") @ [3, 0.5] == pytest.approx([0, 2.5, 3 * math.e - 0.5 * math.e**2])
    assert columns(d, "rl") @ [3, 0.5] == pytest.approx([0, 3, 2.5 * math.e])
    assert peak_of(3, 0.5, "best-of-n") == 3 and peak_of(1, 0.5, "rl") == pytest.approx(math.e)
    assert peak_of(3, -0.1, "rl") is None and peak_of(3, 0, "best-of-n") is None and peak_of(-1, 1, "best-of-n") is None


@settings(max_examples=10)
@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(-5, 5))
def test_a_fit_finds_the_curve_that_made_the_points(alpha: float, beta: float, base: float) -> None:
    d = np.array([0, 0.4, 0.8, 1.3, 2.0, 2.6])
    by_tasks = np.stack([base + shift + columns(d, "best-of-n") @ [alpha, beta] for shift in (-1.0, 0.0, 1.0)])
    found = fit_tasks(d, by_tasks)
    assert (found.alpha.value, found.beta.value) == pytest.approx((alpha, beta), abs=1e-6)
    assert found.base == pytest.approx(base, abs=1e-9) and found.rms < 1e-6
    assert found.alpha.low == pytest.approx(alpha, abs=1e-6), "all tasks have the same curve, so nothing is uncertain"
    assert found.at(d) == pytest.approx(by_tasks.mean(0), abs=1e-6)
    found = fit_points(d, base + columns(d, "rl") @ [alpha, beta])
    assert (found.alpha.value, found.beta.value, found.base) == pytest.approx((alpha, beta, base), abs=1e-6)


def test_the_interval_of_a_noisy_fit_holds_the_truth_and_narrows_with_more_points() -> None:
    def width(count: int) -> float:
        draw = np.random.default_rng(1)
        d = np.linspace(0, 3, count)
        found = fit_points(d, columns(d, "rl") @ [2, 0.7] + 0.1 * draw.standard_normal(count))
        assert found.alpha.low < 2 < found.alpha.high and found.beta.low < 0.7 < found.beta.high
        return found.alpha.high - found.alpha.low

    assert width(400) < 0.5 * width(40)


@pytest.mark.parametrize(
    ("form", "distance", "says"),
    [("best-of-n", [0.0, 1.0], "2 different distances above 0"), ("rl", [0.0, 1.0], "3 different distances"),
     ("best-of-n", [0.5, 1.0, 2.0], "expected 0"), ("rl", [0.0, math.nan, 1.0, 2.0], "all finite")],
)  # fmt: skip
def test_too_few_points_are_refused(form: Any, distance: list[float], says: str) -> None:
    values = np.zeros((2, len(distance))) if form == "best-of-n" else np.zeros(len(distance))
    with pytest.raises(ValueError, match=says):
        FITS[form](np.array(distance), values)


# --- what is drawn --------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=9))
def test_labels_keep_their_order_and_their_distance(heights: list[float]) -> None:
    out = spread(heights, 0.075)
    assert [*np.argsort(heights, kind="stable")] == [*np.argsort(out, kind="stable")]
    assert all(b - a >= 0.075 - 1e-9 for a, b in zip(sorted(out), sorted(out)[1:], strict=False))
    assert all(h <= 1 for h in out)


def test_long_curves_are_averaged_and_short_ones_are_not() -> None:
    x, y, error = binned([1, 2, 3], [5.0, math.nan, 7.0])
    assert (x.tolist(), y.tolist()) == ([1, 3], [5, 7]) and np.isnan(error).all()
    x, y, error = binned(range(80), [float(i % 2) for i in range(80)], most=20)
    assert len(x) == 20 and x[0] == 1.5 and (y == 0.5).all()
    assert error[0] == pytest.approx(1.96 * math.sqrt(1 / 3) / 2, abs=1e-3)


def test_an_interval_over_groups_by_hand() -> None:
    assert interval([0.0, 1.0, 0.0, 1.0])[0] == 0.5
    assert interval([0.0, 1.0, 0.0, 1.0])[2] == pytest.approx(0.5 + 1.96 * math.sqrt(1 / 3) / 2, abs=1e-3)
    assert interval([0.0] * 10)[2] == pytest.approx(0.2775, abs=1e-3), "Wilson's, where nothing happened in 10 groups"
    assert math.isnan(interval([])[0])


def row(step: int, group: int, index: int, text: str) -> EpisodeRow:
    nothing = (np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32))
    scored = (1.0, True, "stop", len(text), {}, None)
    return EpisodeRow("train", step, group, index, f"t{group}", f"q{group}?", text, *scored, *nothing, None)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    """A run of 6 steps with known numbers and answers, a best-of-n stage, a card, and a maker that none concern."""
    root = tmp_path_factory.mktemp("stages")
    with Run.create(root / "rl", {"algorithm": "grpo"}) as run:
        for step in range(1, 7):
            texts = ["<think>1+1=2, 1+1=2</think>2", "2" if step < 4 else "<think>1+1=3, wait 1+1=2</think>2"]
            metrics = {"reward": step / 6, "accuracy": step / 8, "kl": 0.1 * (step - 1), "length": 10.0, "entropy": 1.0}
            run.write(step, metrics, {}, [row(step, g, i, text) for g in (0, 1) for i, text in enumerate(texts)])
        evaluation = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6}
        for step in (0, 6):
            run.write(step, evaluation, {})
    (root / "search").mkdir()
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 2}
    rows = [{"n": n, "kl": math.log(n) - (n - 1) / n, "score": estimate, "accuracy": estimate} for n in (1, 2, 4, 8)]
    kept = {"rows": rows, "gold_by_task": [[0.1, 0.3, 0.5, 0.6], [0.3, 0.4, 0.6, 0.7]]}
    (root / "search" / "search.json").write_text(json.dumps(kept))
    card = {name: estimate for name in ("helpfulness", "safety", "reasoning", "over_refusal", "kl")}
    return [
        Finished("data", root / "none"), Finished("sft", root / "none", card), Finished("rl", root / "rl"),
        Finished("bon", root / "search"), Finished("dpo", root / "none", card),
    ]  # fmt: skip


def numbers_of(figure: Figure, stages: list[Finished]) -> dict[str, Any]:
    return as_json(figure, FIGURES[figure.kind](figure, stages))


@pytest.mark.parametrize("kind", FIGURES)
def test_every_kind_gives_the_numbers_of_the_stages_that_have_them_as_json(kind: str, stages: list[Finished]) -> None:
    metrics = ["eval/accuracy", "reward"] if kind == "curves" else []
    figure = read_figure({"kind": kind, "name": "it", "metrics": metrics}, [stage.name for stage in stages])
    numbers = numbers_of(figure, stages)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert any(series["y"] for panel in numbers["panels"] for series in panel["series"])
    assert "data" not in json.dumps(numbers), "a stage without what the kind needs is left out"


@pytest.mark.parametrize("kind", ["cards", "frontier"])
def test_a_pipeline_of_which_nothing_has_ended_has_empty_figures(kind: str, tmp_path: Path) -> None:
    numbers = draw(Figure(kind, "it", stages=("later",)), [], tmp_path)
    assert (tmp_path / "it.svg").exists() and not any(s["y"] for p in numbers["panels"] for s in p["series"])


def test_the_same_numbers_give_the_same_picture(stages: list[Finished], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        draw(Figure("curves", "it", metrics=("reward",)), stages, tmp_path / folder)
    assert (tmp_path / "a" / "it.png").read_bytes().startswith(b"\x89PNG")
    for name in ("it.svg", "it.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_evaluation_goes_with_the_kl_of_the_same_weights(stages: list[Finished]) -> None:
    with Run.read(stages[2].folder) as run:
        assert over_kl.answer_kl(run)[3] == pytest.approx(0.2 * 10), "nats per token times tokens per answer"
        assert over_kl.paired(run, "reward")[0] == pytest.approx([0, 1, 2, 3, 4, 5])
        assert over_kl.paired(run, "eval/accuracy") == ([0.0], [0.5]), (
            "step 0's; of the last weights there is no KL yet"
        )


def test_the_numbers_of_a_run_are_those_it_stored(stages: list[Finished]) -> None:
    numbers = numbers_of(Figure("thinking", "it"), stages)
    assert numbers["first"]["rl"]["share that think"] == 0.5 and numbers["last"]["rl"]["share that think"] == 1
    counts = numbers["counts"]["rl"]
    assert (counts["first"]["repeated"], counts["first"]["corrections"]) == (2, 0)
    assert (counts["last"]["corrections"], counts["last"]["corrected"], counts["last"]["words"]["wait"]) == (2, 2, 2)
    diverse = numbers_of(Figure("diversity", "it"), stages)
    assert diverse["last"]["rl"]["different answers in a group"] == 0.5, "different thoughts, one answer"
    over = numbers_of(Figure("overoptimisation", "it"), stages)
    assert set(over["fits"]) == {"rl", "bon"} and over["fits"]["bon"]["base"] == pytest.approx(0.2)
    assert over["fits"]["rl"]["form"] == "rl" and not over["notes"]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"name": "x"}, "has no kind"),
        ({"kind": "curve", "name": "x"}, "unknown kind 'curve'. Did you mean 'curves'?"),
        ({"kind": "cards", "name": "../x"}, "'../x' is not valid"),
        ({"kind": "curves", "name": "x"}, "curves need metrics"),
        ({"kind": "cards", "name": "x", "stages": ["pppo"]}, "'pppo' is not a stage. Did you mean 'ppo'?"),
        ({"kind": "cards", "name": "x", "stages": "ppo"}, "expected a list"),
        ({"kind": "cards", "name": "x", "metric": ["a"]}, "unknown setting 'metric'. Did you mean 'metrics'?"),
        ({"kind": "overoptimisation", "name": "x", "metrics": ["reward"]}, "must be two, the proxy and the true score"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused_in_one_sentence(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_figure(table, ["sft", "ppo"])


def test_entries_of_a_card_without_a_number_are_no_point() -> None:
    card = {"a": {"value": 0.5, "low": 0.4, "high": 0.6}, "b": 3, "c": "text", "d": {"value": math.nan}, "e": True}
    assert estimate_of(card, "a") == (0.5, 0.4, 0.6) and (estimate_of(card, "b") or [0])[0] == 3.0
    assert [estimate_of(card, name) for name in "cdef"] == [None] * 4 and estimate_of(None, "a") is None


# --- best of n as a stage -------------------------------------------------------------------------------------------


def test_a_search_keeps_what_the_figure_needs_and_its_tasks_average_to_its_rows(tmp_path: Path) -> None:
    model = str(tiny.stopping(tiny.chatty(tmp_path / "tiny")))
    reward = f"{Path(__file__).parent / 'vowels.py'}:vowels"
    cfg = best_of_n.BestOfN(model, "sums", reward, n=4, count=6, max_tokens=8)
    counts = best_of_n.make(cfg, tmp_path)
    kept = over_kl.read_search(tmp_path)
    assert (counts["tasks"], counts["answers"], [row["n"] for row in kept["rows"]]) == (6, 24, [1, 2, 4])
    assert np.mean(kept["proxy_by_task"], 0) == pytest.approx([row["score"]["value"] for row in kept["rows"]])
    assert np.mean(kept["gold_by_task"], 0) == pytest.approx([row["accuracy"]["value"] for row in kept["rows"]])
    numbers = numbers_of(Figure("overoptimisation", "it"), [Finished("bon", tmp_path)])
    assert len(numbers["panels"][0]["series"][0]["y"]) == 3
    with pytest.raises(ConfigError, match="nothing to choose from"):
        replace(cfg, n=1)


def test_methods_are_compared_at_the_largest_kl_that_all_reach(tmp_path: Path) -> None:
    def stage(name: str, kl: float, safety: float) -> Finished:
        return Finished(name, tmp_path, {"kl": {"value": kl}, "safety": {"value": safety}})

    figure = Figure("equal-kl", "equal", metrics=("safety",))
    stages = [stage("sft", 0.0, 0.5), stage("dpo", 16.0, 0.9), stage("dpo-careful", 1.0, 0.6), stage("ppo", 4.0, 0.7)]
    drawn = equal_kl(figure, stages)
    assert drawn.numbers["kl"] == 4.0
    # sqrt(KL) = 2: dpo lies a third of the way from 1 (0.6) to 4 (0.9), ppo is there itself
    assert drawn.numbers["at_equal_kl"] == {"dpo": {"safety": pytest.approx(0.7)}, "ppo": {"safety": 0.7}}
    assert [line.x for line in drawn.panels[0].series] == [(0.0, 1.0, 4.0), (0.0, 2.0)]
    assert equal_kl(figure, stages[:1]).panels == ()
