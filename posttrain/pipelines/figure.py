"""A figure's settings, input and output, and helpers for drawing; the kinds of figures are in figures.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posttrain.evaluation.intervals import Z95
from posttrain.pipelines.plots import Panel, Series
from posttrain.types import ConfigError, JsonView

MOST_POINTS = 40
"""Maximum points of a series: curves average consecutive steps, completions are read at evenly spaced steps."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Figure:
    kind: str
    """Kind of figure: `cards`, `curves`, `frontier`, `equal-kl`, `overoptimisation`, `diversity` or `thinking`."""
    name: str
    """File name: lower-case letters, digits and hyphens."""
    title: str = ""
    """Title; empty uses the name."""
    stages: tuple[str, ...] = ()
    """Stages to draw, in this order; empty draws all that have the data."""
    metrics: tuple[str, ...] = ()
    """For `curves`, metrics; for `cards` and `equal-kl`, card metrics; for `overoptimisation`, proxy and true score."""
    y: str = ""
    """For `frontier`: a training or evaluation metric, or `card/NAME`; empty is `accuracy`."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"figure name {self.name!r} is not valid; use lower-case letters, digits and hyphens.")
        if self.kind == "overoptimisation" and len(self.metrics) not in (0, 2):
            raise ConfigError(
                f"figure {self.name}: metrics={list(self.metrics)} must be two, the proxy and the true score, "
                'as in ["reward", "accuracy"].'
            )
        if self.kind == "curves" and not self.metrics:
            raise ConfigError(f'figure {self.name}: curves need metrics; write metrics = ["eval/accuracy", …].')


class Finished(NamedTuple):
    """A finished stage: its folder, and the card of its model if that was evaluated."""

    name: str
    folder: Path
    card: JsonView | None = None


@dataclass(frozen=True)
class Drawn:
    """Panels to draw, and further numbers that they do not show; both are returned as JSON."""

    panels: tuple[Panel, ...]
    numbers: Mapping[str, object] = field(default_factory=lambda: {})


LABELS: dict[str, tuple[str, bool]] = {
    "accuracy": ("pass rate", True),
    "eval/accuracy": ("held-out pass rate", True),
    "reward": ("mean reward", False),
    "score": ("mean score", False),
    "eval/reward": ("held-out mean reward", False),
    "think_share": ("share that think", True),
    "eval/think_share": ("held-out share that think", True),
    "length": ("tokens per answer", False),
    "eval/length": ("tokens per held-out answer", False),
    "truncated": ("share truncated", True),
    "flat_groups": ("share of flat groups", True),
    "kl": ("KL, nats per token", False),
    "kl_episode": ("KL, nats per answer", False),
    "pair_kl": ("KL, nats per answer", False),
    "entropy": ("entropy, nats per token", False),
    "nll": ("loss, nats per token", False),
    "eval/nll": ("held-out loss, nats per token", False),
    "preference_accuracy": ("share of pairs ranked right", True),
    "eval/preference_accuracy": ("held-out pairs ranked right", True),
    "pair_accuracy": ("share of pairs ranked right", True),
    "eval/pair_accuracy": ("held-out pairs ranked right", True),
    "step_accuracy": ("share of steps judged right", True),
    "eval/step_accuracy": ("held-out steps judged right", True),
}
"""Metric → its axis label, and whether it is a share. Card metrics are in card.LABELS."""


def label(metric: str) -> tuple[str, bool]:
    """Axis label of a metric, and whether it is shown in per cent."""
    plain = metric.removeprefix("eval/").removeprefix("part/").replace("_", " ")
    return LABELS.get(metric, (plain, False))


def binned(
    x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of x and y over at most `most` bins of consecutive points, and 1.96 standard errors of y; (K,) each.

    Up to `most` points are returned as they are, with NaN errors. Points without a finite value are left out.
    """
    points = np.array([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)], float)
    points = points.reshape(-1, 2)
    if len(points) <= most:
        return points[:, 0], points[:, 1], np.full(len(points), math.nan)
    parts = np.array_split(points, most)
    means = np.array([part.mean(0) for part in parts])
    errors = [Z95 * part[:, 1].std(ddof=1) / math.sqrt(len(part)) if len(part) > 1 else math.nan for part in parts]
    return means[:, 0], means[:, 1], np.array(errors)


def series_of(name: str, x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> Series:
    """A line of binned points, with intervals if every point is a mean of several."""
    at, mean, error = binned(x, y, most)
    if not len(error) or not np.isfinite(error).all():
        return Series(name, tuple(at.tolist()), tuple(mean.tolist()))
    ends = (tuple((mean - error).tolist()), tuple((mean + error).tolist()))
    return Series(name, tuple(at.tolist()), tuple(mean.tolist()), *ends)


def bounded(low: Sequence[float], high: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The ends of a line's intervals, or none if any point lacks an interval, since a band cannot have gaps."""
    return (tuple(low), tuple(high)) if all(math.isfinite(end) for end in (*low, *high)) else ((), ())


def steps_label(longest: int, most: int = MOST_POINTS) -> str:
    """x-axis label for curves of at most `longest` steps."""
    return "step" if longest <= most else f"step (points are means over up to {math.ceil(longest / most)} steps)"


def estimate_of(card: JsonView | None, name: str) -> tuple[float, float, float] | None:
    """(value, low, high) of a card metric, with NaN ends if it has no interval; None if it has no number."""
    found = (card or {}).get(name)
    if isinstance(found, Mapping) and isinstance(found.get("value"), int | float):
        low, high = found.get("low"), found.get("high")
        ends = (math.nan, math.nan) if low is None or high is None else (float(low), float(high))
        return (float(found["value"]), *ends) if math.isfinite(found["value"]) else None
    if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found):
        return float(found), math.nan, math.nan
    return None
