"""The frontier of test-time compute: accuracy against tokens, and what follows from it.

Pure functions on numbers per problem: P problems, N independent completions each. Tokens are those of the policy and
those that the scorer reads, together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.evaluation.accuracy import bootstrap, pass_at_k
from posttrain.evaluation.intervals import Estimate
from posttrain.search.report import mean

THIRDS = ("easy", "middle", "hard")


@dataclass(frozen=True)
class Point:
    """A strategy with one budget on P problems: pass rates (0, 1 or an expectation), tokens, and chosen scores.

    `scores` are empty if nothing was scored.
    """

    strategy: str
    budget: int
    passed: tuple[float, ...]
    tokens: tuple[float, ...]
    scores: tuple[float, ...] = ()

    @property
    def accuracy(self) -> Estimate:
        """Mean pass rate with its interval over problems."""
        return bootstrap(self.passed)

    @property
    def cost(self) -> Estimate:
        """Mean tokens per problem with its interval."""
        return mean(self.tokens)

    def of(self, problems: Sequence[int]) -> Point:
        """The point on some of the problems."""
        passed, tokens = ([row[i] for i in problems] for row in (self.passed, self.tokens))
        scores = [self.scores[i] for i in problems] if self.scores else []
        return Point(self.strategy, self.budget, tuple(passed), tuple(tokens), tuple(scores))


def by_strategy(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each strategy by their tokens."""
    names = dict.fromkeys(point.strategy for point in points)
    return {name: sorted((p for p in points if p.strategy == name), key=lambda p: np.mean(p.tokens)) for name in names}


def at_tokens(points: Sequence[Point], tokens: float) -> np.ndarray | None:
    """Pass rates [P] of one strategy's points at a mean of `tokens` per problem, interpolated in log tokens.

    Beyond the largest point they are that point's, because tokens need not be spent; None below the smallest.
    """
    means = [float(np.mean(point.tokens)) for point in points]
    if not points or tokens < means[0] * (1 - 1e-9):
        return None
    above = next((i for i, cost in enumerate(means) if cost > tokens), None)
    if above is None:
        return np.array(points[-1].passed)
    above = max(1, above)
    low, high = points[above - 1], points[above]
    share = max(0.0, math.log(tokens / means[above - 1])) / math.log(means[above] / means[above - 1])
    return (1 - share) * np.array(low.passed) + share * np.array(high.passed)


def thirds(rates: Sequence[float]) -> dict[str, list[int]]:
    """Problems by difficulty: the easy, middle and hard third by the policy's pass rate on one completion.

    Ties keep the order of the problems. If P is not a multiple of 3, the first thirds have one more.
    """
    order = sorted(range(len(rates)), key=lambda i: -rates[i])
    return {name: sorted(int(i) for i in part) for name, part in zip(THIRDS, np.array_split(order, 3), strict=True)}


@dataclass(frozen=True)
class Best:
    """The strategy with the highest accuracy at a number of tokens, how far it is ahead, and of which one.

    `ahead` is the difference to the best other strategy, with a paired interval over problems; it is None without one.
    """

    tokens: float
    strategy: str
    accuracy: Estimate
    second: str = ""
    ahead: Estimate | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval of the difference is above 0."""
        return self.ahead is not None and self.ahead.low > 0


def best_at(points: Sequence[Point], tokens: float, problems: Sequence[int] | None = None) -> Best | None:
    """The compute-optimal strategy at a mean of `tokens` per problem, on all problems or some of them.

    Ties go to the strategy that comes first. Returns None if nothing costs so little.
    """
    curves = {
        name: rates if problems is None else rates[problems]
        for name, own in by_strategy(points).items()
        if (rates := at_tokens(own, tokens)) is not None
    }
    ranked = sorted(curves, key=lambda name: -float(curves[name].mean()))
    if not ranked:
        return None
    first, second = ranked[0], ranked[1] if len(ranked) > 1 else ""
    ahead = difference(curves[second], curves[first]) if second else None
    return Best(tokens, first, bootstrap(curves[first].tolist()), second, ahead)


def difference(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of after − before over the same problems, with a paired bootstrap interval."""
    return mean((np.asarray(after) - np.asarray(before)).tolist())


