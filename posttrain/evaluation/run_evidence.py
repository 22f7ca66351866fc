"""Evidence from a run folder: curves and completions by step, and the statistics that the checks share.

Loads no model and no torch. A long run is read at MOST_STEPS evenly spaced steps and MOST_ANSWERS completions per step
(whole groups), so a diagnosis takes seconds however long the run.
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
from posttrain.types import Json

Level = Literal["ok", "warn", "alarm", "no data"]
TRUE = "true"
"""The part of a verdict that holds the true reward; the score beside it is a proxy."""
MOST_STEPS, MOST_ANSWERS = 100, 512
SURE = 3.0  # standard errors from which a change counts as significant
SMALL = 0.2  # standard deviations of single completions below which a change is too small to matter (Cohen)
LEAST_STEPS = 4


@dataclass(frozen=True)
class Diagnosis:
    """Result of one check. `since` is the step where the problem began; `numbers` is the evidence for JSON."""

    name: str
    level: Level
    evidence: str
    advice: str = ""
    since: int | None = None
    numbers: Mapping[str, float] = field(default_factory=lambda: {})

    def as_dict(self) -> Json:
        """A JSON-serialisable dict."""
        shown = {"name": self.name, "level": self.level, "since": self.since}
        return {**shown, "evidence": self.evidence, "advice": self.advice, "numbers": dict(self.numbers)}


@dataclass(frozen=True, eq=False)
class Answers:
    """The N completions of one training step, as columns; NaN where one is unscored or lacks that part."""

    step: int
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    errors: tuple[str, ...]  # of the unscored completions
    group: np.ndarray  # (N,) int
    reward: np.ndarray  # (N,) float
    passed: np.ndarray  # (N,) float, 0 or 1
    length: np.ndarray  # (N,) float, tokens
    parts: Mapping[str, np.ndarray]  # (N,) float each

    @staticmethod
    def of(step: int, rows: Sequence[EpisodeRow]) -> Answers:
        """Columns from stored rows."""
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
        """(N,) What each completion is compared with: its group, or the whole step if each task has one completion."""
        return self.group if len(np.unique(self.group)) < len(self.group) else np.zeros_like(self.group)


@dataclass(frozen=True, eq=False)
class Evidence:
    """A run as the checks see it: metrics by name and step, and the completions of its training steps in order."""

    algorithm: str
    metrics: Mapping[str, Mapping[int, float]]
    answers: tuple[Answers, ...]

    def curve(self, name: str, with_nan: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric from step 1 on, both (S,), without NaN (a mean over nothing) unless asked for."""
        known = self.metrics.get(name, {}).items()
        rows = sorted((step, value) for step, value in known if step > 0 and (with_nan or not math.isnan(value)))
        return np.array([step for step, _ in rows], int), np.array([value for _, value in rows], float)

    def until(self, step: int) -> Evidence:
        """The same run up to and including `step`."""
        metrics = {name: {s: v for s, v in curve.items() if s <= step} for name, curve in self.metrics.items()}
        return replace(self, metrics=metrics, answers=tuple(a for a in self.answers if a.step <= step))

    def without_truth(self) -> Evidence:
        """The same run with the stored true reward hidden."""
        hidden = [{n: v for n, v in a.parts.items() if n != TRUE} for a in self.answers]
        return replace(self, answers=tuple(replace(a, parts=p) for a, p in zip(self.answers, hidden, strict=True)))

    @cached_property
    def truth(self) -> tuple[str, list[np.ndarray]] | None:
        """Name and values of the true reward, one (N,) per step; None if only the score is known.

        It is the part named `true`, else whether a completion passed, unless that is just a threshold on the score.
        """
        if any(TRUE in a.parts for a in self.answers):
            return f"part `{TRUE}`", [a.parts.get(TRUE, np.full(len(a.reward), math.nan)) for a in self.answers]
        passed = np.concatenate([a.passed for a in self.answers]) if self.answers else np.zeros(0)
        reward = np.concatenate([a.reward for a in self.answers]) if self.answers else np.zeros(0)
        right, wrong = reward[passed == 1], reward[passed == 0]
        if len(right) and len(wrong) and right.min() < wrong.max():
            return "pass rate", [a.passed for a in self.answers]
        return None

    @property
    def success(self) -> list[np.ndarray]:
        """The true reward if there is one, else whether a completion passed; one (N,) per step."""
        return self.truth[1] if self.truth else [a.passed for a in self.answers]

    def change(self, values: Sequence[np.ndarray]) -> Change | None:
        """Change of a per-completion value, one (N,) per step, from the first to the last part of the run."""
        return change([a.step for a in self.answers], values, [a.group for a in self.answers])


