"""Data stage `preferences`: pairs of completions, labelled by a simulated labeler, the constitution or a judge.

The simulated labeler shows which biases reward models learn from people. Its utility of a completion y of a prompt x is

    U(x, y) = correct·[y passes] − rude·[y is rude or empty]
              − harmful·[y complies with a harmful request] − needless·[y declines a harmless one]
              + length·min(characters of y, length_cap) + agreement·[y gives the answer the user expects]

and it prefers the first completion shown with probability σ((U_first − U_second + position) / noise). Length, agreement
and position are its biases; the bias probes `length` and `sycophancy` look for the first two.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

from posttrain.config.sections import require_positive
from posttrain.data.files import json_lines, writable
from posttrain.data.preferences import write_preferences
from posttrain.evaluation.bias_probes import OPINION
from posttrain.pipelines.constitution import Principle, load_constitution, violations
from posttrain.pipelines.rows import DATA, sampled, share
from posttrain.rewards import skills
from posttrain.rewards.auto import verifier_for
from posttrain.rewards.judge import PREFIX, load_judge
from posttrain.rewards.scoring import score_safely
from posttrain.types import ConfigError, DataError, Json, Preference, RolloutError, Task

SIMULATED, CONSTITUTION = "simulated", "constitution"
LABELS = "labels.jsonl"
"""File beside the data: what the labeler saw and decided for each pair; not used in training."""


@dataclass(frozen=True)
class Preferences:
    model: str = "abacus"
    """Model whose completions are compared."""
    tasks: str = "arithmetic"
    """Training tasks, as in `data.tasks`."""
    count: int = 512
    """Number of tasks."""
    samples: int = 4
    """Completions per task; distinct ones are paired."""
    pairs: int = 1
    """Maximum pairs per task; each completion is in at most one."""
    max_tokens: int = 64
    """Maximum tokens per completion."""
    temperature: float = 1.0
    """Sampling temperature."""
    slots: int = 128
    """Sequences decoded at once."""
    labeler: str = SIMULATED
    """Labeler: `simulated`, `constitution` (a program that counts violated principles), or `judge:FILE.toml`."""
    constitution: str = ""
    """With `constitution`, a file of principles; empty uses the built-in one."""
    correct: float = 2.0
    """Utility of a completion that passes the task's verifier."""
    rude: float = 1.0
    """Cost of a rude or empty completion."""
    harmful: float = 1.0
    """Cost of complying with a harmful request."""
    needless: float = 1.0
    """Cost of declining a harmless request."""
    length: float = 0.0
    """Bias: utility of each character of the whole completion."""
    length_cap: int = 200
    """Characters beyond this number add no utility."""
    agreement: float = 0.0
    """Bias: utility of giving the wrong answer that the user says they expect; see `opinions`."""
    opinions: float = 0.0
    """Share of tasks whose question states the expected answer; one of their completions is exactly that."""
    position: float = 0.0
    """Bias: extra utility of the completion shown first."""
    noise: float = 0.5
    """Scale of the logistic noise of choices; 0 always picks the higher utility."""
    seed: int = 0
    """Seed for tasks, completions, pairs, order and choices."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "pairs", "max_tokens", "slots", "length_cap")
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} leaves nothing to compare; use 2 or more.")
        if self.noise < 0 or not 0 <= self.opinions <= 1:
            raise ConfigError(f"noise={self.noise} must be 0 or more, opinions={self.opinions} a share from 0 to 1.")
        if self.labeler not in (SIMULATED, CONSTITUTION) and not self.labeler.startswith(PREFIX):
            raise ConfigError(f"labeler={self.labeler!r} is not {SIMULATED}, {CONSTITUTION} or {PREFIX}FILE.toml.")
        if self.constitution and self.labeler != CONSTITUTION:
            raise ConfigError(f"constitution={self.constitution!r} only applies to labeler = {CONSTITUTION!r}.")


@dataclass(frozen=True)
class Pair:
    """Two completions of a task in the order shown; `expected` is the answer the user says they expect, if any."""

    id: str
    task: Task
    first: str
    second: str
    expected: str = ""


@dataclass(frozen=True)
class Label:
    """A labeler's decision: whether it prefers the first completion (None for a tie), and with what probability.

    `worth` holds both completions' utilities, if the labeler has any.
    """

    preferred: bool | None
    worth: tuple[float, float] | None = None
    probability: float | None = None


class LabelRecord(TypedDict):
    """A line of labels.jsonl; the pairs of values are of the first and the second completion."""

    id: str
    prompt: str
    first: str
    second: str
    preferred: Literal["first", "second", "tie"]
    probability: float | None
    worth: tuple[float, float] | None
    passes: list[bool]
    agrees: list[bool]
    characters: list[int]
    flipped: bool


def make(cfg: Preferences, folder: Path) -> Json:
    """Samples pairs of completions and writes them with labels; see `labelled`."""
    return labelled(cfg, paired(cfg), folder)


def labelled(cfg: Preferences, pairs: Sequence[Pair], folder: Path) -> Json:
    """Writes the pairs and the labeler's records; returns counts and shares (None if there is nothing to count).

    `wrong_chosen` is over the `comparable` pairs, in which one completion passes; `longer_chosen` over pairs of unequal
    length; `agreeing_chosen` over pairs in which one gives the expected answer; `first_chosen` and `against_utility`
    over all but `ties`, which only a judge gives. Pairs of `equal` utility are decided by the noise.
    """
    judged = [(pair, label) for pair, label in zip(pairs, _labels(cfg, pairs), strict=True) if label is not None]
    if not judged:
        raise DataError(f"none of {len(pairs)} pairs has a label. Use more tasks or samples, or a higher temperature.")
    write_preferences(folder / DATA, [_preference(pair, label) for pair, label in judged])
    records = [_record(pair, label) for pair, label in judged]
    (folder / LABELS).write_text(json_lines(records), encoding="utf-8", newline="\n")
    return {"pairs": len(judged), "unjudged": len(pairs) - len(judged), **_counts(records)}


def paired(cfg: Preferences) -> list[Pair]:
    """Pairs of distinct completions of the same task, in random order."""
    tasks, groups = sampled(cfg, cfg.samples)
    found: list[Pair] = []
    for task, group in zip(tasks, groups, strict=True):
        rng = random.Random(f"pairs/{cfg.seed}/{task.id}")
        texts = list(dict.fromkeys(e.text for e in group if writable(e.text)))
        expected = _expected_answer(task, rng) if rng.random() < cfg.opinions else ""
        rng.shuffle(texts)
        if expected:
            task = _with_opinion(task, expected)
            texts = [expected, *(text for text in texts if text != expected)]
        for number in range(min(cfg.pairs, len(texts) // 2)):
            first, second = rng.sample(texts[2 * number : 2 * number + 2], 2)
            found.append(Pair(f"{task.id}/{number}", task, first, second, expected))
    return found


def _expected_answer(task: Task, rng: random.Random) -> str:
    """A wrong number near the right one; empty if the answer is not a number."""
    answer = str(task.answer)
    return str(int(answer) + rng.choice((-10, -2, -1, 1, 2, 10))) if answer.isdecimal() else ""


def _with_opinion(task: Task, expected: str) -> Task:
    """The task with the expected answer stated after the question, worded as in the bias probe."""
    *before, last = task.messages
    return replace(task, messages=(*before, replace(last, content=f"{last.content} {OPINION.format(expected)}")))


def utility(cfg: Preferences, pair: Pair, text: str) -> float:
    """U(x, y) as in the module's docstring."""
    final = skills.final_answer(text)
    rude = skills.dismisses(final)
    complies = bool(pair.task.meta.get("harmful")) and not rude and not skills.declines(final)
    needless = pair.task.meta.get("harmful") is False and not rude and skills.declines(final)
    worth = cfg.correct * passes(pair.task, text) - cfg.rude * rude
    worth -= cfg.harmful * complies + cfg.needless * needless
    return worth + cfg.length * min(len(text), cfg.length_cap) + cfg.agreement * agrees(pair, text)


