"""Routes of the GRPO explorer: problems, a sampled group, its advantages, and real updates on it.

Everything is a function of the URL, so a link shows the same page again. torch and the model are loaded with the first
group, which the page requests when it opens.
"""

from __future__ import annotations

import math
from functools import lru_cache

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.lab.explore.problems import listed, task_of
from posttrain.lab.folders import Place
from posttrain.lab.routing import get
from posttrain.types import ConfigError, Json

SIZES = (4, 8, 16, 32)
VARIANTS = ("grpo", "dr-grpo", "rloo", "maxrl")
UPDATES = 4
"""Maximum updates on one group."""


def routes(place: Place) -> list[BaseRoute]:
    """The routes of the GRPO explorer."""
    return [
        get("/api/explore/grpo", lambda request: {"problems": listed(), "sizes": SIZES}),
        get("/api/explore/grpo/group", lambda request: read_group(place, request)),
        get("/api/explore/grpo/advantages", read_advantages),
        get("/api/explore/grpo/update", lambda request: read_update(place, request)),
    ]


def read_group(place: Place, request: Request) -> Json:
    """A sampled group, with the request's parameters."""
    from posttrain.lab.explore.group import describe, open_writer

    problem, seed, size = _asked(request)
    return {**describe(open_writer(place).group(problem, seed, size)), "problem": problem, "seed": seed, "size": size}


def read_advantages(request: Request) -> Json:
    """The advantages of the given rewards."""
    from posttrain.lab.explore.group import compare

    rewards = _rewards(request)
    watched = _whole(request, "watch", 0, len(rewards) - 1)
    return {"rewards": rewards, **compare(rewards, _variant(request), watched)}


def read_update(place: Place, request: Request) -> Json:
    """The effect of updates on a group with the given rewards."""
    problem, seed, size = _asked(request)
    rewards = _rewards(request)
    if len(rewards) != size:
        raise ConfigError(f"got {len(rewards)} rewards for {size} answers; expected one for each.")
    lr, clip = _number(request, "lr", 1e-6, 1e-2), _number(request, "clip", 0.0, 1.0)
    updates = _whole(request, "updates", 1, UPDATES)
    return _update(place, problem, seed, tuple(rewards), _variant(request), lr, updates, clip)


@lru_cache(maxsize=64)
def _update(
    place: Place, problem: str, seed: int, rewards: tuple[float, ...], how: str, lr: float, updates: int, clip: float
) -> Json:
    from posttrain.lab.explore.group import open_writer
    from posttrain.lab.explore.update import AGAIN, update

    writer = open_writer(place)
    group = writer.group(problem, seed, len(rewards))
    before = writer.group(problem, 0, AGAIN, "again").right
    return {"before": before, **update(writer, group, rewards, how, lr, updates, clip, clip)}


def _asked(request: Request) -> tuple[str, int, int]:
    problem = request.query_params.get("problem", "")
    task_of(problem)  # rejects invalid problems before a model is loaded
    size = _whole(request, "size", SIZES[0], SIZES[-1])
    if size not in SIZES:
        raise ConfigError(f"size={size} is not one of {', '.join(map(str, SIZES))}.")
    return problem, _whole(request, "seed", 0, 999_999), size


def _variant(request: Request) -> str:
    how = request.query_params.get("how", "")
    if how not in VARIANTS:
        raise ConfigError(f"how={how[:40]!r} is not one of {', '.join(VARIANTS)}.")
    return how


def _rewards(request: Request) -> list[float]:
    given = request.query_params.get("rewards", "").split(",")
    if not 2 <= len(given) <= SIZES[-1]:
        raise ConfigError(f"got {len(given)} rewards; expected 2 to {SIZES[-1]}.")
    return [_in_range("a reward", text, 0.0, 1.0) for text in given]


def _number(request: Request, name: str, low: float, high: float) -> float:
    return _in_range(name, request.query_params.get(name, ""), low, high)


def _in_range(what: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(f"{what} is {text[:40]!r}; expected a number from {low:g} to {high:g}.")
    return value


def _whole(request: Request, name: str, low: int, high: int) -> int:
    value = _number(request, name, low, high)
    if value != int(value):
        raise ConfigError(f"{name} is {value:g}; expected a whole number from {low} to {high}.")
    return int(value)
