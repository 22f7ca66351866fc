"""Best-of-n sampling: the best of several completions, its expected value for every n, and its KL cost.

`run` is the strategy of a search; the rest measures best-of-n on P tasks with N completions each. Scores come from a
verifier or a reward model; NaN marks an unscored completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from posttrain.config.search import SearchConfig
from posttrain.data.files import json_lines, writable
from posttrain.data.preferences import write_preferences
from posttrain.evaluation.accuracy import Estimate, bootstrap
from posttrain.search.beam import best
from posttrain.search.tree import Asks, Tree
from posttrain.types import Episode, Json, Preference, Task


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Samples the whole budget and scores it. With `reject`, it goes step by step, and after each step that share of
    the unfinished completions with the lowest scores is dropped (early rejection, after arXiv 2410.20290)."""
    live = yield from tree.grow([tree.root] * cfg.budget, whole=not cfg.reject)
    while live := [node for node in live if not node.ended]:
        yield from tree.score(live)
        live = yield from tree.grow(best(live, max(1, round(len(live) * (1 - cfg.reject)))))


def best_of_n(scores: np.ndarray) -> np.ndarray:
    """Index (P,) of the highest score in each row (P, N); the first of ties, −1 if the row has no score."""
    known = np.where(np.isnan(scores), -np.inf, scores)
    return np.where(np.isnan(scores).all(1), -1, known.argmax(1))


def expected_pick(scores: np.ndarray, values: np.ndarray, n: int) -> float:
    """Unbiased mean value of the highest-scored of n completions, from N ≥ n completions for one task.

    scores, values (N,). This is the average, over all C(N, n) subsets, of the value of the highest-scored completion,
    with ties broken at random. Sorted ascending, rank i (from 1) is the highest of C(i − 1, n − 1) subsets. With
    `values = scores` it is the expected maximum, and with 0/1 scores Chen's pass@k (arXiv 2107.03374, eq. 1). Raises
    ValueError unless 1 ≤ n ≤ N, or if a score is NaN.
    """
    total = len(scores)
    if not 1 <= n <= total or np.isnan(scores).any():
        unscored = int(np.isnan(scores).sum())
        raise ValueError(
            f"best-of-n needs 1 ≤ n ≤ N scored completions; got n={n}, N={total}, of which {unscored} are unscored."
        )
    chances, subsets = np.zeros(total), math.comb(total, n)
    order = np.argsort(scores, kind="stable")
    for rank, i in enumerate(order):
        chances[i] = math.comb(rank, n - 1) / subsets
    shared = [chances[scores == score].mean() for score in scores]
    return float(np.dot(shared, values))


def bon_kl(n: int) -> float:
    """Upper bound log n − (n − 1)/n on KL(best-of-n ‖ policy), in nats.

    Exact if no two completions tie and none is likely to repeat (Beirami et al., arXiv 2401.01879). Raises ValueError
    for n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} is too small; best-of-n needs n ≥ 1.")
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class BestOf:
    """Score and accuracy of the best of n completions, and its KL; tasks are the random unit of intervals."""

    n: int
    score: Estimate
    accuracy: Estimate
    kl: float


@dataclass(frozen=True)
class Search:
    """Best-of-n for n = 1, 2, 4 … N over `tasks` tasks, without those with an unscored completion (`left_out`)."""

    rows: tuple[BestOf, ...]
    tasks: int
    left_out: int

    def as_dict(self) -> Json:
        """A JSON-serialisable dict."""
        return asdict(self)


class ChosenRow(TypedDict):
    """A task's best completion: a row for `posttrain sft`."""

    id: str
    messages: list[dict[str, str]]
    score: float


Picks = tuple[list[int], np.ndarray, np.ndarray]


def picks(groups: Sequence[Sequence[Episode]]) -> Picks:
    """Sizes n (the powers of two up to N, and N), and the expected score and pass rate of the best of n.

    The last two are (tasks, sizes), from N completions for each of P tasks, without tasks with an unscored completion.
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
    """Best-of-n for every power of two up to N and for N, from N scored completions for each of P tasks."""
    return summary(picks(groups), len(groups))


def summary(found: Picks, tasks: int) -> Search:
    """Means and intervals of the `picks` from this many tasks."""
    sizes, scores, passing = found
    rows = [
        BestOf(n, bootstrap(scores[:, i].tolist()), bootstrap(passing[:, i].tolist()), bon_kl(n))
        for i, n in enumerate(sizes)
    ]
    return Search(tuple(rows), len(scores), tasks - len(scores))


def scores_of(groups: Sequence[Sequence[Episode]]) -> np.ndarray:
    """Rewards (P, N) float64, NaN for unscored completions."""
    return np.array([[math.nan if e.reward is None else e.reward for e in group] for group in groups])


def chosen_rows(
    tasks: Sequence[Task], groups: Sequence[Sequence[Episode]], least: float | None = None
) -> list[ChosenRow]:
    """Each task's best completion as a conversation for `posttrain sft`, if it scored at least `least`."""
    rows: list[ChosenRow] = []
    scores = scores_of(groups)
    for task, group, row, top in zip(tasks, groups, scores, best_of_n(scores), strict=True):
        if top < 0 or (least is not None and row[top] < least) or not writable(group[top].text):
            continue
        messages: list[dict[str, str]] = [{"role": m.role, "content": m.content} for m in task.messages]
        messages.append({"role": "assistant", "content": group[top].text})
        rows.append({"id": task.id, "messages": messages, "score": float(row[top])})
    return rows


def pairs_of(tasks: Sequence[Task], groups: Sequence[Sequence[Episode]]) -> list[Preference]:
    """Each task's best and worst completion as a pair, with their score difference as margin; none if all are equal."""
    found: list[Preference] = []
    scores = scores_of(groups)
    for task, group, row, top, worst in zip(tasks, groups, scores, best_of_n(scores), best_of_n(-scores), strict=True):
        if top < 0 or row[top] == row[worst]:
            continue
        good, bad = group[top].text, group[worst].text
        if writable(good) and writable(bad) and good != bad:
            found.append(Preference(task.id, task.messages, good, bad, margin=float(row[top] - row[worst])))
    return found


def write(
    tasks: Sequence[Task],
    groups: Sequence[Sequence[Episode]],
    out: str | None = None,
    least: float | None = None,
    pairs: str | None = None,
) -> dict[str, int]:
    """Writes the best completions to `out` and best-worst pairs to `pairs`, if given; returns file → rows written."""
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
