"""Records the frontier of the lab's page "Think longer": accuracy against tokens, by strategy, scorer and budget.

    python -m bench.search_frontier [--problems N]

searches for the answers to held-out arithmetic problems with abacus as it ships, and writes
posttrain/lab/explore/search-frontier.json. Nothing in the file is written by hand. Strategies that sample whole
completions are averaged over all subsets of the most completions, without bias; the others search once per budget.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import ROOT
from bench.recorded import rounded
from posttrain import __version__
from posttrain.data.tasks.abacus import problems
from posttrain.evaluation.accuracy import bootstrap
from posttrain.lab import checkpoints
from posttrain.lab.explore.budgets import BUDGETS, FRONTIER, settings
from posttrain.lab.explore.problems import task_of
from posttrain.lab.explore.trees import Searcher, verify
from posttrain.lab.folders import Place
from posttrain.search.best_of_n import expected_pick
from posttrain.search.choose import classes, expected_vote
from posttrain.search.run import SearchResult, search_all
from posttrain.types import Task

PROBLEMS = 128
SLOTS = 128
SAMPLED = (("majority", ""), ("best-of-n", "confidence"), ("best-of-n", "self-certainty"), ("best-of-n", "checker"))
"""Strategies that sample whole completions, with their scorers."""
SEARCHED = (("beam", "confidence"), ("rebase", "confidence"), ("mcts", "confidence"), ("mcts", "checker"))
Rows = list[tuple[int, list[float], float, float]]
"""(budget, each problem's chance of a right answer, tokens generated per problem, tokens scored per problem)."""


def tasks_of(count: int) -> list[Task]:
    """Held-out problems, those that the page offers first."""
    drawn = problems("arithmetic", count, 0, "test")
    return [task_of(problem.prompt.removeprefix("What is ").removesuffix("?")) for problem in drawn]


def searched(searcher: Searcher, tasks: Sequence[Task], strategy: str, scorer: str, budget: int) -> list[SearchResult]:
    """A search for each task, in order."""
    judge = searcher.scorer(scorer) if scorer else None
    found = dict(search_all(tasks, searcher.engine(), judge, settings(strategy, scorer, budget), 0, SLOTS))
    return [found[i] for i in range(len(tasks))]


def by_subsets(searcher: Searcher, tasks: Sequence[Task], strategy: str, scorer: str, budgets: Sequence[int]) -> Rows:
    """Expected accuracy of n of the most completions, over all subsets."""
    results = searched(searcher, tasks, strategy, scorer, budgets[-1])
    generated, scored = (cost / budgets[-1] for cost in _costs(results))
    return [(n, [_expected(r, n) for r in results], generated * n, scored * n) for n in budgets]


def _costs(results: Sequence[SearchResult]) -> tuple[float, float]:
    """Tokens generated and tokens scored per problem."""
    return float(np.mean([r.generated for r in results])), float(np.mean([r.scored for r in results]))


def _expected(result: SearchResult, n: int) -> float:
    nodes = result.completions
    passed = [verify(result.task, node.text).passed for node in nodes]
    whole = [node.end == "stop" for node in nodes]  # a completion that was cut is chosen only if there is no other
    if all(node.score is None for node in nodes):
        answers = classes([node.text for node in nodes])
        return expected_vote([a if kept else -1 for a, kept in zip(answers, whole, strict=True)], passed, n)
    scores = [
        -math.inf if node.score is None or not kept else node.score for node, kept in zip(nodes, whole, strict=True)
    ]
    return expected_pick(np.array(scores), np.array(passed, float), n)


def by_searches(searcher: Searcher, tasks: Sequence[Task], strategy: str, scorer: str, budgets: Sequence[int]) -> Rows:
    """Accuracy of one search per budget."""
    rows: Rows = []
    for budget in budgets:
        results = searched(searcher, tasks, strategy, scorer, budget)
        passed = [float(r.chosen is not None and verify(r.task, r.answer).passed) for r in results]
        rows.append((budget, passed, *_costs(results)))
    return rows


def recorded(count: int = PROBLEMS, budgets: Sequence[int] = BUDGETS) -> dict[str, Any]:
    """The file's content."""
    with tempfile.TemporaryDirectory() as folder:
        policy = checkpoints.open_model(Place(Path(folder)), checkpoints.SHIPPED).policy
    searcher, tasks = Searcher(policy, SLOTS), tasks_of(count)
    series: list[dict[str, Any]] = []
    for pairs, measured in ((SAMPLED, by_subsets), (SEARCHED, by_searches)):
        for strategy, scorer in pairs:
            points: list[dict[str, Any]] = []
            for budget, values, generated, scored in measured(searcher, tasks, strategy, scorer, budgets):
                mean = bootstrap(values)
                points.append({"budget": budget, "accuracy": mean.value, "low": mean.low, "high": mean.high,
                               "generated": generated, "scored": scored})  # fmt: skip
            series.append({"strategy": strategy, "scorer": scorer, "points": points})
            print(strategy, scorer, [f"{point['accuracy']:.3f}" for point in points], flush=True)
    about = {"command": "python -m bench.search_frontier", "posttrain": __version__, "model": checkpoints.SHIPPED}
    return rounded({**about, "problems": count, "temperature": 1.0, "seed": 0, "series": series})


def main() -> None:
    """Writes search-frontier.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.search_frontier", description=__doc__)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    content = recorded(parser.parse_args().problems)
    FRONTIER.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    print(f"Wrote {len(content['series'])} curves to {FRONTIER.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
