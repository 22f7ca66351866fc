"""Agreement between annotators and their habits, as shares with 95 % intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import NamedTuple, TypedDict

from posttrain.evaluation.intervals import Estimate, wilson
from posttrain.lab.label.store import Label


class Kappa(NamedTuple):
    """Cohen's κ with its interval: 1 is perfect agreement, 0 agreement by chance, None undefined."""

    value: float | None
    low: float | None
    high: float | None
    chance: float


class Share(TypedDict):
    """A share of `n` items with its interval; the value is None if nothing was counted."""

    value: float | None
    low: float
    high: float
    n: int


class Agreement(TypedDict):
    """Agreement of two annotators; `kappa` has the fields of `Kappa`."""

    one: str
    other: str
    agreed: Share
    kappa: dict[str, float | None]


class Habits(TypedDict):
    """What an annotator does: how many labels and ties, how often the left answer wins, median seconds per label."""

    name: str
    labels: int
    ties: int
    left: Share
    seconds: float


def kappa(one: Sequence[str], other: Sequence[str]) -> tuple[Estimate, Kappa]:
    """(share of items that two people label alike, Cohen's κ = (p − c) / (1 − c)) for their labels in the same order.

    c is the agreement expected by chance: Σ over labels of the product of both shares (Cohen, 1960). The interval
    treats c as known, as Cohen's does, and uses Wilson's interval for p. κ is undefined if both always gave the same
    single label.
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


def agreements(labels: Sequence[Label]) -> list[Agreement]:
    """Agreement and κ for every two annotators who labelled at least one pair in common."""
    said: dict[str, dict[str, str]] = {}
    for label in labels:
        said.setdefault(label.annotator, {})[label.pair] = label.preferred
    rows: list[Agreement] = []
    for one, other in combinations(sorted(said), 2):
        both = [pair for pair in said[one] if pair in said[other]]
        if both:
            agreed, beyond = kappa(*([said[who][pair] for pair in both] for who in (one, other)))
            rows.append({"one": one, "other": other, "agreed": share(agreed), "kappa": beyond._asdict()})
    return rows


def habits(labels: Sequence[Label]) -> list[Habits]:
    """Per annotator: labels, ties, how often the left answer won (ties excluded), median seconds per label."""
    rows: list[Habits] = []
    for name in sorted({label.annotator for label in labels}):
        own = [label for label in labels if label.annotator == name]
        told = [label for label in own if label.preferred != "tie"]
        left = wilson(sum(label.preferred == label.left for label in told), len(told))
        seconds = median(label.seconds for label in own)
        rows.append(
            {"name": name, "labels": len(own), "ties": len(own) - len(told), "left": share(left), "seconds": seconds}
        )
    return rows


def share(estimate: Estimate) -> Share:
    """An estimate for JSON, which has no NaN."""
    return {
        "value": estimate.value if estimate.n else None, "low": estimate.low, "high": estimate.high, "n": estimate.n,
    }  # fmt: skip
