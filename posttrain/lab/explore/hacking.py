"""The explorer of reward hacking: two runs of one small policy side by side, without and with a KL penalty.

One WebSocket is one pair of runs: it opens with the numbers of the start, plays, pauses and steps as it is told, and
when it closes the runs are gone. A second kind runs one penalty after the other and sends where each ends.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from anyio import to_thread
from starlette.datastructures import QueryParams
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from posttrain.lab.explore import goodhart
from posttrain.lab.explore.goodhart import WORDS, Optimisation, Step, World
from posttrain.lab.folders import Place
from posttrain.types import ConfigError

SPEEDS = {"slow": 0.25, "steady": 0.04, "fast": 0.0}
"""Seconds between two steps."""
SAMPLES = 4  # answers of each step that are shown
BETAS = (0.0, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
LAST = 10  # steps whose mean says where a run ended
LIMITS: dict[str, tuple[float, float]] = {"beta": (0, 2), "seed": (0, 9999), "steps": (20, 300)}
_making = threading.Lock()


@dataclass(frozen=True)
class Asked:
    """What an address asks for."""

    beta: float
    seed: int
    steps: int

    @classmethod
    def of(cls, query: QueryParams) -> Asked:
        """Raises ConfigError for what is no number or beyond LIMITS."""
        found: dict[str, float] = {}
        for name, (low, high) in LIMITS.items():
            given = query.get(name, "")
            try:
                found[name] = float(given)
            except ValueError:
                raise ConfigError(f"{name}={given!r} is not a number; give {low:g} to {high:g}.") from None
            if not low <= found[name] <= high:
                raise ConfigError(f"{name}={given} is not between {low:g} and {high:g}.")
        return cls(found["beta"], int(found["seed"]), int(found["steps"]))


# --- what is told ---------------------------------------------------------------------------------------------------


def prepare(seed: int) -> World:
    """The world of a seed, made once however many ask for it."""
    with _making:
        return goodhart.make_world(seed)


def about(world: World) -> dict[str, Any]:
    """What holds for a whole run: the question, the rule, the reward model and how often it is right at the start."""
    rule = [
        [f"for each of the facts {', '.join(goodhart.FACTS)}", goodhart.FACT],
        [f"for each wrong fact: {', '.join(goodhart.WRONG)}", goodhart.FALSE],
        [f"for being polite exactly once: {', '.join(goodhart.POLITE)}", goodhart.COURTESY],
        ["each time that a word is said again", goodhart.REPEAT],
        [f"for each word past {goodhart.SHORT}", goodhart.EXTRA],
    ]
    return {
        "question": goodhart.QUESTION,
        "rule": rule,
        "words": list(WORDS),
        "weights": [round(weight, 4) for weight in world.weights.tolist()],
        "agreement": world.agreement,
        "parameters": sum(numbers.numel() for numbers in world.start),
        "pairs": goodhart.PAIRS,
        "answers": goodhart.ANSWERS,
        "longest": goodhart.LONGEST,
        "repeat": goodhart.REPEAT,
    }


def told(step: Step) -> dict[str, Any]:
    """The numbers of one step, and its first answers with the parts of their true reward."""
    parts = goodhart.points(step.answers)
    samples = [
        {
            "text": goodhart.written(step.answers[i]),
            "proxy": round(float(step.proxy[i]), 3),
            "true": float(step.true[i]),
            "parts": {name: float(values[i]) for name, values in parts.items() if values[i] != 0},
        }
        for i in range(SAMPLES)
    ]
    return {
        "proxy": round(float(step.proxy.mean()), 4),
        "true": round(float(step.true.mean()), 4),
        "kl": round(float(step.distance.mean()), 4),
        "agreement": goodhart.agreement(step.proxy, step.true),
        "words": [round(count, 3) for count in goodhart.counts(step.answers).mean(0).tolist()],
        "samples": samples,
    }


def exploited(start: dict[str, Any], now: dict[str, Any], weights: torch.Tensor) -> dict[str, Any]:
    """The word whose use has earned the reward model's score the most since the start: how often it stands in an answer
    then and now, its weight, and the points that the change brings by that model's account."""
    more = torch.tensor(now["words"]) - torch.tensor(start["words"])
    gained = more * weights
    best = int(gained.argmax())
    return {
        "word": WORDS[best],
        "before": start["words"][best],
        "now": now["words"][best],
        "weight": round(float(weights[best]), 4),
        "gained": round(float(gained[best]), 4),
    }


