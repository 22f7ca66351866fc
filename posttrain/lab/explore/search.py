"""Routes of the page "Think longer": problems, searches of the built-in model, and the recorded frontier.

Everything is a function of the URL, so a link shows the same page again. torch and the model are loaded with the first
search, which the page requests when it opens.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.config.search import SearchConfig
from posttrain.lab.explore.problems import BEYOND, listed, task_of
from posttrain.lab.folders import Place
from posttrain.lab.routing import get
from posttrain.types import ConfigError, Json

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


def routes(place: Place) -> list[BaseRoute]:
    """The routes of the page."""
    offered = {"budgets": BUDGETS, "strategies": STRATEGIES, "scorers": SCORERS, "limited": LIMITED}
    return [
        get("/api/explore/search", lambda request: {"problems": offered_problems(), **offered}),
        get("/api/explore/search/frontier", lambda request: frontier()),
        get("/api/explore/search/tree", lambda request: read_tree(place, request)),
    ]


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


def read_tree(place: Place, request: Request) -> Json:
    """A search for the answer to one problem, with the request's parameters."""
    asked = request.query_params
    problem, strategy, scorer = (asked.get(name, "") for name in ("problem", "strategy", "scorer"))
    task_of(problem)  # rejects invalid problems before a model is loaded
    _one_of("strategy", strategy, STRATEGIES)
    _one_of("scorer", scorer, SCORERS)
    budget, seed = _whole("budget", asked.get("budget", "")), _whole("seed", asked.get("seed", ""))
    if budget not in BUDGETS:
        raise ConfigError(f"budget={budget} is not one of {', '.join(map(str, BUDGETS))}.")
    if scorer == "checker" and strategy in LIMITED:
        raise ConfigError(f"{strategy} scores unfinished completions, and the checker judges finished ones only.")
    from posttrain.lab.explore.trees import open_searcher

    asked_for = {"problem": problem, "seed": seed, "scorer": scorer, "budget": budget}
    return {**open_searcher(place).found(problem, seed, strategy, scorer, budget), **asked_for}


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value[:40]!r} is not one of {', '.join(known)}.")


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise ConfigError(f"{name} is {text[:40]!r}; expected a whole number from 0 to 999999.")
    return int(text)
