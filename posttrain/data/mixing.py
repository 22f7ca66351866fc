"""Several sources drawn by weights, on a schedule that is exact rather than random.

After any number of draws each source has had its share of them to within one row, and where the schedule stands is
one integer. The schedule is Tijdeman's ("The chairman assignment problem", Discrete Mathematics 32, 1980): always
draw from a source that is owed enough, the one whose next row is due first.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction

from posttrain.rng import draw_order, key
from posttrain.types import ConfigError, DataError


class Mixture:
    """An endless schedule over the rows of several sources.

    `sizes` [K] are the sources' row counts and `weights` [K] their shares of the draws, up to a common factor; a
    weight counts as the decimal it is written as, so 0.7 and 0.3 are exactly 7 : 3. The same four values (with
    `seed`) give the same schedule. Raises ConfigError for weights and DataError for sizes that cannot be drawn from.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not sizes or len(sizes) != len(weights):
            raise ConfigError(f"{len(sizes)} sources have {len(weights)} weights; give each source one weight.")
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            _check_weight(weight, f"source {i}")
            if size < 1:
                raise DataError(f"source {i} has {size} rows, so nothing can be drawn from it. Remove it.")
        self.sizes = tuple(sizes)
        self.seed = seed
        exact = [Fraction(repr(float(weight))) for weight in weights]
        common = math.lcm(*(f.denominator for f in exact))
        whole = [int(f * common) for f in exact]
        divisor = math.gcd(*whole)
        self._units = [w // divisor for w in whole]  # draws of each source in one period
        self.period = sum(self._units)
        """Draws after which the schedule of sources repeats (the rows do not: they are reshuffled every epoch)."""
        # One period of the schedule as far as it was asked for: the source of draw n, and how many of it came before.
        self._source, self._earlier = array("L"), array("Q")
        self._counts = [0] * len(sizes)
        self._windows = [self._window(i, 0) for i in range(len(sizes))]

    @property
    def shares(self) -> list[float]:
        """The weights [K] normalised to sum to 1."""
        return [units / self.period for units in self._units]

    def draw(self, start: int, count: int) -> list[tuple[int, int]]:
        """(source, row) of draws start … start + count − 1.

        A function of the position alone: a run resumes from the one integer `start`. Every source is visited in
        seeded permutations, each of its rows once an epoch; a single source is visited as `rng.draw_order` does.
        The schedule up to `start` within one period is computed once and kept.
        """
        if start < 0 or count < 0:
            raise ConfigError(f"{count} draws from position {start} cannot be made; give non-negative numbers.")
        order = [self._nth(position) for position in range(start, start + count)]
        rows: list[Iterator[int]] = []
        for i, size in enumerate(self.sizes):
            mine = [earlier for source, earlier in order if source == i]
            rows.append(iter(draw_order(size, mine[0], len(mine), self._seed(i)) if mine else ()))
        return [(source, next(rows[source])) for source, _ in order]

    def drawn(self, count: int) -> list[int]:
        """How many of the first `count` draws come from each source [K]; `drawn(n)[i] / sizes[i]` are its epochs."""
        periods, rest = divmod(count, self.period)
        self._grow(rest)
        begun = self._source[:rest]
        return [periods * units + begun.count(i) for i, units in enumerate(self._units)]

    def _nth(self, position: int) -> tuple[int, int]:
        """The source of a draw and how many of that source came before it."""
        periods, rest = divmod(position, self.period)
        self._grow(rest + 1)
        source = self._source[rest]
        return source, periods * self._units[source] + self._earlier[rest]

    def _grow(self, length: int) -> None:
        """Extends the schedule to `length` draws."""
        for n in range(len(self._source) + 1, length + 1):
            owed = [i for i, (first, _) in enumerate(self._windows) if first <= n]
            chosen = min(owed, key=lambda i: self._windows[i][1])
            self._source.append(chosen)
            self._earlier.append(self._counts[chosen])
            self._counts[chosen] += 1
            self._windows[chosen] = self._window(chosen, self._counts[chosen])

    def _window(self, source: int, had: int) -> tuple[int, int]:
        """First and last n at which a source's next row after `had` may be the n-th draw.

        These are where n·w − had, what the source is owed, reaches 1/m and still is at most 1 − 1/m, m = 2K − 2.
        """
        m, units = max(1, 2 * len(self.sizes) - 2), self._units[source]
        first = -(-(had * m + 1) * self.period // (m * units))
        return first, (had * m + m - 1) * self.period // (m * units)

    def _seed(self, source: int) -> int:
        return self.seed if source == 0 else key("mixture", self.seed, source)


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Sources and weights of `a.jsonl*3 + owner/name:test*1`: sources between " + ", each with an optional `*weight`.

    A weight is a source's share of the draws and 1 where it is left out. A name that itself holds " + " or an asterisk
    is understood where such a file exists. Raises ConfigError for a missing source, one named twice, or a weight that
    is no positive number.
    """
    found: dict[str, float] = {}
    for part in [text] if os.path.isfile(text) else re.split(r"\s\+\s", text):
        name, weight = _source_and_weight(part.strip(), text)
        if name in found:
            raise ConfigError(f"mixture {text!r} names {name} twice; name it once, with the sum of its weights.")
        found[name] = weight
    return list(found.items())


def _source_and_weight(part: str, text: str) -> tuple[str, float]:
    if os.path.isfile(part) or "*" not in part:
        name, weight = part, "1"
    else:
        name, _, weight = part.rpartition("*")
    name, weight = name.strip(), weight.strip()
    if not name:
        raise ConfigError(f"mixture {text!r} lacks a source beside a + or *; write it as a.jsonl*3 + b.jsonl*1.")
    try:
        value = float(weight)
    except ValueError:
        raise ConfigError(
            f"mixture {text!r}: {weight!r} after {name}* is not a number; write it as a.jsonl*3 + b.jsonl*1."
        ) from None
    _check_weight(value, name)
    return name, value


def _check_weight(weight: float, what: str) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"the weight of {what} is {weight}; give a positive number, or leave the source out.")
