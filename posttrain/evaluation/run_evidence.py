"""What a run folder says about how its training went: curves and answers by step, and the statistics checks share.

Nothing here loads a model, or torch. A long run is read at MOST_STEPS evenly spaced steps and MOST_ANSWERS answers a
step (whole groups), so that a diagnosis takes seconds however long the run was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from posttrain.store.run import EpisodeRow, Run

Level = Literal["ok", "warn", "alarm", "no data"]
TRUE = "true"
"""The part of a verdict that says what an answer is really worth; a score beside it is a proxy."""
MOST_STEPS, MOST_ANSWERS = 100, 512
SURE = 3.0  # standard errors from which on a change is believed
SMALL = 0.2  # standard deviations of the answers below which a change is too small to matter (Cohen's small effect)
LEAST_STEPS = 4


@dataclass(frozen=True)
class Diagnosis:
    """What one check found. `since` is the step where it began; `numbers` are the evidence as JSON wants it."""

    name: str
    level: Level
    evidence: str
    advice: str = ""
    since: int | None = None
    numbers: Mapping[str, float] = field(default_factory=lambda: {})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shown = {"name": self.name, "level": self.level, "since": self.since}
        return {**shown, "evidence": self.evidence, "advice": self.advice, "numbers": dict(self.numbers)}


@dataclass(frozen=True, eq=False)
class Answers:
    """The N attempts of one training step, as columns; NaN where an attempt was not scored or has no such part."""

    step: int
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    errors: tuple[str, ...]  # of the attempts that were not scored
    group: np.ndarray  # (N,) int
    reward: np.ndarray  # (N,) float
    passed: np.ndarray  # (N,) float, 0 or 1
    length: np.ndarray  # (N,) float, tokens
    parts: Mapping[str, np.ndarray]  # (N,) float each

    @staticmethod
    def of(step: int, rows: Sequence[EpisodeRow]) -> Answers:
        """The columns of stored rows."""
        scored = np.array([row.reward is not None for row in rows], bool)
        names = sorted({name for row in rows for name in row.parts})
        return Answers(
            step,
            tuple(row.prompt for row in rows),
            tuple(row.text for row in rows),
            tuple(row.error for row in rows if row.error),
            np.array([row.group for row in rows], int),
            np.array([math.nan if row.reward is None else row.reward for row in rows], float),
            np.where(scored, [float(row.passed) for row in rows], math.nan),
            np.array([row.length for row in rows], float),
            {name: np.array([_number(row.parts.get(name)) for row in rows], float) for name in names},
        )

    @cached_property
    def cluster(self) -> np.ndarray:
        """(N,) What an answer is compared with: its group; the whole step where every task has one answer."""
        return self.group if len(np.unique(self.group)) < len(self.group) else np.zeros_like(self.group)


@dataclass(frozen=True, eq=False)
class Evidence:
    """A run as the checks see it: metrics by name and step, and the answers of its training steps in order."""

    algorithm: str
    metrics: Mapping[str, Mapping[int, float]]
    answers: tuple[Answers, ...]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric from step 1 on, both (S,); without NaN, which is a mean over nothing."""
        known = self.metrics.get(name, {}).items()
        rows = sorted((step, value) for step, value in known if step > 0 and not math.isnan(value))
        return np.array([step for step, _ in rows], int), np.array([value for _, value in rows], float)

    def until(self, step: int) -> Evidence:
        """The same run as it was known after `step`."""
        metrics = {name: {s: v for s, v in curve.items() if s <= step} for name, curve in self.metrics.items()}
        return replace(self, metrics=metrics, answers=tuple(a for a in self.answers if a.step <= step))

    def without_truth(self) -> Evidence:
        """The same run as if nobody had stored what answers are really worth."""
        hidden = [{n: v for n, v in a.parts.items() if n != TRUE} for a in self.answers]
        return replace(self, answers=tuple(replace(a, parts=p) for a, p in zip(self.answers, hidden, strict=True)))

    @cached_property
    def truth(self) -> tuple[str, list[np.ndarray]] | None:
        """What answers are really worth, step by step (N,), and where that was read; None where only the score says it.

        It is the part named `true`; else whether an answer passed, where that is no threshold on the score.
        """
        if any(TRUE in a.parts for a in self.answers):
            return f"part `{TRUE}`", [a.parts.get(TRUE, np.full(len(a.reward), math.nan)) for a in self.answers]
        passed = np.concatenate([a.passed for a in self.answers]) if self.answers else np.zeros(0)
        reward = np.concatenate([a.reward for a in self.answers]) if self.answers else np.zeros(0)
        right, wrong = reward[passed == 1], reward[passed == 0]
        if len(right) and len(wrong) and right.min() < wrong.max():
            return "share that passed", [a.passed for a in self.answers]
        return None

    @property
    def success(self) -> list[np.ndarray]:
        """The truth where there is one, else whether an answer passed; one (N,) a step."""
        return self.truth[1] if self.truth else [a.passed for a in self.answers]

    def change(self, values: Sequence[np.ndarray]) -> Change | None:
        """How a number of the answers, (N,) a step, changed from the first to the last part of the run."""
        return change([a.step for a in self.answers], values, [a.group for a in self.answers])