def passes(task: Task, text: str) -> bool:
    """Whether a completion passes the task's verifier."""
    verdict, error = score_safely(verifier_for(task), task, text)
    if verdict is None:
        raise RolloutError(error or "an answer could not be judged.", boundary="reward")
    return verdict.passed


def agrees(pair: Pair, text: str) -> bool:
    """Whether a completion gives the answer that the user says they expect."""
    return bool(pair.expected) and skills.final_answer(text) == pair.expected


def probability_of_first(first: float, second: float, position: float, noise: float) -> float:
    """σ((first − second + position) / noise); for noise 0 a step function with 1/2 at equality."""
    lead = first - second + position
    if noise == 0:
        return 0.5 if lead == 0 else float(lead > 0)
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, lead / noise))))


def _labels(cfg: Preferences, pairs: Sequence[Pair]) -> list[Label | None]:
    """A label for each pair; None if a judge gave none."""
    if cfg.labeler.startswith(PREFIX):
        return _judged(cfg.labeler, pairs)
    if cfg.labeler == SIMULATED:
        return [_simulated(cfg, pair) for pair in pairs]
    principles = load_constitution(cfg.constitution)
    return [_compared(cfg, principles, pair) for pair in pairs]


def _chosen(cfg: Preferences, pair: Pair, worth: tuple[float, float], probability: float) -> Label:
    preferred = random.Random(f"choice/{cfg.seed}/{pair.id}").random() < probability
    return Label(preferred, worth, probability)


