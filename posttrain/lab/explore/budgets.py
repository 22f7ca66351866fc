"""What the page "Think longer" offers: problems, strategies, scorers and budgets, and its recorded frontier.

Nothing here imports torch, so the page opens before the model is loaded.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from posttrain.config.search import SearchConfig
from posttrain.lab.explore.problems import BEYOND, listed
from posttrain.types import Json

FRONTIER = Path(__file__).parent / "search-frontier.json"
BUDGETS = (1, 2, 4, 8, 16, 32)
STRATEGIES = ("majority", "best-of-n", "beam", "mcts", "adaptive", "dvts", "rebase", "particles")
SCORERS = ("confidence", "self-certainty", "checker")
UNSCORED = ("majority", "adaptive")
"""Strategies that need no scores."""
LIMITED = ("beam", "dvts", "rebase", "particles")
"""Strategies that score unfinished completions, which the checker cannot read."""
FIRST = "36*9"
"""The default problem: abacus is right once in sixteen tries, and most sure of itself then."""
OVERRATED = "100+200"
"""One of 32 completions is right, but abacus is surer of wrong ones, so only the checker finds it."""
SHOWN = 12
MOST_STEPS = 8


def offered_problems() -> list[str]:
    """The problems to choose from: the three that the page explains, and held-out ones."""
    return list(dict.fromkeys([FIRST, OVERRATED, BEYOND, *listed()]))[:SHOWN]


def settings(strategy: str, scorer: str, budget: int) -> SearchConfig:
    """The settings of a search, the defaults but for tree search: it samples eight steps where it expands a node (no
    more than the budget), because among four first steps often none begins a thought."""
    if strategy == "mcts":
        return SearchConfig(strategy=strategy, budget=budget, scorer=scorer, expansions=min(MOST_STEPS, budget))
    return SearchConfig(strategy=strategy, budget=budget, scorer=scorer)


@cache
def frontier() -> Json:
    """The recorded frontier (bench/search_frontier.py)."""
    return json.loads(FRONTIER.read_text(encoding="utf-8"))
