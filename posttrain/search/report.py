"""What searches found: one row for each problem, and their summary with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from posttrain.evaluation.accuracy import bootstrap
from posttrain.evaluation.intervals import Estimate, wilson
from posttrain.types import Json, JsonView


@dataclass(frozen=True)
class Outcome:
    """A search's result for problem `index`; `passed` and `right` are verdicts of the task's own verifier.

    `candidates` are the numbers of the tree's nodes at which a completion ends, `right` their verdicts, `scores` what
    the scorer gave them, and `chosen` is one of them; None: there is none. A verdict is None if it could not be had.
    """

    index: int
    task: str
    passed: bool | None
    chosen: int | None
    answer: str
    generated: int
    scored: int
    candidates: tuple[int, ...]
    right: tuple[bool | None, ...]
    scores: tuple[float | None, ...]

    @property
    def covered(self) -> bool:
        """Whether any candidate passes."""
        return any(self.right)

    @property
    def score(self) -> float | None:
        """The score of the chosen completion."""
        return None if self.chosen is None else self.scores[self.candidates.index(self.chosen)]

    def as_dict(self) -> Json:
        """A row of `results.jsonl`."""
        return {**asdict(self), "covered": self.covered}

    @staticmethod
    def of(row: JsonView) -> Outcome:
        """The inverse of `as_dict`. Raises KeyError or TypeError for another row."""
        names = [f.name for f in fields(Outcome)]
        values: Json = {name: tuple(v) if isinstance(v := row[name], list) else v for name in names}
        return Outcome(**values)


@dataclass(frozen=True)
class SearchReport:
    """Summary over `tasks` problems; tokens and candidates are means per problem.

    `accuracy` is the share of problems whose chosen completion passes, `coverage` that of problems with any completion
    that passes, both without those `unverified`. Tasks are the random unit of intervals.
    """

    strategy: str
    budget: int
    scorer: str
    accuracy: Estimate
    coverage: Estimate
    generated: Estimate
    scored: Estimate
    candidates: Estimate
    tasks: int
    unverified: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> Json:
        """A JSON-serialisable dict."""
        return asdict(self)


def summarise(
    found: Sequence[Outcome], strategy: str, budget: int, scorer: str, notes: Sequence[str] = ()
) -> SearchReport:
    """The report on some problems."""
    known = [one for one in found if one.passed is not None]
    return SearchReport(
        strategy, budget, scorer,
        accuracy=wilson(sum(bool(one.passed) for one in known), len(known)),
        coverage=wilson(sum(one.covered for one in known), len(known)),
        generated=mean([one.generated for one in found]),
        scored=mean([one.scored for one in found]),
        candidates=mean([len(one.candidates) for one in found]),
        tasks=len(found),
        unverified=len(found) - len(known),
        notes=tuple(notes),
    )  # fmt: skip


def mean(values: Sequence[float]) -> Estimate:
    """Mean of a quantity per problem with a 95 % bootstrap interval, which has no width if all values are equal."""
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    if len(set(values)) == 1:
        return Estimate(float(values[0]), float(values[0]), float(values[0]), len(values))
    return bootstrap([float(value) for value in np.asarray(values)])
