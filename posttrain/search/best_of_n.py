"""Choosing among several answers: best-of-n, what it is expected to give for every n, and what it costs in KL.

P tasks, N answers each. Scores come from a verifier or a reward model; NaN is an answer that could not be scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.files import json_lines, writable
from posttrain.data.preferences import write_preferences
from posttrain.evaluation.accuracy import Estimate, bootstrap
from posttrain.types import Episode, Preference, Task


def best_of_n(scores: np.ndarray) -> np.ndarray:
    """Index (P,) of the highest score in each row (P, N); the first of equals, −1 where nothing was scored."""
    known = np.where(np.isnan(scores), -np.inf, scores)
    return np.where(np.isnan(scores).all(1), -1, known.argmax(1))


def expected_pick(scores: np.ndarray, values: np.ndarray, n: int) -> float:
    """Unbiased mean value of the best-scored of n answers, from N ≥ n answers to one task.

    scores, values (N,). It is the average, over all C(N, n) subsets, of the value of the subset's highest score; equal
    scores share their places, as if a fair draw settled them. Sorted ascending, place i (from 1) is the highest of
    C(i − 1, n − 1) subsets. With `values = scores` it is the expected maximum, and with 0/1 scores Chen's pass@k
    (arXiv 2107.03374, eq. 1). Raises ValueError unless 1 ≤ n ≤ N, or where a score is not a number.
    """
    total = len(scores)
    if not 1 <= n <= total or np.isnan(scores).any():
        unscored = int(np.isnan(scores).sum())
        raise ValueError(
            f"best-of-n needs 1 ≤ n ≤ N scored answers; got n={n}, N={total}, of which {unscored} unscored."
        )
    places, subsets = np.zeros(total), math.comb(total, n)
    order = np.argsort(scores, kind="stable")
    for place, i in enumerate(order):
        places[i] = math.comb(place, n - 1) / subsets
    shares = [places[scores == score].mean() for score in scores]
    return float(np.dot(shares, values))


def bon_kl(n: int) -> float:
    """log n − (n − 1)/n: the most that best-of-n moves away from the sampling policy, KL(best-of-n ‖ policy) in nats.

    Exact where no two answers tie and none is likely to repeat; an upper bound otherwise (Beirami et al.,
    arXiv 2401.01879). Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: the best is chosen from one answer or more.")
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class BestOf:
    """What the best-scored of n answers is worth; intervals treat tasks as the random unit."""

    n: int
    score: Estimate
    accuracy: Estimate
    kl: float


@dataclass(frozen=True)
class Search:
    """Best-of-n for n = 1, 2, 4 … N over `tasks` tasks; tasks with an unscored answer (`left_out`) are not in it."""

    rows: tuple[BestOf, ...]
    tasks: int
    left_out: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Picks = tuple[list[int], np.ndarray, np.ndarray]


def picks(groups: Sequence[Sequence[Episode]]) -> Picks:
    """Every power of two up to N, and N; the best of so many's expected score and chance to pass, (tasks, sizes) each.

    From N answers to each of P tasks; those with an unscored answer are left out.
    """
    scores = scores_of(groups)
    passed = np.array([[e.passed for e in group] for group in groups], float)
    whole = ~np.isnan(scores).any(1)
    count = scores.shape[1]
    sizes = sorted({2**i for i in range(count.bit_length()) if 2**i <= count} | {count})

    def best(values: np.ndarray) -> np.ndarray:
        rows = zip(scores[whole], values[whole], strict=True)
        return np.array([[expected_pick(s, v, n) for n in sizes] for s, v in rows]).reshape(-1, len(sizes))

    return sizes, best(scores), best(passed)


def measure(groups: Sequence[Sequence[Episode]]) -> Search:
    """Best-of-n for every power of two up to N and for N, from N scored answers to each of P tasks."""
    return summary(picks(groups), len(groups))


def summary(found: Picks, tasks: int) -> Search:
    """What `picks` of so many tasks say, with intervals."""
    sizes, scores, passing = found
    rows = [
        BestOf(n, bootstrap(scores[:, i].tolist()), bootstrap(passing[:, i].tolist()), bon_kl(n))
        for i, n in enumerate(sizes)
    ]
    return Search(tuple(rows), len(scores), tasks - len(scores))


def scores_of(groups: Sequence[Sequence[Episode]]) -> np.ndarray:
    """Rewards (P, N) float64, NaN where an answer could not be scored."""
    return np.array([[math.nan if e.reward is None else e.reward for e in group] for group in groups])


def chosen_rows(
    tasks: Sequence[Task], groups: Sequence[Sequence[Episode]], least: float | None = None
) -> list[dict[str, Any]]:
    """Each task's best answer as a conversation that `posttrain sft` reads, where it scored at least `least`."""
    rows: list[dict[str, Any]] = []
    scores = scores_of(groups)
    for task, group, row, best in zip(tasks, groups, scores, best_of_n(scores), strict=True):
        if best < 0 or (least is not None and row[best] < least) or not writable(group[best].text):
            continue
        messages = [{"role": m.role, "content": m.content} for m in task.messages]
        messages.append({"role": "assistant", "content": group[best].text})
        rows.append({"id": task.id, "messages": messages, "score": float(row[best])})
    return rows


def pairs_of(tasks: Sequence[Task], groups: Sequence[Sequence[Episode]]) -> list[Preference]:
    """Each task's best against its worst answer, with the difference of scores as margin; none where all are equal."""
    found: list[Preference] = []
    scores = scores_of(groups)
    for task, group, row, best, worst in zip(tasks, groups, scores, best_of_n(scores), best_of_n(-scores), strict=True):
        if best < 0 or row[best] == row[worst]:
            continue
        good, bad = group[best].text, group[worst].text
        if writable(good) and writable(bad) and good != bad:
            found.append(Preference(task.id, task.messages, good, bad, margin=float(row[best] - row[worst])))
    return found


def write(
    tasks: Sequence[Task],
    groups: Sequence[Sequence[Episode]],
    out: str | None = None,
    least: float | None = None,
    pairs: str | None = None,
) -> dict[str, int]:
    """Writes the best answers to `out` and best against worst to `pairs`, where given: file → rows written."""
    written: dict[str, int] = {}
    if out:
        rows = chosen_rows(tasks, groups, least)
        Path(out).write_text(json_lines(rows), encoding="utf-8", newline="\n")
        written[out] = len(rows)
    if pairs:
        found = pairs_of(tasks, groups)
        write_preferences(pairs, found)
        written[pairs] = len(found)
    return written
