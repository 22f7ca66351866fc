"""Weighted mixtures of several sources, drawn on an exact rather than random schedule.

After any number of draws, each source has had its share to within one row, and the position in the schedule is a single
integer. The schedule is Tijdeman's ("The chairman assignment problem", Discrete Mathematics 32, 1980): of the sources
that are owed enough, draw from the one whose next row is due first.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from posttrain.config import DataConfig
from posttrain.data.files import is_file_name, is_hub_id
from posttrain.rng import draw_order, key
from posttrain.types import ConfigError, DataError, Task


class Mixture:
    """An endless schedule over the rows of several sources.

    `sizes` [K] are the row counts of the sources and `weights` [K] their shares of the draws, up to a common factor. A
    weight is taken as the decimal it is written as, so 0.7 and 0.3 are exactly 7 : 3. The same sizes, weights and
    `seed` give the same schedule; without `shuffle`, the rows of each source are drawn in their order. Raises
    ConfigError for invalid weights and DataError for an empty source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True) -> None:
        if not sizes or len(sizes) != len(weights):
            raise ConfigError(f"{len(sizes)} sources have {len(weights)} weights. Give each source one weight.")
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            _check_weight(weight, f"source {i}")
            if size < 1:
                raise DataError(f"source {i} has {size} rows, so nothing can be drawn from it. Remove it.")
        self.sizes = tuple(sizes)
        self.seed, self.shuffle = seed, shuffle
        exact = [Fraction(repr(float(weight))) for weight in weights]
        common = math.lcm(*(f.denominator for f in exact))
        whole = [int(f * common) for f in exact]
        divisor = math.gcd(*whole)
        self._units = [w // divisor for w in whole]  # draws from each source in one period
        self.period = sum(self._units)
        """Draws after which the order of sources repeats (rows are reshuffled every epoch, so they do not repeat)."""
        # One period of the schedule, computed as far as needed: the source of draw n, and its earlier draws.
        self._source, self._earlier = array("L"), array("Q")
        self._counts = [0] * len(sizes)
        self._windows = [self._window(i, 0) for i in range(len(sizes))]

    @property
    def shares(self) -> list[float]:
        """The weights [K] normalised to sum to 1."""
        return [units / self.period for units in self._units]

    def draw(self, start: int, count: int) -> list[tuple[int, int]]:
        """(source, row) of draws start … start + count − 1.

        The result depends only on the position, so a run resumes from the single integer `start`. Each source is read
        in seeded permutations, every row once per epoch; a single source is read in the order of `rng.draw_order`.
        The schedule up to `start` within one period is computed once and cached.
        """
        if start < 0 or count < 0:
            raise ConfigError(f"cannot make {count} draws from position {start}. Give non-negative numbers.")
        order = [self._nth(position) for position in range(start, start + count)]
        rows: list[Iterator[int]] = []
        for i, size in enumerate(self.sizes):
            positions = [earlier for source, earlier in order if source == i]
            first = positions[0] if positions else 0
            rows.append(iter(draw_order(size, first, len(positions), self._seed(i), self.shuffle)))
        return [(source, next(rows[source])) for source, _ in order]

    def drawn(self, count: int) -> list[int]:
        """Number of draws from each source [K] among the first `count`; `drawn(n)[i] / sizes[i]` is its epochs."""
        periods, rest = divmod(count, self.period)
        self._grow(rest)
        partial = self._source[:rest]
        return [periods * units + partial.count(i) for i, units in enumerate(self._units)]

    def _nth(self, position: int) -> tuple[int, int]:
        """The source of a draw, and the number of earlier draws from that source."""
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

    def _window(self, source: int, drawn: int) -> tuple[int, int]:
        """First and last n at which the source's next row, after `drawn` rows, may be the n-th draw.

        With w the source's share and m = 2K − 2, these are the n at which n·w − drawn, the rows the source is owed,
        reaches 1/m and is still at most 1 − 1/m.
        """
        m, units = max(1, 2 * len(self.sizes) - 2), self._units[source]
        first = -(-(drawn * m + 1) * self.period // (m * units))
        return first, (drawn * m + m - 1) * self.period // (m * units)

    def _seed(self, source: int) -> int:
        return self.seed if source == 0 else key("mixture", self.seed, source)


Draw = Callable[[int, int], list[int]]
"""draw(start, take) → the indices of draws start … start + take − 1 of an endless order."""


def task_order(tasks: Sequence[Task], cfg: DataConfig, seed: int) -> Draw:
    """The order in which training tasks are drawn: at random, new in every epoch, or as they are without data.shuffle.

    In a mixture with files, each source has its weight's share of the draws, whatever its number of tasks. Generated
    tasks alone are mixed when they are generated (data/tasks/load.py).
    """
    weights = dict(parts_of(cfg.tasks))
    members = {name: [i for i, task in enumerate(tasks) if task.source == name] for name in weights}
    files = any(is_file_name(name) or is_hub_id(name) for name in weights)
    if len(weights) < 2 or not files or sum(map(len, members.values())) < len(tasks):
        return lambda start, take: draw_order(len(tasks), start, take, seed, cfg.shuffle)
    rows = list(members.values())
    if empty := next((name for name, found in members.items() if not found), None):
        raise DataError(f"{empty}: no task is left to train on. Remove it from data.tasks={cfg.tasks!r}.")
    mixture = Mixture([*map(len, rows)], [*weights.values()], seed, cfg.shuffle)
    return lambda start, take: [rows[source][row] for source, row in mixture.draw(start, take)]


def parts_of(name: str) -> list[tuple[str, float]]:
    """The sources of `data.tasks` with their weights; a name without weights or " + " is a single source."""
    return parse_mixture(name) if " + " in name or "*" in name else [(name, 1.0)]


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Parses `a.jsonl*3 + owner/name:test*1`: sources separated by " + ", each with an optional `*weight`.

    A weight is the source's share of the draws; the default is 1. A name that itself contains " + " or an asterisk
    works if such a file exists. Raises ConfigError for a missing or repeated source, or a weight that is not a positive
    number.
    """
    found: dict[str, float] = {}
    for part in [text] if os.path.isfile(text) else re.split(r"\s\+\s", text):
        name, weight = _source_and_weight(part.strip(), text)
        if name in found:
            raise ConfigError(f"mixture {text!r} names {name} twice. Name it once, with the sum of its weights.")
        found[name] = weight
    return list(found.items())


def _source_and_weight(part: str, text: str) -> tuple[str, float]:
    if os.path.isfile(part) or "*" not in part:
        name, weight = part, "1"
    else:
        name, _, weight = part.rpartition("*")
    name, weight = name.strip(), weight.strip()
    if not name:
        raise ConfigError(f"mixture {text!r} has no source next to a + or *. Write it as a.jsonl*3 + b.jsonl*1.")
    try:
        value = float(weight)
    except ValueError:
        raise ConfigError(
            f"mixture {text!r}: {weight!r} after {name}* is not a number. Write it as a.jsonl*3 + b.jsonl*1."
        ) from None
    _check_weight(value, name)
    return name, value


def _check_weight(weight: float, what: str) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"the weight of {what} is {weight}. Give a positive number, or leave the source out.")
