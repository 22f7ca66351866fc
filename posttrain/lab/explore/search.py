"""Routes of the page "Think longer": problems, searches of the built-in model, and the recorded frontier.

Everything is a function of the URL, so a link shows the same page again. torch and the model are loaded with the first
search, which the page requests when it opens.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.lab.explore.budgets import BUDGETS, LIMITED, SCORERS, STRATEGIES, frontier, offered_problems
from posttrain.lab.explore.problems import task_of
from posttrain.lab.folders import Place
from posttrain.lab.routing import get
from posttrain.types import ConfigError, Json


def routes(place: Place) -> list[BaseRoute]:
    """The routes of the page."""
    offered = {"budgets": BUDGETS, "strategies": STRATEGIES, "scorers": SCORERS, "limited": LIMITED}
    return [
        get("/api/explore/search", lambda request: {"problems": offered_problems(), **offered}),
        get("/api/explore/search/frontier", lambda request: frontier()),
        get("/api/explore/search/tree", lambda request: read_tree(place, request)),
    ]


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
