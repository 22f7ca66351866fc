"""Samples one step ahead in a background thread while the learner trains on the current step."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from posttrain.rewards.workers import WorkerPool

T = TypeVar("T")


class Cancelled(Exception):
    """Raised in the background thread when its result is no longer needed."""


class Prefetcher(WorkerPool, Generic[T]):
    """Runs one call at a time in a background thread, ahead of when its result is needed."""

    def __init__(self) -> None:
        super().__init__(1)
        self._next: Future[tuple[T, float]] | None = None

    @property
    def started(self) -> bool:
        """Whether a call has been started whose result was not taken yet."""
        return self._next is not None

    def start(self, call: Callable[[], T]) -> None:
        """Starts a call in the background thread."""

        def timed() -> tuple[T, float]:
            start = time.monotonic()
            return call(), time.monotonic() - start

        self._next = self.submit(timed)

    def take(self) -> tuple[T, float]:
        """Waits for the started call; returns its result and how many of its seconds ran in the background.

        Reraises the call's exception.
        """
        assert self._next is not None, "start a call first"
        start = time.monotonic()
        result, seconds = self._next.result()
        self._next = None
        return result, max(0.0, seconds - (time.monotonic() - start))

    def wait(self) -> None:
        """Waits until no call is in progress."""
        if self._next is not None:
            self._next.exception()

    def check(self) -> None:
        """Cancellation point for long calls: raises Cancelled once the context manager has exited."""
        if self.closed:
            raise Cancelled
