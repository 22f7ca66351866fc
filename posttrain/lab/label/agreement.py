"""How far people agree, and what their habits are: shares with 95 % intervals, computed from labels alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

from posttrain.evaluation.intervals import Estimate, wilson
from posttrain.lab.label.store import Label


class Kappa(NamedTuple):
    """Agreement beyond chance: 1 is perfect, 0 what two people who answer at random would reach. None: undefined."""

    value: float | None
    low: float | None
    high: float | None
    chance: float


def kappa(one: Sequence[str], other: Sequence[str]) -> tuple[Estimate, Kappa]:
    """(share of items on which two people say the same, Cohen's κ = (p − c) / (1 − c)) of their answers, in order.

    c is the agreement that people with these habits would reach by chance: Σ over answers of the product of both
    shares (Cohen, 1960). The interval takes c as known, as Cohen's own does, and Wilson's ends for p. κ is undefined
    where both always gave the same single answer.
    """
    n = len(one)
    agreed = wilson(sum(a == b for a, b in zip(one, other, strict=True)), n)
    if not n:
        return agreed, Kappa(None, None, None, 0.0)
    mine, theirs = Counter(one), Counter(other)
    chance = sum(mine[answer] * theirs[answer] for answer in mine) / n**2
    if chance == 1:
        return agreed, Kappa(None, None, None, 1.0)
    value, low, high = ((p - chance) / (1 - chance) for p in (agreed.value, agreed.low, agreed.high))
    return agreed, Kappa(value, low, high, chance)


def agreements(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Every two annotators who labelled a pair in common, with what `kappa` says of those pairs."""
    said: dict[str, dict[str, str]] = {}
    for label in labels:
        said.setdefault(label.annotator, {})[label.pair] = label.preferred
    rows: list[dict[str, Any]] = []
    for one, other in combinations(sorted(said), 2):
        both = [pair for pair in said[one] if pair in said[other]]
        if both:
            agreed, beyond = kappa(*([said[who][pair] for pair in both] for who in (one, other)))
            rows.append({"one": one, "other": other, "agreed": share(agreed), "kappa": beyond._asdict()})
    return rows


def habits(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Each annotator: labels, ties, how often the left answer won of those that are no tie, median seconds a label."""
    rows: list[dict[str, Any]] = []
    for name in sorted({label.annotator for label in labels}):
        own = [label for label in labels if label.annotator == name]
        told = [label for label in own if label.preferred != "tie"]
        left = wilson(sum(label.preferred == label.left for label in told), len(told))
        seconds = median(label.seconds for label in own)
        rows.append(
            {"name": name, "labels": len(own), "ties": len(own) - len(told), "left": share(left), "seconds": seconds}
        )
    return rows


def share(estimate: Estimate) -> dict[str, float | int | None]:
    """For JSON, whose numbers are all finite: no value where nothing was counted."""
    return {
        "value": estimate.value if estimate.n else None, "low": estimate.low, "high": estimate.high, "n": estimate.n,
    }  # fmt: skip
