"""Reward hacking explorer: two runs of one small policy side by side, without and with a KL penalty.

Each WebSocket is one pair of runs: it first sends the initial numbers, then plays, pauses and steps on command; closing
it ends the runs. A second socket runs several penalties in turn and sends the final numbers of each.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from anyio import to_thread
from starlette.datastructures import QueryParams
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from posttrain.lab.folders import Place
from posttrain.types import ConfigError, JsonView

SPEEDS = {"slow": 0.25, "steady": 0.04, "fast": 0.0}
"""Seconds between steps."""
BETAS = (0.0, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
LIMITS: dict[str, tuple[float, float]] = {"beta": (0, 2), "seed": (0, 9999), "steps": (20, 300)}


@dataclass(frozen=True)
class Asked:
    """The settings in the URL."""

    beta: float
    seed: int
    steps: int

    @classmethod
    def of(cls, query: QueryParams) -> Asked:
        """Parses URL parameters. Raises ConfigError for values that are not numbers or exceed LIMITS."""
        found: dict[str, float] = {}
        for name, (low, high) in LIMITS.items():
            given = query.get(name, "")
            try:
                found[name] = float(given)
            except ValueError:
                raise ConfigError(f"{name}={given!r} is not a number; expected {low:g} to {high:g}.") from None
            if not low <= found[name] <= high:
                raise ConfigError(f"{name}={given} is not between {low:g} and {high:g}.")
        return cls(found["beta"], int(found["seed"]), int(found["steps"]))


class Player:
    """Playback state: playing or paused, speed, and pending single steps."""

    def __init__(self) -> None:
        self._wait, self._left, self._steps = SPEEDS["steady"], 0.0, asyncio.Event()

    def hear(self, said: str) -> None:
        """Handles a command: play, pause, step or a speed. Raises ConfigError for anything else."""
        if said in SPEEDS:
            self._wait = SPEEDS[said]
        elif said in ("play", "pause", "step"):
            self._left = {"play": float("inf"), "pause": 0.0, "step": self._left + 1}[said]
        else:
            raise ConfigError(f"unknown command {said[:40]!r}; expected play, pause, step, {', '.join(SPEEDS)}.")
        (self._steps.set if self._left else self._steps.clear)()

    async def turns(self, count: int) -> AsyncIterator[None]:
        """Yields `count` times, each when the next step is due."""
        for _ in range(count):
            await self._steps.wait()
            self._left -= 1
            if not self._left:
                self._steps.clear()
            yield
            await asyncio.sleep(self._wait)


async def live(socket: WebSocket) -> None:
    """Runs a pair of runs while the page is open."""
    player = Player()

    async def work() -> None:
        asked = Asked.of(socket.query_params)
        module, world = await to_thread.run_sync(_prepared, asked.seed)
        pair = module.Pair(world, asked.beta, asked.seed)
        await _say(socket, {"kind": "ready", **module.about(world)})
        await _say(socket, await to_thread.run_sync(pair.step))
        async for _ in player.turns(asked.steps):
            await _say(socket, await to_thread.run_sync(pair.step))
        await _say(socket, {"kind": "end"})

    await _serve(socket, work, player.hear)


async def frontier(socket: WebSocket) -> None:
    """Sends the final numbers of runs with several penalties, each as soon as it ends."""
    stop = threading.Event()

    async def work() -> None:
        try:
            asked = Asked.of(socket.query_params)
            module, world = await to_thread.run_sync(_prepared, asked.seed)
            betas = sorted({*BETAS, asked.beta}, reverse=True)
            await _say(socket, {"kind": "betas", "betas": betas})
            for beta in betas:
                await _say(socket, await to_thread.run_sync(module.ending, world, beta, asked.seed, asked.steps, stop,
                                                            abandon_on_cancel=True))  # fmt: skip
            await _say(socket, {"kind": "end"})
        finally:
            stop.set()

    await _serve(socket, work, lambda said: None)


def _prepared(seed: int) -> tuple[ModuleType, Any]:
    """The module that computes and a world; torch is imported with the first request, not when the lab starts."""
    from posttrain.lab.explore import pair

    return pair, pair.prepare(seed)


async def _say(socket: WebSocket, news: JsonView) -> None:
    await socket.send_text(json.dumps(news, allow_nan=False))


async def _serve(socket: WebSocket, work: Callable[[], Awaitable[None]], hear: Callable[[str], None]) -> None:
    """Runs `work` until the page is closed, passing the page's messages to `hear`."""
    await socket.accept()

    async def guarded() -> None:
        try:
            await work()
        except ConfigError as error:
            await _say(socket, {"error": str(error)})
            await socket.close(1008)

    working = asyncio.create_task(guarded())
    try:
        while True:
            hear(await socket.receive_text())
    except ConfigError as error:
        with suppress(WebSocketDisconnect, RuntimeError):
            await _say(socket, {"error": str(error)})
            await socket.close(1008)
    except WebSocketDisconnect:
        pass  # the page is closed
    finally:
        working.cancel()
        with suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
            await working


def routes(place: Place) -> list[BaseRoute]:
    """Both sockets; they do not depend on the folder."""
    return [
        WebSocketRoute("/live/explore/hacking", live),
        WebSocketRoute("/live/explore/hacking/frontier", frontier),
    ]
