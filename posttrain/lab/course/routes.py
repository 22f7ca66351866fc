"""What the course's pages ask for: the chapters, one of them, and the numbers of a worked example."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.lab.course import (
    pages,
    worked,
    worked_algorithms,
    worked_challenges,
    worked_measured,
    worked_pairs,
    worked_reasoning,
    worked_rewards,
)
from posttrain.lab.course.working import Example
from posttrain.lab.folders import Place
from posttrain.lab.routing import get, named
from posttrain.types import ResumeError

EXAMPLES: dict[str, Example] = {
    **worked.EXAMPLES,
    **worked_rewards.EXAMPLES,
    **worked_algorithms.EXAMPLES,
    **worked_pairs.EXAMPLES,
    **worked_measured.EXAMPLES,
    **worked_reasoning.EXAMPLES,
    **worked_challenges.EXAMPLES,
}
"""Worked examples by the name that a chapter gives them."""


def routes(place: Place) -> list[BaseRoute]:
    """The course's part of the lab; nothing in it depends on the folder."""
    return [
        get("/api/course", lambda request: pages.chapters()),
        get("/api/course/{chapter}", lambda request: pages.read_chapter(named(request, "chapter"))),
        get("/api/worked/{name}", work),
    ]


def work(request: Request) -> dict[str, Any]:
    """Computes a worked example, now."""
    name = named(request, "name")
    if name not in EXAMPLES:
        raise ResumeError(f"there is no worked example {name!r}; there are {', '.join(EXAMPLES)}.")
    return EXAMPLES[name]().as_dict()
