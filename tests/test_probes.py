"""Bias probes find the bias that was planted, with its sign, and none where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from posttrain import rng
from posttrain.config import DataConfig
from posttrain.evaluation import bias_probes as probes
from posttrain.evaluation.bias_probes import Finding, Item
from posttrain.rewards.auto import verifier_for
from posttrain.types import DataError, Message, Task


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return probes.load_items(DataConfig(tasks="arithmetic", count=8), 64)


def noise(task: Task, text: str) -> float:
    """A number in [−1, 1) that depends on every letter and on nothing else."""
    return float(2 * rng.uniforms(rng.key(task.prompt, text), 1)[0] - 1)


def is_right(task: Task, text: str) -> bool:
    return f" {task.answer}." in text.replace("*", "")


def scorer(planted: Callable[[Task, str], float], likes_right: float = 1.0) -> probes.Scorer:
    """Noise, something for holding the right answer, and a planted bias."""

    def scores(pairs: Sequence[tuple[Task, str]]) -> list[float]:
        return [noise(t, text) + likes_right * is_right(t, text) + planted(t, text) for t, text in pairs]

    return scores


def found(planted: Callable[[Task, str], float], items: list[Item]) -> dict[str, Finding]:
    return {finding.name: finding for finding in probes.probe(scorer(planted), items)}


def sign(finding: Finding) -> int:
    """+1 or −1 where the interval is on one side of 0, else 0."""
    return (finding.estimate.low > 0) - (finding.estimate.high < 0)


def test_an_unbiased_scorer_has_intervals_that_cover_zero(items: list[Item]) -> None:
    assert {name: sign(f) for name, f in found(lambda task, text: 0.0, items).items()} == {
        "length": 0, "sycophancy": 0, "sycophancy_gap": 0, "format": 0, "position": 0,
    }  # fmt: skip


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("length", lambda task, text: len(text) / 100),
        ("format", lambda task, text: float("**" in text)),
        ("position", lambda task, text: float(text.startswith("The answer") and len(text) > 100)),
    ],
)
def test_a_planted_bias_is_found_with_its_sign(
    name: str, planted: Callable[[Task, str], float], direction: int, items: list[Item]
) -> None:
    findings = found(lambda task, text: direction * planted(task, text), items)
    assert sign(findings[name]) == direction
    assert sign(findings["sycophancy"]) == 0


def agrees(task: Task, text: str) -> float:
    """1 where the reply gives the answer that the user expects."""
    _, stated, opinion = task.prompt.rpartition("I am sure that ")
    return float(bool(stated) and opinion in text.lower())


def test_a_sycophant_prefers_the_wrong_answer_only_where_the_user_expects_it(items: list[Item]) -> None:
    findings = found(lambda task, text: 3 * agrees(task, text), items)
    often, much = findings["sycophancy"], findings["sycophancy_gap"]
    assert often.unit == "share" and 0.5 < often.estimate.low <= often.estimate.value <= 1
    assert much.unit == "SD" and much.estimate.low > 1
    wrong, right = often.example.scores
    assert wrong > right and often.example.texts[0].lower() in often.example.question.lower().replace(
        "i am sure that ", ""
    )
    assert all(sign(findings[name]) == 0 for name in ("length", "format", "position"))


def test_a_contrarian_shows_the_other_sign(items: list[Item]) -> None:
    contrary = scorer(lambda task, text: -3 * agrees(task, text), likes_right=0.0)
    findings = {f.name: f for f in probes.probe(contrary, items)}
    assert sign(findings["sycophancy"]) == sign(findings["sycophancy_gap"]) == -1


def test_a_change_is_measured_in_standard_deviations_of_the_plain_answers(items: list[Item]) -> None:
    def scores(pairs: Sequence[tuple[Task, str]]) -> list[float]:  # right 1, wrong −1: a standard deviation of 1
        return [(1.0 if is_right(t, text) else -1.0) + 0.25 * ("**" in text) for t, text in pairs]

    findings = {f.name: f for f in probes.probe(scores, items)}
    assert findings["length"].estimate.value == 0.0
    assert findings["format"].estimate.value == pytest.approx(0.25)


@pytest.mark.parametrize("task", ["arithmetic", "instructions", "addition", "safety"])
def test_items_hold_a_right_and_a_wrong_answer_and_are_the_same_every_time(task: str) -> None:
    cfg = DataConfig(tasks=task, count=16)
    made = probes.load_items(cfg, 12)
    assert made == probes.load_items(cfg, 12) and len(made) >= 10
    for item in made:
        verify = verifier_for(item.task)
        assert verify(item.task, item.right).passed and not verify(item.task, item.wrong).passed


def test_the_two_texts_of_a_probe_say_the_same_words(items: list[Item]) -> None:
    for item in items:
        first, last = probes.ordered(item)
        assert first != last
        assert sorted(first.replace(".", " ").split()) == sorted(last.replace(".", " ").split())
        marked, plain = probes.formatted(item)
        assert [w for w in marked.replace("*", "").split() if w not in ("##", "-")] == plain.split()
        padded, short = probes.padded(item)
        assert padded.startswith(short) and len(padded) > 3 * len(short)


def test_a_scorer_that_tells_nothing_apart_is_refused(items: list[Item]) -> None:
    with pytest.raises(DataError, match="gives all 128 plain answers the same score, 2: no bias"):
        probes.probe(lambda pairs: [2.0] * len(pairs), items)


def test_tasks_without_an_answer_to_hold_against_another_are_refused() -> None:
    same = [Task(f"t{i}", "mine", (Message("user", f"Say x {i}."),), "x") for i in range(3)]
    with pytest.raises(DataError, match="only 0 of 3 tasks have a gold answer and a wrong one"):
        probes.make_items(same, 0)
