"""Compares strategies over budgets: accuracy against tokens per problem (posttrain/search/frontier.py).

Majority and best-of-n of every budget come from one sample of the largest, by the exact estimators over its subsets.
The other strategies are run for each budget; completions that two of them share are sampled once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from posttrain.config import nearest
from posttrain.config.search import COMMON, SearchConfig
from posttrain.evaluation.intervals import Estimate
from posttrain.search import frontier, stored
from posttrain.search.best_of_n import expected_pick
from posttrain.search.build import check_name, scorer_name
from posttrain.search.choose import classes, expected_vote
from posttrain.search.frontier import Point
from posttrain.search.report import Outcome
from posttrain.search.run import check
from posttrain.search.solve import Problems, Progress, Searched, solve
from posttrain.search.strategies import STRATEGIES
from posttrain.store import durable
from posttrain.types import ConfigError, Json

FILE = "frontier.json"
SAMPLED = ("majority", "best-of-n")
"""Strategies whose smaller budgets are estimated from the largest."""
USUAL = ("majority", "best-of-n", "beam", "mcts")
"""Strategies that are compared unless others are named, as far as the scorer allows."""


@dataclass(frozen=True)
class Comparison:
    """Points of all strategies and budgets on the same problems, and what follows from them.

    `rates` are the policy's pass rates on one completion, by problem; `best` is, for each number of tokens, the
    compute-optimal strategy of all problems and of each third.
    """

    model: str
    scorer: str
    points: tuple[Point, ...]
    tasks: tuple[str, ...]
    rates: tuple[float, ...]
    coverage: dict[int, Estimate]
    law: frontier.PowerLaw | None
    best: dict[float, dict[str, frontier.Best]]
    over_optimised: tuple[frontier.OverOptimised, ...]
    advice: str
    notes: tuple[str, ...]
    folder: Path | None = None

    def as_dict(self) -> Json:
        """What `frontier.json` holds."""
        points = [
            {**asdict(point), "accuracy": asdict(point.accuracy), "cost": asdict(point.cost)} for point in self.points
        ]
        best = [{"tokens": tokens, **{k: asdict(v) for k, v in rows.items()}} for tokens, rows in self.best.items()]
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name in ("model", "scorer", "advice")}
        return {
            **rest, "points": points, "tasks": list(self.tasks), "rates": list(self.rates), "best": best,
            "thirds": frontier.thirds(self.rates),
            "coverage": {str(k): asdict(one) for k, one in self.coverage.items()},
            "power_law": asdict(self.law) if self.law else None,
            "over_optimised": [asdict(one) for one in self.over_optimised], "notes": list(self.notes),
        }  # fmt: skip


def compare(
    problems: Problems,
    folder: Path | None,
    progress: Progress | None,
    strategies: Sequence[str],
    budgets: Sequence[int],
) -> Comparison:
    """Runs the strategies with the settings of the recipe's search; without `strategies`, the usual ones.

    Raises ConfigError before anything is sampled, as `solve` does, for every strategy that is named.
    """
    cfg, budgets = problems.recipe.search, sorted(set(budgets))
    if not budgets or budgets[0] < 1:
        raise ConfigError(f"--budgets {','.join(map(str, budgets))}: give completions per problem, each 1 or more.")
    check_name(cfg)
    names = _strategies(problems, strategies)
    _check_used(cfg, names)
    run = partial(_run, problems.journaled(folder) if folder else problems, folder, progress)
    steered = replace(cfg, strategy="best-of-n")
    sampled = run(settings(steered if "best-of-n" in names else replace(steered, strategy="majority"), budgets[-1]))
    points: list[Point] = []
    notes = [*sampled.report.notes]
    for name in names:
        if name in SAMPLED and cfg.choose == "auto":
            points += [estimated(name, sampled, n) for n in budgets]
            continue
        for n in budgets:
            found = run(settings(replace(cfg, strategy=name), n))
            points.append(point(found))
            notes += [note for note in found.report.notes if n == budgets[-1]]
    found = summarised(problems, sampled, points, budgets, list(dict.fromkeys(notes)))
    if folder:
        durable.publish_file(folder / FILE, json.dumps(found.as_dict()) + "\n")
    return replace(found, folder=folder)


def settings(cfg: SearchConfig, budget: int) -> SearchConfig:
    """The search settings that a strategy reads, with a budget."""
    reads = (*COMMON, *STRATEGIES[cfg.strategy].settings)
    kept = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in reads}
    return SearchConfig(**{**kept, "budget": budget, "width": min(kept.get("width", 0), budget)})


def _strategies(problems: Problems, named: Sequence[str]) -> list[str]:
    """The strategies to compare: those named, each of which must be possible, or the usual ones that are."""
    recipe = problems.recipe
    names = list(dict.fromkeys(named or USUAL))
    for name in names:
        if name not in STRATEGIES:
            raise ConfigError(f"unknown strategy {name!r}{nearest(name, list(STRATEGIES))}")
    possible: list[str] = []
    for name in names:
        cfg = settings(replace(recipe.search, strategy=name), recipe.search.budget)
        scorer = problems.with_search(cfg).scorer()
        try:
            check(cfg, scorer)
            possible.append(name)
        except ConfigError:
            if named:
                raise
    return possible


def _check_used(cfg: SearchConfig, names: Sequence[str]) -> None:
    """Raises ConfigError for a setting that none of the strategies reads."""
    unread = [one for one in cfg.given() if not any(one in STRATEGIES[name].settings for name in names)]
    if unread:
        raise ConfigError(f"search.{unread[0]}={getattr(cfg, unread[0])!r} has no effect on {', '.join(names)}.")


def _run(problems: Problems, folder: Path | None, progress: Progress | None, cfg: SearchConfig) -> Searched:
    own = folder / f"{cfg.strategy}-{cfg.budget}" if folder else None
    return solve(problems.with_search(cfg), own, progress, journal=False)


def point(found: Searched) -> Point:
    """A search as a point."""
    rows = found.outcomes
    scores = [one.score for one in rows]
    return Point(
        found.report.strategy, found.report.budget,
        tuple(float(bool(one.passed)) for one in rows),
        tuple(float(one.generated + one.scored) for one in rows),
        () if None in scores else tuple(score for score in scores if score is not None),
    )  # fmt: skip


def estimated(strategy: str, found: Searched, n: int) -> Point:
    """Majority or best-of-n with n completions, in expectation over all subsets of those that were sampled.

    Tokens are n times the mean of a completion. Completions that were cut do not vote, and are chosen last.
    """
    passed: list[float] = []
    scores: list[float] = []
    for one, tree in zip(found.outcomes, found.trees, strict=True):
        cut = [tree["nodes"][number]["end"] != "stop" for number in one.candidates]
        right = [bool(verdict) for verdict in one.right]
        if strategy == "majority":
            texts = stored.texts(tree)
            answers = classes([texts[number] for number in one.candidates])
            passed.append(expected_vote([-1 if c else a for a, c in zip(answers, cut, strict=True)], right, n))
        else:
            rank, worth = _ranks(one, cut)
            passed.append(expected_pick(rank, np.array(right, float), n))
            scores.append(expected_pick(rank, worth, n))
    share = [n / len(one.candidates) for one in found.outcomes]
    read = 0 if strategy == "majority" else 1
    tokens = [s * (one.generated + read * one.scored) for s, one in zip(share, found.outcomes, strict=True)]
    return Point(strategy, n, tuple(passed), tuple(tokens), tuple(scores))


def _ranks(one: Outcome, cut: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N] by which the best completion is chosen, and their worth; a missing one is the lowest."""
    least = min((score for score in one.scores if score is not None), default=0.0)
    worth = np.array([least if score is None else score for score in one.scores])
    lowered = [c or score is None for c, score in zip(cut, one.scores, strict=True)]
    return np.where(lowered, worth - (np.ptp(worth) + 1), worth), worth


def summarised(
    problems: Problems, sampled: Searched, points: list[Point], budgets: Sequence[int], notes: Sequence[str]
) -> Comparison:
    """The comparison of points on the problems that were sampled."""
    right = [[bool(verdict) for verdict in one.right] for one in sampled.outcomes]
    rates = tuple(float(np.mean(row)) for row in right)
    covered = frontier.coverage(right, budgets)
    scorer = scorer_name(replace(problems.recipe.search, strategy="best-of-n"))
    levels = sorted({float(np.mean(one.tokens)) for one in points if one.strategy == points[0].strategy})
    best: dict[float, dict[str, frontier.Best]] = {}
    for tokens in levels:
        if (top := frontier.best_at(points, tokens)) is not None:
            best[tokens] = {"all": top, **frontier.by_difficulty(points, rates, tokens)}
    return Comparison(
        problems.model, scorer, tuple(points), tuple(task.id for task in problems.tasks), rates, covered,
        frontier.power_law({k: one.value for k, one in covered.items()}), best,
        tuple(frontier.over_optimised(points)), frontier.advice(points), tuple(notes),
    )  # fmt: skip
