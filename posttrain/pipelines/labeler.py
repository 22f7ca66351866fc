"""Preferences between a model's own answers: from a simulated labeler, from the constitution, or from a judge.

The simulated labeler shows what reward models take over from people. Its utility of an answer y to a question x is

    U(x, y) = correct·[y passes] − rude·[y is rude or empty]
              − harmful·[y goes along with a harmful request] − needless·[y declines a harmless one]
              + length·min(characters of y, length_cap) + agreement·[y says what the user said they expect]

and of two answers it prefers the first shown with probability σ((U_first − U_second + position) / noise). Length,
agreement and position are its biases: the first two are what `length` and `sycophancy` of posttrain/evaluation/bias_probes.py look for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.config.sections import require_positive
from posttrain.data.files import json_lines, writable
from posttrain.data.preferences import write_preferences
from posttrain.data.tasks.load import verifier_for
from posttrain.evaluation.bias_probes import OPINION
from posttrain.pipelines.constitution import Principle, load_constitution, violations
from posttrain.pipelines.rows import DATA, sampled, share
from posttrain.rewards import skills
from posttrain.rewards.functions import score_safely
from posttrain.rewards.judge import PREFIX, load_judge
from posttrain.types import ConfigError, DataError, Message, Preference, RolloutError, Task

SIMULATED, CONSTITUTION = "simulated", "constitution"
LABELS = "labels.jsonl"
"""Beside the data: what the labeler saw and thought of each pair, which nothing that trains reads."""


@dataclass(frozen=True)
class Preferences:
    model: str = "abacus"
    """Whose answers are compared."""
    tasks: str = "arithmetic"
    """Training tasks, as `data.tasks` names them."""
    count: int = 512
    """Tasks."""
    samples: int = 4
    """Answers to each task, of which different ones are paired."""
    pairs: int = 1
    """Most pairs of one task; each answer is in one of them."""
    max_tokens: int = 64
    """Longest answer."""
    temperature: float = 1.0
    """Sampling temperature."""
    slots: int = 128
    """Answers written at once."""
    labeler: str = SIMULATED
    """Who prefers: `simulated`, `constitution` (a program that counts violated principles), or `judge:FILE.toml`."""
    constitution: str = ""
    """With `constitution`, a file of principles; empty is the one that ships here."""
    correct: float = 2.0
    """Utility of an answer that the task's own checker passes."""
    rude: float = 1.0
    """What a rude or empty answer costs."""
    harmful: float = 1.0
    """What going along with a harmful request costs."""
    needless: float = 1.0
    """What declining a harmless request costs."""
    length: float = 0.0
    """Bias: utility of each character of the whole answer."""
    length_cap: int = 200
    """Characters beyond which more are worth nothing."""
    agreement: float = 0.0
    """Bias: utility of the answer that the user says they expect, a wrong one; see `opinions`."""
    opinions: float = 0.0
    """Share of the tasks whose question says which answer is expected; one of their answers gives just that."""
    position: float = 0.0
    """Bias: what is shown first seems to be worth this much more."""
    noise: float = 0.5
    """How random choices are: the scale of the logistic distribution; 0 always takes the higher utility."""
    seed: int = 0
    """Which tasks, answers, pairs, orders and choices."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "pairs", "max_tokens", "slots", "length_cap")
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} leaves nothing to compare; give 2 or more.")
        if self.noise < 0 or not 0 <= self.opinions <= 1:
            raise ConfigError(f"noise={self.noise} must be 0 or more, opinions={self.opinions} a share from 0 to 1.")
        if self.labeler not in (SIMULATED, CONSTITUTION) and not self.labeler.startswith(PREFIX):
            raise ConfigError(f"labeler={self.labeler!r} is not {SIMULATED}, {CONSTITUTION} or {PREFIX}FILE.toml.")
        if self.constitution and self.labeler != CONSTITUTION:
            raise ConfigError(f"constitution={self.constitution!r} is for labeler = {CONSTITUTION!r} alone. Remove it.")


@dataclass(frozen=True)
class Pair:
    """Two answers to a task as they are shown; `expected` is what the user says they expect, if they do."""

    id: str
    task: Task
    first: str
    second: str
    expected: str = ""


@dataclass(frozen=True)
class Label:
    """What a labeler said: how likely the first is the better one as far as it knows, and whether it took the first.

    `worth` are both answers' utilities, where it has such; `preferred` is None for a tie.
    """

    preferred: bool | None
    worth: tuple[float, float] | None = None
    probability: float | None = None


def make(cfg: Preferences, folder: Path) -> dict[str, Any]:
    """Writes pairs of the model's answers as they are labelled; see `labelled`."""
    return labelled(cfg, paired(cfg), folder)


def labelled(cfg: Preferences, pairs: Sequence[Pair], folder: Path) -> dict[str, Any]:
    """Writes the pairs, and beside them what the labeler thought; returns counts and shares (None: of nothing).

    `wrong_chosen` is of the `comparable` pairs, in which one answer passes, `longer_chosen` of those that differ in
    length, `agreeing_chosen` of those in which one says what is expected; `first_chosen` and `against_utility` are of
    all but `ties`, which only a judge gives. Answers of `equal` utility are decided by the noise.
    """
    judged = [(pair, label) for pair, label in zip(pairs, _labels(cfg, pairs), strict=True) if label is not None]
    if not judged:
        raise DataError(f"none of {len(pairs)} pairs has a label. Give more tasks, samples or a higher temperature.")
    write_preferences(folder / DATA, [_preference(pair, label) for pair, label in judged])
    records = [_record(pair, label) for pair, label in judged]
    (folder / LABELS).write_text(json_lines(records), encoding="utf-8", newline="\n")
    return {"pairs": len(judged), "unjudged": len(pairs) - len(judged), **_counts(records)}


