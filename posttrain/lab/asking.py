"""WebSocket for the requests that explorers send while a control moves.

A browser spends more time on an HTTP request than the lab spends on the response; over an open socket a request costs
one message. The page sends {"id", "path"} and receives {"id", "status", "body"}, in order of completion. Only read-only
routes are served.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from anyio import create_task_group
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, WebSocketRoute
from starlette.types import Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from posttrain.lab.routing import Reading

UNREADABLE = 1003  # WebSocket close code for an unsupported message


def socket(routes: Sequence[BaseRoute]) -> WebSocketRoute:
    """`/ask`, which serves the read-only routes among `routes`."""
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
    """Status and JSON that a GET of `path`, including its query, would return."""
    asked = urlsplit(path)
    query = asked.query.encode("ascii", "ignore")
    scope: Scope = {"type": "http", "method": "GET", "path": asked.path, "query_string": query, "headers": []}
    for route in readings:
        match, found = route.matches(scope)
        if match is Match.FULL:
            return await route.outcome(Request({**scope, **found}))
    return 404, json.dumps({"error": f"The lab serves no data at {asked.path[:80]!r}."})


def _read(text: str) -> tuple[int, str] | None:
    """(id, path) of a request; None if the message is not a valid request."""
    try:
        asked = json.loads(text)
        return int(asked["id"]), str(asked["path"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
