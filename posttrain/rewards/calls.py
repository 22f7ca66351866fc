"""Rewards that score a whole group of completions at once, and asynchronous ones that wait for many at once."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from posttrain.types import RolloutError, Task, Verdict

GROUP_ARGUMENTS = ("completions", "group")
"""Arguments by which a reward function asks for all completions of a group."""


class GroupReward:
    """A `BatchVerifier` whose verdict on a completion depends on the other completions of its group."""

    by_group = True

    def __init__(self, name: str, score: Callable[[Task, list[str]], list[Verdict]]) -> None:
        self.__name__, self._score = name, score

    def __call__(self, task: Task, text: str, /) -> Verdict:
        """The verdict on a completion that is alone in its group."""
        return self._score(task, [text])[0]

    def score_all(self, pairs: Sequence[tuple[Task, str]], /) -> list[Verdict | RolloutError]:
        """See `BatchVerifier.score_all`; consecutive completions of one task are a group."""
        found: list[Verdict | RolloutError] = []
        for _, run in groupby(pairs, lambda pair: pair[0].id):
            group = list(run)
            try:
                found += self._score(group[0][0], [text for _, text in group])
            except RolloutError as error:
                found += [error] * len(group)
        return found


class ConcurrentReward:
    """A `BatchVerifier` that awaits its asynchronous function for all completions at the same time."""

    def __init__(self, name: str, score: Callable[[Task, str], Awaitable[Verdict]]) -> None:
        self.__name__, self._score = name, score

    def __call__(self, task: Task, text: str, /) -> Verdict:
        """The verdict on one completion."""
        (found,) = self.score_all([(task, text)])
        if isinstance(found, RolloutError):
            raise found
        return found

    def score_all(self, pairs: Sequence[tuple[Task, str]], /) -> list[Verdict | RolloutError]:
        """See `BatchVerifier.score_all`."""
        return waited(self._gather(pairs))

    async def _gather(self, pairs: Sequence[tuple[Task, str]]) -> list[Verdict | RolloutError]:
        async def one(task: Task, text: str) -> Verdict | RolloutError:
            try:
                return await self._score(task, text)
            except RolloutError as error:
                return error

        return await asyncio.gather(*(one(task, text) for task, text in pairs))


def is_async(function: Any) -> bool:
    """Whether calling a function or object gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def waited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine on the background event loop and waits for its result, or raises here what it raised.

    `sys.exit` in the loop's thread would end the loop, and this would wait for ever.
    """

    async def caught() -> tuple[Any, BaseException | None]:
        try:
            return await coroutine, None
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            return None, error

    result, error = asyncio.run_coroutine_threadsafe(caught(), _loop()).result()
    if error is not None:
        raise error
    return result


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all rewards, so that their connections can be reused; in a thread of its own, because the
    caller's may have a running loop (a notebook)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
