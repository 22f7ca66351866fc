"""Turns functions into JSON routes that run in a thread and report errors in one line.

A function takes a request (a write also the JSON object that the page sent) and returns JSON-serialisable data.
ConfigError becomes status 400, ResumeError 404, and any other PosttrainError or OSError 500.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.websockets import WebSocket

from posttrain.lab.folders import Place
from posttrain.types import ConfigError, Json, PosttrainError, ResumeError

NO_STORE = {"cache-control": "no-store"}
Read = Callable[[Request], Any]
Write = Callable[[Request, Json], Any]
Routes = Callable[[Place], list[BaseRoute]]
"""A part of the lab: takes the folder and returns its routes under /api."""


class Reading(Route):
    """A read-only route; `outcome` computes its response for the explorers' socket as well."""

    def __init__(self, path: str, read: Read) -> None:
        super().__init__(path, partial(_answer, read))
        self.outcome = partial(outcome, read)


def get(path: str, read: Read) -> Route:
    """A read-only route."""
    return Reading(path, read)


def post(path: str, write: Write) -> Route:
    """A route that writes; the page sends one JSON object of at most 1 MiB."""

    async def endpoint(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except ValueError:  # not UTF-8, or not JSON
            body = None
        if not isinstance(body, dict):
            return _response(400, _text({"error": "The request body is not a JSON object."}))
        return await _answer(partial(_swapped, write, body), request)

    return Route(path, endpoint, methods=["POST"])


def named(request: Request | WebSocket, name: str) -> str:
    """A path parameter."""
    return str(request.path_params[name])


def _swapped(write: Write, body: Json, request: Request) -> Any:
    return write(request, body)


async def outcome(read: Read, request: Request) -> tuple[int, str]:
    """Status and JSON of the result of `read`, or of its error."""
    try:
        return 200, _text(await to_thread.run_sync(read, request))
    except ConfigError as error:
        return 400, _text({"error": str(error)})
    except ResumeError as error:
        return 404, _text({"error": str(error)})
    except (PosttrainError, OSError) as error:
        return 500, _text({"error": str(error)})


async def _answer(read: Read, request: Request) -> Response:
    return _response(*await outcome(read, request))


def _response(status: int, text: str) -> Response:
    return Response(text, status, NO_STORE, "application/json")


def _text(body: Any) -> str:
    return json.dumps(body, allow_nan=False, ensure_ascii=True, default=str)