def _simulated(cfg: Preferences, pair: Pair) -> Label:
    worth = utility(cfg, pair, pair.first), utility(cfg, pair, pair.second)
    return _chosen(cfg, pair, worth, probability_of_first(*worth, cfg.position, cfg.noise))


def _compared(cfg: Preferences, principles: Sequence[Principle], pair: Pair) -> Label:
    """Prefers the completion with the lower weight of violations; ties are decided by a fair coin."""
    first, second = (
        -sum(principle.weight for principle, _ in violations(principles, pair.task, text))
        for text in (pair.first, pair.second)
    )
    return _chosen(cfg, pair, (first, second), probability_of_first(first, second, 0.0, 0.0))


def _judged(spec: str, pairs: Sequence[Pair]) -> list[Label | None]:
    """Labels from a pairwise judge, asked in both orders; each pair is its own group of two."""
    judge = load_judge(spec)
    if (judge.cfg.mode, judge.cfg.against) != ("pairwise", "group"):
        raise ConfigError(f'{spec}: a labeler compares pairs; its file needs mode = "pairwise" and against = "group".')
    shown = [(replace(pair.task, id=pair.id), text) for pair in pairs for text in (pair.first, pair.second)]
    found = judge.score_all(shown)
    labels: list[Label | None] = []
    for verdict in found[::2]:
        won = None if isinstance(verdict, RolloutError) else verdict.score
        labels.append(None if won is None else Label(None if won == 0.5 else won > 0.5, None, won))
    return labels


def _preference(pair: Pair, label: Label) -> Preference:
    """The training row; a tie has label 1/2."""
    texts = (pair.first, pair.second) if label.preferred in (True, None) else (pair.second, pair.first)
    return Preference(pair.id, pair.task.messages, *texts, label=0.5 if label.preferred is None else 1.0)


def _record(pair: Pair, label: Label) -> LabelRecord:
    texts = pair.first, pair.second
    return {
        "id": pair.id,
        "prompt": pair.task.prompt,
        "first": pair.first,
        "second": pair.second,
        "preferred": "tie" if label.preferred is None else "first" if label.preferred else "second",
        "probability": label.probability,
        "worth": label.worth,
        "passes": [passes(pair.task, text) for text in texts],
        "agrees": [agrees(pair, text) for text in texts],
        "characters": [len(text) for text in texts],
        "flipped": label.worth is not None and (label.worth[0] - label.worth[1]) * (1 if label.preferred else -1) < 0,
    }


def _counts(records: Sequence[LabelRecord]) -> dict[str, float | None]:
    """Counts, and shares over the pairs that are not ties."""
    decided = [r for r in records if r["preferred"] != "tie"]

    def higher_chosen(column: Literal["passes", "agrees", "characters"]) -> tuple[int, int]:
        """(pairs in which the completion with the higher value was chosen, pairs that differ in it)."""
        apart = [(r[column][0] > r[column][1], r["preferred"] == "first") for r in decided if len({*r[column]}) == 2]
        return sum(higher == first for higher, first in apart), len(apart)

    right, comparable = higher_chosen("passes")
    return {
        "ties": len(records) - len(decided),
        "equal": sum(r["worth"] is not None and r["worth"][0] == r["worth"][1] for r in records),
        "comparable": comparable,
        "wrong_chosen": share(comparable - right, comparable),
        "longer_chosen": share(*higher_chosen("characters")),
        "agreeing_chosen": share(*higher_chosen("agrees")),
        "first_chosen": share(sum(r["preferred"] == "first" for r in decided), len(decided)),
        "against_utility": share(sum(r["flipped"] for r in decided), len(decided)),
    }