def read_evidence(folder: Path) -> Evidence:
    """The evidence in a run folder, also of a run that is still going. Raises ResumeError where there is no run."""
    with Run.read(folder) as run:
        metrics: dict[str, dict[int, float]] = {}
        for step, name, value in run.metrics():
            metrics.setdefault(name, {})[step] = value
        steps = sorted({step for curve in metrics.values() for step in curve if step > 0})
        if len(steps) > MOST_STEPS:
            steps = [steps[int(i)] for i in np.linspace(0, len(steps) - 1, MOST_STEPS).round()]
        read = [(step, _whole_groups(run.episodes("train", step))) for step in steps]
        algorithm = str(run.header.get("algorithm", ""))
    return Evidence(algorithm, metrics, tuple(Answers.of(step, rows) for step, rows in read if rows))


def span(count: int) -> int:
    """Steps in the first and in the last part of `count`: a quarter, 2 to 10; 0 where there are too few to compare."""
    return min(10, max(2, count // 4)) if count >= LEAST_STEPS else 0


def ends(values: np.ndarray) -> tuple[float, float] | None:
    """Means over the first and the last part of a curve; None where it is too short or a part has no finite value."""
    k = span(len(values))
    parts = [part[np.isfinite(part)] for part in (values[:k], values[-k:])] if k else []
    if not parts or not all(len(part) for part in parts):
        return None
    return float(parts[0].mean()), float(parts[1].mean())


def since(steps: Sequence[int] | np.ndarray, bad: Sequence[bool] | np.ndarray) -> int | None:
    """The first bad step from which on at least three quarters of the steps are bad."""
    flags = np.asarray(bad, bool)
    for i in np.flatnonzero(flags):
        if flags[i:].mean() >= 0.75:
            return int(steps[int(i)])
    return None


@dataclass(frozen=True)
class Change:
    """A mean of the answers in the first and in the last part of a run.

    `z` is the difference in standard errors, with groups as the random unit (at most 99 either way); `size` in standard
    deviations of single answers; `since` the step from which on it was more than half done.
    """

    before: float
    after: float
    z: float
    size: float
    since: int | None

    @property
    def rose(self) -> bool:
        """Whether the rise is both certain and large enough to matter."""
        return self.z >= SURE and self.size >= SMALL

    @property
    def fell(self) -> bool:
        """Whether the fall is."""
        return self.z <= -SURE and self.size <= -SMALL

    def __str__(self) -> str:
        return f"{self.before:.3g} → {self.after:.3g}"


def change(steps: Sequence[int], values: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Change | None:
    """The change of a number of the answers, (N,) a step; NaN entries are left out, None if too few steps remain."""
    kept = [(s, v[np.isfinite(v)], g[np.isfinite(v)]) for s, v, g in zip(steps, values, groups, strict=True)]
    kept = [(s, v, g) for s, v, g in kept if len(v)]
    k = span(len(kept))
    if not k:
        return None
    means = np.array([v.mean() for _, v, _ in kept])
    squares = np.array([_standard_error(v, g) ** 2 for _, v, g in kept])
    before, after = float(means[:k].mean()), float(means[-k:].mean())
    difference = after - before
    error = math.sqrt(squares[:k].sum() + squares[-k:].sum()) / k
    spread = float(np.concatenate([v for _, v, _ in kept[:k] + kept[-k:]]).std())
    if abs(difference) <= 1e-9 * max(abs(before), abs(after)):  # rounding is no change
        return Change(before, after, 0.0, 0.0, None)
    z = float(np.clip(difference / error if error else math.copysign(99, difference), -99, 99))
    half = (means - (before + after) / 2) * difference > 0
    return Change(before, after, z, difference / spread, since([s for s, _, _ in kept], half))


def differences(values: np.ndarray) -> np.ndarray:
    """(N,) finite values less their mean; exactly 0 where they differ by no more than rounding."""
    return (values - values.mean()) * (np.ptp(values) > 1e-9 * np.abs(values).max())


def ranks(values: np.ndarray) -> np.ndarray:
    """(N,) ranks from 0; equal values share their mean rank."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[at]


@dataclass
class Correlation:
    """A correlation within the clusters that differ in y, added up over steps; `count` are their answers."""

    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    count: int = 0

    def add(self, x: np.ndarray, y: np.ndarray, cluster: np.ndarray, ranked: bool = False) -> None:
        """Takes in a step: x and y (N,), but for rows where one is not finite. `ranked` makes it Spearman's."""
        known = np.isfinite(x) & np.isfinite(y)
        for one in np.unique(cluster[known]):
            mine = known & (cluster == one)
            a, b = (differences(ranks(v[mine]) if ranked else v[mine]) for v in (x, y))
            if b.any():  # a cluster that is flat in y has no say about what y goes with
                self.xx, self.yy, self.xy = self.xx + float(a @ a), self.yy + float(b @ b), self.xy + float(a @ b)
                self.count += len(b)

    @property
    def value(self) -> float:
        """Between -1 and 1; NaN where x or y never differed."""
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx > 0 and self.yy > 0 else math.nan


def _standard_error(values: np.ndarray, group: np.ndarray) -> float:
    """Of the mean, with groups as the random unit; with one group, its answers."""
    _, at = np.unique(group, return_inverse=True)
    units = np.bincount(at, values) / np.bincount(at)
    units = units if len(units) > 1 else values
    return float(units.std(ddof=1) / math.sqrt(len(units))) if len(units) > 1 else math.inf


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _whole_groups(rows: Sequence[EpisodeRow]) -> list[EpisodeRow]:
    """The first MOST_ANSWERS attempts, without the rest of a group that would be cut."""
    if len(rows) <= MOST_ANSWERS:
        return list(rows)
    last = rows[MOST_ANSWERS].group
    return [row for row in rows[:MOST_ANSWERS] if row.group != last] or list(rows[:MOST_ANSWERS])
