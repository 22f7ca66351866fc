"""What the course's pages ask for: the chapters, one of them, and the numbers of a worked example."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.lab.course import pages
from posttrain.lab.folders import Place
from posttrain.lab.routing import get, named
from posttrain.types import ResumeError


def routes(place: Place) -> list[BaseRoute]:
    """The course's part of the lab; nothing in it depends on the folder."""
    return [
        get("/api/course", lambda request: pages.chapters()),
        get("/api/course/{chapter}", lambda request: pages.read_chapter(named(request, "chapter"))),
        get("/api/worked/{name}", work),
    ]


def work(request: Request) -> dict[str, Any]:
    """Computes a worked example, now."""
    from posttrain.lab.course.examples import EXAMPLES

    name = named(request, "name")
    if name not in EXAMPLES:
        raise ResumeError(f"there is no worked example {name!r}; there are {', '.join(EXAMPLES)}.")
    return EXAMPLES[name]().as_dict()
