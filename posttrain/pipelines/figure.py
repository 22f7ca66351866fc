"""What a recipe says of a figure, what it is drawn from, and what comes out; the kinds are in figures.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posttrain.evaluation.intervals import Z95
from posttrain.pipelines.plots import Panel, Series
from posttrain.types import ConfigError

MOST_POINTS = 40
"""Points of a series: longer curves are averaged over consecutive steps, stored answers read at evenly spaced steps."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Figure:
    kind: str
    """What is drawn: `cards`, `curves`, `frontier`, `equal-kl`, `overoptimisation`, `diversity` or `thinking`."""
    name: str
    """The files' name: lower-case letters, digits and hyphens."""
    title: str = ""
    """What stands above it; empty is the name."""
    stages: tuple[str, ...] = ()
    """Stages to draw, in this order; empty draws all that have what the kind needs."""
    metrics: tuple[str, ...] = ()
    """Metrics of `curves`, entries of the card for `cards` and `equal-kl`, proxy and truth of `overoptimisation`."""
    y: str = ""
    """Of `frontier`: a metric of training steps or of evaluations, or `card/NAME`; empty is `accuracy`."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"figure name {self.name!r} is no file name; use lower-case letters, digits and hyphens.")
        if self.kind == "overoptimisation" and len(self.metrics) not in (0, 2):
            raise ConfigError(
                f"figure {self.name}: metrics={list(self.metrics)} are not two; write the proxy's and the true one's, "
                'as in ["reward", "accuracy"].'
            )
        if self.kind == "curves" and not self.metrics:
            raise ConfigError(f'figure {self.name}: curves of nothing; write metrics = ["eval/accuracy", …].')


class Finished(NamedTuple):
    """A stage that has ended: its folder, and the card of its model where that was examined."""

    name: str
    folder: Path
    card: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Drawn:
    """Panels to draw, and numbers beside them that the panels do not show; both are given back as JSON."""

    panels: tuple[Panel, ...]
    numbers: Mapping[str, Any] = field(default_factory=lambda: {})


LABELS: dict[str, tuple[str, bool]] = {
    "accuracy": ("share that passed", True),
    "eval/accuracy": ("held-out share that passed", True),
    "reward": ("mean reward", False),
    "score": ("mean score", False),
    "eval/reward": ("held-out mean reward", False),
    "think_share": ("share that think", True),
    "eval/think_share": ("held-out share that think", True),
    "length": ("tokens per answer", False),
    "eval/length": ("tokens per held-out answer", False),
    "truncated": ("share that was cut", True),
    "flat_groups": ("share of flat groups", True),
    "kl": ("KL, nats per token", False),
    "kl_episode": ("KL, nats per answer", False),
    "pair_kl": ("KL, nats per answer", False),
    "entropy": ("entropy, nats per token", False),
    "nll": ("loss, nats per token", False),
    "eval/nll": ("held-out loss, nats per token", False),
    "preference_accuracy": ("share of pairs told apart", True),
    "eval/preference_accuracy": ("held-out pairs told apart", True),
    "pair_accuracy": ("share of pairs told apart", True),
    "eval/pair_accuracy": ("held-out pairs told apart", True),
    "step_accuracy": ("share of steps judged right", True),
    "eval/step_accuracy": ("held-out steps judged right", True),
}
"""Metric → what an axis calls it, and whether it is a share. Those of a card are in card.LABELS."""


def label(metric: str) -> tuple[str, bool]:
    """What an axis says of a metric, and whether it is shown in percent."""
    plain = metric.removeprefix("eval/").removeprefix("part/").replace("_", " ")
    return LABELS.get(metric, (plain, False))


def binned(
    x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of x and y over at most `most` runs of consecutive points, and 1.96 standard errors of the second (K,).

    Where there are no more points than `most` they stay as they are and have no error (NaN). Points without a finite
    value are left out.
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
    """A line of binned points, with intervals where every point is a mean of several."""
    at, mean, error = binned(x, y, most)
    if not len(error) or not np.isfinite(error).all():
        return Series(name, tuple(at.tolist()), tuple(mean.tolist()))
    ends = (tuple((mean - error).tolist()), tuple((mean + error).tolist()))
    return Series(name, tuple(at.tolist()), tuple(mean.tolist()), *ends)


def bounded(low: Sequence[float], high: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The ends of a line's intervals, or none where a point has no interval: a band with holes is no band."""
    return (tuple(low), tuple(high)) if all(math.isfinite(end) for end in (*low, *high)) else ((), ())


def steps_label(longest: int, most: int = MOST_POINTS) -> str:
    """The x axis of curves of at most `longest` steps."""
    return "step" if longest <= most else f"step (points are means over up to {math.ceil(longest / most)} steps)"


def estimate_of(card: Mapping[str, Any] | None, name: str) -> tuple[float, float, float] | None:
    """(value, low, high) of an entry of a card, the interval NaN where it has none; None where there is no number."""
    found = (card or {}).get(name)
    if isinstance(found, Mapping) and isinstance(found.get("value"), int | float):
        low, high = found.get("low"), found.get("high")
        ends = (math.nan, math.nan) if low is None or high is None else (float(low), float(high))
        return (float(found["value"]), *ends) if math.isfinite(found["value"]) else None
    if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found):
        return float(found), math.nan, math.nan
    return None