class Pair:
    """Two runs from one start and one seed, without and with the penalty."""

    def __init__(self, world: World, asked: Asked) -> None:
        self.world = world
        self._runs = {"off": Optimisation(world, 0.0, asked.seed), "on": Optimisation(world, asked.beta, asked.seed)}
        self._first: dict[str, dict[str, Any]] = {}
        self._best: dict[str, list[float]] = {}
        self._count = 0

    def step(self) -> dict[str, Any]:
        """The next step of both; `best` is the step at which the true reward was highest so far, and how high."""
        news: dict[str, Any] = {"kind": "step", "step": self._count}
        for name, run in self._runs.items():
            now = told(run.step())
            first = self._first.setdefault(name, now)
            best = self._best.setdefault(name, [0, now["true"]])
            if now["true"] > best[1]:
                best[:] = [self._count, now["true"]]
            news[name] = {**now, "best": list(best), "exploited": exploited(first, now, self.world.weights)}
        self._count += 1
        return news


def ending(world: World, beta: float, seed: int, steps: int, stop: threading.Event) -> dict[str, Any]:
    """Where a run of `steps` updates ends: means of its last LAST steps. Ends early once `stop` is set."""
    run = Optimisation(world, beta, seed)
    last: list[Step] = []
    for _ in range(steps + 1):
        if stop.is_set():
            break
        last = [*last[1 - LAST :], run.step()]
    proxy, true, distance = (torch.cat([getattr(s, name) for s in last]) for name in ("proxy", "true", "distance"))
    figures = {"proxy": proxy, "true": true, "kl": distance}
    return {"kind": "point", "beta": beta, **{name: round(float(v.mean()), 4) for name, v in figures.items()}}


# --- sockets --------------------------------------------------------------------------------------------------------


class Player:
    """What a page has asked for: whether to play, how fast, or single steps."""

    def __init__(self) -> None:
        self._wait, self._left, self._steps = SPEEDS["steady"], 0.0, asyncio.Event()

    def hear(self, said: str) -> None:
        """play, pause, step or a speed. Raises ConfigError for anything else."""
        if said in SPEEDS:
            self._wait = SPEEDS[said]
        elif said in ("play", "pause", "step"):
            self._left = {"play": float("inf"), "pause": 0.0, "step": self._left + 1}[said]
        else:
            raise ConfigError(f"{said[:40]!r} is not known; say play, pause, step, {', '.join(SPEEDS)}.")
        (self._steps.set if self._left else self._steps.clear)()

    async def turns(self, count: int) -> AsyncIterator[None]:
        """As many turns, each when its time has come."""
        for _ in range(count):
            await self._steps.wait()
            self._left -= 1
            if not self._left:
                self._steps.clear()
            yield
            await asyncio.sleep(self._wait)


async def live(socket: WebSocket) -> None:
    """A pair of runs, for as long as the page is open."""
    player = Player()

    async def work() -> None:
        asked = Asked.of(socket.query_params)
        world = await to_thread.run_sync(prepare, asked.seed)
        pair = Pair(world, asked)
        await _say(socket, {"kind": "ready", **about(world)})
        await _say(socket, await to_thread.run_sync(pair.step))
        async for _ in player.turns(asked.steps):
            await _say(socket, await to_thread.run_sync(pair.step))
        await _say(socket, {"kind": "end"})

    await _serve(socket, work, player.hear)


async def frontier(socket: WebSocket) -> None:
    """Where runs with several penalties end, a message each as soon as it has ended."""
    stop = threading.Event()

    async def work() -> None:
        try:
            asked = Asked.of(socket.query_params)
            world = await to_thread.run_sync(prepare, asked.seed)
            betas = sorted({*BETAS, asked.beta}, reverse=True)
            await _say(socket, {"kind": "betas", "betas": betas})
            for beta in betas:
                await _say(socket, await to_thread.run_sync(ending, world, beta, asked.seed, asked.steps, stop,
                                                            abandon_on_cancel=True))  # fmt: skip
            await _say(socket, {"kind": "end"})
        finally:
            stop.set()

    await _serve(socket, work, lambda said: None)


async def _say(socket: WebSocket, news: dict[str, Any]) -> None:
    await socket.send_text(json.dumps(news, allow_nan=False))


async def _serve(socket: WebSocket, work: Callable[[], Awaitable[None]], hear: Callable[[str], None]) -> None:
    """Works until the page is closed; what the page says meanwhile is heard."""
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
    """Both sockets; they need nothing of the folder."""
    return [
        WebSocketRoute("/live/explore/hacking", live),
        WebSocketRoute("/live/explore/hacking/frontier", frontier),
    ]
