"""How the lab's functions become routes: they run in a thread, answer in JSON, and fail in one line.

A function takes a request (a write also the object that the page sent) and returns what JSON can hold. ConfigError is
the asker's mistake (400), ResumeError names something that is not here (404); anything else of ours is 500.
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
from posttrain.types import ConfigError, PosttrainError, ResumeError

NO_STORE = {"cache-control": "no-store"}
Read = Callable[[Request], Any]
Write = Callable[[Request, dict[str, Any]], Any]
Routes = Callable[[Place], list[BaseRoute]]
"""What a part of the lab adds: given the folder that is shown, its routes under /api."""


def get(path: str, read: Read) -> Route:
    """A route that only reads."""
    return Route(path, partial(_answer, read))


def post(path: str, write: Write) -> Route:
    """A route that changes something; the page sends one JSON object of at most a mebibyte."""

    async def endpoint(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except ValueError:  # not UTF-8, or not JSON
            body = None
        if not isinstance(body, dict):
            return _json(400, {"error": "The body of this request is not a JSON object."})
        return await _answer(partial(_swapped, write, body), request)

    return Route(path, endpoint, methods=["POST"])


def named(request: Request | WebSocket, name: str) -> str:
    """A part of the address."""
    return str(request.path_params[name])


def _swapped(write: Write, body: dict[str, Any], request: Request) -> Any:
    return write(request, body)


async def _answer(read: Read, request: Request) -> Response:
    try:
        return _json(200, await to_thread.run_sync(read, request))
    except ConfigError as error:
        return _json(400, {"error": str(error)})
    except ResumeError as error:
        return _json(404, {"error": str(error)})
    except (PosttrainError, OSError) as error:
        return _json(500, {"error": str(error)})


def _json(status: int, body: Any) -> Response:
    text = json.dumps(body, allow_nan=False, ensure_ascii=True, default=str)
    return Response(text, status, NO_STORE, "application/json")
