"""One socket for all that an explorer asks while something is moved.

A browser takes longer over a request than the lab takes over its answer. On a socket that is open the same question
costs a message. The page sends {"id", "path"} and gets {"id", "status", "body"}, in the order of the answers. Only
what routes that read would answer is answered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from anyio import create_task_group
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from posttrain.lab.routing import Reading

UNREADABLE = 1003  # the close code for a message of a kind that is not taken


def socket(routes: Sequence[BaseRoute]) -> WebSocketRoute:
    """`/ask`, which answers for those of `routes` that read."""
    readings = [route for route in routes if isinstance(route, Reading)]

    async def reply(page: WebSocket, number: int, path: str) -> None:
        status, body = await answer(readings, path)
        with suppress(WebSocketDisconnect, RuntimeError):  # the page was closed meanwhile
            await page.send_text(f'{{"id": {number}, "status": {status}, "body": {body}}}')

    async def listen(page: WebSocket) -> None:
        await page.accept()
        async with create_task_group() as replies:
            with suppress(WebSocketDisconnect):
                while (asked := _read(await page.receive_text())) is not None:
                    replies.start_soon(reply, page, *asked)
                await page.close(UNREADABLE)
            replies.cancel_scope.cancel()

    return WebSocketRoute("/ask", listen)


async def answer(readings: Sequence[Reading], path: str) -> tuple[int, str]:
    """Status and JSON of what a GET of `path`, with its query, would bring."""
    asked = urlsplit(path)
    query = asked.query.encode("ascii", "ignore")
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": asked.path, "query_string": query, "headers": []}
    for route in readings:
        match, found = route.matches(scope)
        if match is Match.FULL:
            return await route.outcome(Request({**scope, **found}))
    return 404, json.dumps({"error": f"The lab computes nothing at {asked.path[:80]!r}."})


def _read(text: str) -> tuple[int, str] | None:
    """The number and the path of a question; None where it is none."""
    try:
        asked = json.loads(text)
        return int(asked["id"]), str(asked["path"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
