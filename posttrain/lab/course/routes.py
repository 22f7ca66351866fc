"""Routes of the course: the list of chapters, one chapter, and the numbers of a worked example."""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.lab.course import pages
from posttrain.lab.folders import Place
from posttrain.lab.routing import get, named
from posttrain.types import Json, ResumeError


def routes(place: Place) -> list[BaseRoute]:
    """The routes of the course; they do not depend on the folder."""
    return [
        get("/api/course", lambda request: pages.chapters()),
        get("/api/course/{chapter}", lambda request: pages.read_chapter(named(request, "chapter"))),
        get("/api/worked/{name}", work),
    ]


def work(request: Request) -> Json:
    """Computes a worked example."""
    from posttrain.lab.course.examples import EXAMPLES

    name = named(request, "name")
    if name not in EXAMPLES:
        raise ResumeError(f"there is no worked example {name!r}; choose one of {', '.join(EXAMPLES)}.")
    return EXAMPLES[name]().as_dict()
