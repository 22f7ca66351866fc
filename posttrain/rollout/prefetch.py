"""Sampling one step ahead, in a thread, while the learner trains on the current step's rollouts."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from posttrain.rewards.workers import WorkerPool

T = TypeVar("T")


class Cancelled(Exception):
    """Raised in the thread when its result is no longer wanted."""


class Prefetcher(WorkerPool, Generic[T]):
    """Makes one call ahead of the time its result is needed, in a thread of its own."""

    def __init__(self) -> None:
        super().__init__(1)
        self._next: Future[tuple[T, float]] | None = None

    @property
    def started(self) -> bool:
        """Whether there is a call whose result `take` gives."""
        return self._next is not None

    def start(self, call: Callable[[], T]) -> None:
        """Starts the call whose result the next `take` gives."""

        def timed() -> tuple[T, float]:
            start = time.monotonic()
            return call(), time.monotonic() - start

        self._next = self.submit(timed)

    def take(self) -> tuple[T, float]:
        """The result of the call that was started, and the seconds of it that were not waited for.

        Raises what the call raised.
        """
        assert self._next is not None, "start a call first"
        start = time.monotonic()
        result, seconds = self._next.result()
        self._next = None
        return result, max(0.0, seconds - (time.monotonic() - start))

    def wait(self) -> None:
        """Returns when no call is in progress."""
        if self._next is not None:
            self._next.exception()

    def check(self) -> None:
        """For long calls, to be called now and then: raises Cancelled when the block has ended."""
        if self.closed:
            raise Cancelled
