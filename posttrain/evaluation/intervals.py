"""Confidence intervals; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def wilson(passed: int, n: int) -> Estimate:
    """Wilson score interval for a share of independent yes/no results (Wilson, 1927)."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    p, z2 = passed / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def difference(before: Estimate, after: Estimate) -> Estimate:
    """`after` minus `before`, with the 95 % interval that theirs imply (square-and-add; Newcombe, Statistics in
    Medicine 17, 1998; Zou and Donner, Statistics in Medicine 27, 2008).

    Assumes the two are independent. For two models evaluated on the same tasks it tends to be too wide.
    """
    value = after.value - before.value
    low = value - math.hypot(after.value - after.low, before.high - before.value)
    high = value + math.hypot(after.high - after.value, before.value - before.low)
    return Estimate(value, low, high, min(before.n, after.n))