def read_evidence(folder: Path) -> Evidence:
    """Reads the evidence from a run folder, also while the run is going. Raises ResumeError if it holds no run."""
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
    """Length of the first and last part of `count` steps: a quarter, 2 to 10; 0 if there are too few to compare."""
    return min(10, max(2, count // 4)) if count >= LEAST_STEPS else 0


def ends(values: np.ndarray) -> tuple[float, float] | None:
    """Means over the first and last part of a curve; None if it is too short or a part has no finite value."""
    k = span(len(values))
    parts = [part[np.isfinite(part)] for part in (values[:k], values[-k:])] if k else []
    if not parts or not all(len(part) for part in parts):
        return None
    return float(parts[0].mean()), float(parts[1].mean())


def since(steps: Sequence[int] | np.ndarray, bad: Sequence[bool] | np.ndarray) -> int | None:
    """The first bad step from which at least three quarters of the steps are bad."""
    flags = np.asarray(bad, bool)
    for i in np.flatnonzero(flags):
        if flags[i:].mean() >= 0.75:
            return int(steps[int(i)])
    return None


@dataclass(frozen=True)
class Change:
    """Mean of a per-completion value in the first and in the last part of a run.

    `z` is the difference in standard errors, with groups as the random unit (clipped to ±99); `size` is in standard
    deviations of single completions; `since` is the step from which the change was more than half done.
    """

    before: float
    after: float
    z: float
    size: float
    since: int | None

    @property
    def rose(self) -> bool:
        """Whether the rise is both significant and large enough to matter."""
        return self.z >= SURE and self.size >= SMALL

    @property
    def fell(self) -> bool:
        """Whether the fall is both significant and large enough to matter."""
        return self.z <= -SURE and self.size <= -SMALL

    def __str__(self) -> str:
        return f"{self.before:.3g} → {self.after:.3g}"


def change(steps: Sequence[int], values: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Change | None:
    """Change of a per-completion value, one (N,) per step; NaN entries are ignored, None if too few steps remain."""
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
    if abs(difference) <= 1e-9 * max(abs(before), abs(after)):  # equal up to rounding
        return Change(before, after, 0.0, 0.0, None)
    z = float(np.clip(difference / error if error else math.copysign(99, difference), -99, 99))
    half = (means - (before + after) / 2) * difference > 0
    return Change(before, after, z, difference / spread, since([s for s, _, _ in kept], half))


def differences(values: np.ndarray) -> np.ndarray:
    """(N,) finite values minus their mean; exactly 0 if they differ only by rounding."""
    return (values - values.mean()) * (np.ptp(values) > 1e-9 * np.abs(values).max())


def ranks(values: np.ndarray) -> np.ndarray:
    """(N,) ranks from 0; equal values share their mean rank."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[at]


@dataclass
class Correlation:
    """Correlation within clusters, accumulated over steps; `count` is the completions in clusters where y varies."""

    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    count: int = 0

    def add(self, x: np.ndarray, y: np.ndarray, cluster: np.ndarray, ranked: bool = False) -> None:
        """Adds a step: x and y (N,), without rows where either is not finite. `ranked` makes it Spearman's."""
        known = np.isfinite(x) & np.isfinite(y)
        for one in np.unique(cluster[known]):
            inside = known & (cluster == one)
            a, b = (differences(ranks(v[inside]) if ranked else v[inside]) for v in (x, y))
            if b.any():  # a cluster with constant y says nothing about what y correlates with
                self.xx, self.yy, self.xy = self.xx + float(a @ a), self.yy + float(b @ b), self.xy + float(a @ b)
                self.count += len(b)

    @property
    def value(self) -> float:
        """Between -1 and 1; NaN if x or y never varied."""
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx > 0 and self.yy > 0 else math.nan


def _standard_error(values: np.ndarray, group: np.ndarray) -> float:
    """Standard error of the mean, with groups as the random unit, or completions if there is one group."""
    _, at = np.unique(group, return_inverse=True)
    units = np.bincount(at, values) / np.bincount(at)
    units = units if len(units) > 1 else values
    return float(units.std(ddof=1) / math.sqrt(len(units))) if len(units) > 1 else math.inf


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _whole_groups(rows: Sequence[EpisodeRow]) -> list[EpisodeRow]:
    """The first MOST_ANSWERS rows, without a group that would be cut."""
    if len(rows) <= MOST_ANSWERS:
        return list(rows)
    last = rows[MOST_ANSWERS].group
    return [row for row in rows[:MOST_ANSWERS] if row.group != last] or list(rows[:MOST_ANSWERS])