def by_difficulty(points: Sequence[Point], rates: Sequence[float], tokens: float) -> dict[str, Best]:
    """The compute-optimal strategy of each third of the problems; `tokens` are a mean over all of them."""
    found = {name: best_at(points, tokens, part) for name, part in thirds(rates).items() if part}
    return {name: best for name, best in found.items() if best is not None}


def coverage(right: Sequence[Sequence[bool]], budgets: Sequence[int]) -> dict[int, Estimate]:
    """pass@k over problems for each k ≤ N, by the unbiased estimator."""
    least = min(len(row) for row in right)
    return {k: bootstrap([pass_at_k(len(row), sum(row), k) for row in right]) for k in budgets if 1 <= k <= least}


@dataclass(frozen=True)
class PowerLaw:
    """coverage(k) ≈ exp(a · k^b), with a < 0 and, if more samples help, b < 0 (arXiv 2407.21787, section 3.1)."""

    a: float
    b: float

    def at(self, k: float) -> float:
        """Coverage of k completions."""
        return math.exp(self.a * k**self.b)


def power_law(shares: Mapping[int, float]) -> PowerLaw | None:
    """Least squares of log(−log coverage) = log(−a) + b log k over 0 < coverage < 1; None for fewer than 2 points."""
    used = {k: share for k, share in shares.items() if 0 < share < 1}
    if len(used) < 2:
        return None
    slope, height = np.polyfit(np.log([*used]), np.log(-np.log([*used.values()])), 1)
    return PowerLaw(-math.exp(float(height)), float(slope))


@dataclass(frozen=True)
class OverOptimised:
    """A strategy whose accuracy falls from one budget to a larger one while the mean chosen score rises."""

    strategy: str
    peak: int
    budget: int
    accuracy: Estimate
    score: Estimate


def over_optimised(points: Sequence[Point]) -> list[OverOptimised]:
    """Strategies whose accuracy at the largest budget is below that at a smaller one and whose score is above.

    Both differences are paired, and the interval of the accuracy's is below 0.
    """
    found: list[OverOptimised] = []
    for name, unsorted in by_strategy(points).items():
        own = sorted((point for point in unsorted if point.scores), key=lambda point: point.budget)
        if len(own) < 2:
            continue
        peak, last = max(own[:-1], key=lambda point: float(np.mean(point.passed))), own[-1]
        fall, rise = difference(peak.passed, last.passed), difference(peak.scores, last.scores)
        if fall.high < 0 < rise.value:
            found.append(OverOptimised(name, peak.budget, last.budget, fall, rise))
    return found


def common_tokens(points: Sequence[Point]) -> float:
    """The largest mean of tokens per problem that every strategy reaches."""
    return min(float(np.mean(own[-1].tokens)) for own in by_strategy(points).values())


def advice(points: Sequence[Point]) -> str:
    """One sentence that says what to use."""
    tokens = common_tokens(points)
    best = best_at(points, tokens)
    if best is None:
        return "No strategy has a budget as small as the largest one of another; compare more budgets."
    at = f"about {tokens:,.0f} tokens per problem"
    if best.clear and best.ahead is not None:
        return (
            f"Use {best.strategy}: at {at} its accuracy is {best.accuracy}, ahead of {best.second} by "
            f"{best.ahead.value:.1%} [{best.ahead.low:.1%}, {best.ahead.high:.1%}]."
        )
    if best.ahead is None:
        return f"Use {best.strategy}: at {at} its accuracy is {best.accuracy}, and nothing else reaches so few."
    simple = points[0].strategy
    curves = {name: at_tokens(own, tokens) for name, own in by_strategy(points).items()}
    own, top = curves[simple], curves[best.strategy]
    behind = difference(own, top) if own is not None and top is not None and simple != best.strategy else None
    if behind is not None and behind.low > 0:
        return (
            f"Use {best.strategy} or {best.second}, between which nothing is clear: at {at} the accuracy of "
            f"{best.strategy} is {best.accuracy}, ahead of {simple} by {behind.value:.1%} "
            f"[{behind.low:.1%}, {behind.high:.1%}]."
        )
    return f"Use {simple}, the simplest: at {at} no strategy is clearly ahead of it (the best is {best.accuracy})."
