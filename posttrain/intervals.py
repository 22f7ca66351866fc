"""A measured share and its 95 % interval, by arithmetic alone: who only reads results waits for no tensor library."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A measured share with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def wilson(passed: int, n: int) -> Estimate:
    """Wilson's score interval for a share of independent yes/no results (Wilson, 1927)."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    p, z2 = passed / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)