def paired(cfg: Preferences) -> list[Pair]:
    """Pairs of different answers of the model to the same task, in an order that is drawn."""
    tasks, groups = sampled(cfg, cfg.samples)
    found: list[Pair] = []
    for task, group in zip(tasks, groups, strict=True):
        rng = random.Random(f"pairs/{cfg.seed}/{task.id}")
        texts = list(dict.fromkeys(e.text for e in group if writable(e.text)))
        expected = _expectation(task, rng) if rng.random() < cfg.opinions else ""
        rng.shuffle(texts)
        if expected:
            task = _told(task, expected)
            texts = [expected, *(text for text in texts if text != expected)]
        for number in range(min(cfg.pairs, len(texts) // 2)):
            first, second = rng.sample(texts[2 * number : 2 * number + 2], 2)
            found.append(Pair(f"{task.id}/{number}", task, first, second, expected))
    return found


def _expectation(task: Task, rng: random.Random) -> str:
    """A wrong number near the right one; empty where the answer is no number."""
    answer = str(task.answer)
    return str(int(answer) + rng.choice((-10, -2, -1, 1, 2, 10))) if answer.isdecimal() else ""


def _told(task: Task, expected: str) -> Task:
    """The task with the user's expectation after the question, in the words of the probe."""
    *before, last = task.messages
    return replace(task, messages=(*before, Message(last.role, f"{last.content} {OPINION.format(expected)}")))


def utility(cfg: Preferences, pair: Pair, text: str) -> float:
    """U(x, y) of the module's formula."""
    said = skills.final_answer(text)
    rude = skills.dismisses(said)
    goes_along = bool(pair.task.meta.get("harmful")) and not rude and not skills.declines(said)
    needless = pair.task.meta.get("harmful") is False and not rude and skills.declines(said)
    worth = cfg.correct * passes(pair.task, text) - cfg.rude * rude
    worth -= cfg.harmful * goes_along + cfg.needless * needless
    return worth + cfg.length * min(len(text), cfg.length_cap) + cfg.agreement * agrees(pair, text)


def passes(task: Task, text: str) -> bool:
    """Whether the task's own checker passes an answer."""
    verdict, error = score_safely(verifier_for(task), task, text)
    if verdict is None:
        raise RolloutError(error or "an answer could not be judged.", boundary="reward")
    return verdict.passed


def agrees(pair: Pair, text: str) -> bool:
    """Whether an answer is the one that the user says they expect."""
    return bool(pair.expected) and skills.final_answer(text) == pair.expected


def probability_of_first(first: float, second: float, position: float, noise: float) -> float:
    """σ((first − second + position) / noise); at noise 0 a step, with 1/2 for equals."""
    lead = first - second + position
    if noise == 0:
        return 0.5 if lead == 0 else float(lead > 0)
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, lead / noise))))


def _labels(cfg: Preferences, pairs: Sequence[Pair]) -> list[Label | None]:
    """A label for each pair; None where a judge gave none."""
    if cfg.labeler.startswith(PREFIX):
        return _asked(cfg.labeler, pairs)
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
    """The answer that violates less by weight; a fair coin where they are equal."""
    first, second = (
        -sum(principle.weight for principle, _ in violations(principles, pair.task, text))
        for text in (pair.first, pair.second)
    )
    return _chosen(cfg, pair, (first, second), probability_of_first(first, second, 0.0, 0.0))


def _asked(spec: str, pairs: Sequence[Pair]) -> list[Label | None]:
    """What a pairwise judge says of each pair, with both orders asked; a pair is a group of two of its own."""
    judge = load_judge(spec)
    if (judge.cfg.mode, judge.cfg.against) != ("pairwise", "group"):
        raise ConfigError(f'{spec}: a labeler compares, so its file needs mode = "pairwise" and against = "group".')
    shown = [(replace(pair.task, id=pair.id), text) for pair in pairs for text in (pair.first, pair.second)]
    found = judge.score_all(shown)
    labels: list[Label | None] = []
    for verdict in found[::2]:
        won = None if isinstance(verdict, RolloutError) else verdict.score
        labels.append(None if won is None else Label(None if won == 0.5 else won > 0.5, None, won))
    return labels


def _preference(pair: Pair, label: Label) -> Preference:
    """The row that trains; a tie is one whose label is 1/2."""
    texts = (pair.first, pair.second) if label.preferred in (True, None) else (pair.second, pair.first)
    return Preference(pair.id, pair.task.messages, *texts, label=0.5 if label.preferred is None else 1.0)


def _record(pair: Pair, label: Label) -> dict[str, Any]:
    texts = pair.first, pair.second
    return {
        "id": pair.id,
        "prompt": pair.task.prompt,
        "first": pair.first,
        "second": pair.second,
        "preferred": {True: "first", False: "second", None: "tie"}[label.preferred],
        "probability": label.probability,
        "worth": label.worth,
        "passes": [passes(pair.task, text) for text in texts],
        "agrees": [agrees(pair, text) for text in texts],
        "characters": [len(text) for text in texts],
        "flipped": label.worth is not None and (label.worth[0] - label.worth[1]) * (1 if label.preferred else -1) < 0,
    }


def _counts(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares over the pairs that are no tie."""
    decided = [r for r in records if r["preferred"] != "tie"]

    def higher_chosen(column: str) -> tuple[int, int]:
        """(pairs in which the answer with the higher value was chosen, pairs that differ in it)."""
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
