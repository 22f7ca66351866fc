"""Calls in one background thread, ahead of when their results are needed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Condition
from types import TracebackType
from typing import Generic, TypeVar

from posttrain.rewards.workers import WorkerPool

T = TypeVar("T")


class Cancelled(Exception):
    """Raised in the background thread when its result is no longer needed."""


class Prefetcher(WorkerPool, Generic[T]):
    """Runs calls one after the other, in the order in which they were started, in a background thread."""

    def __init__(self) -> None:
        self._results: deque[Future[tuple[T, float]]] = deque()
        self._turn, self._calling, self._paused = Condition(), False, False
        super().__init__(1)

    @property
    def started(self) -> bool:
        """Whether a call has been started whose result was not taken yet."""
        return bool(self._results)

    def start(self, call: Callable[[], T]) -> None:
        """Starts a call: the thread runs it after those that were started before it."""

        def timed() -> tuple[T, float]:
            with self._turn:
                self._turn.wait_for(lambda: self.closed or not self._paused)
                self.check()
                self._calling = True
            try:
                start = time.monotonic()
                return call(), time.monotonic() - start
            finally:
                with self._turn:
                    self._calling = False
                    self._turn.notify_all()

        self._results.append(self.submit(timed))

    def take(self) -> tuple[T, float]:
        """Waits for the oldest call; returns its result and how many of its seconds ran in the background.

        Reraises the call's exception.
        """
        assert self._results, "start a call first"
        start = time.monotonic()
        result, seconds = self._results.popleft().result()
        return result, max(0.0, seconds - (time.monotonic() - start))

    def wait(self) -> None:
        """Waits until every call that was started has ended."""
        for result in self._results:
            result.exception()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Waits until the call in progress has ended; the next one begins after the `with` block."""
        with self._turn:
            self._paused = True
            self._turn.wait_for(lambda: not self._calling)
        try:
            yield
        finally:
            with self._turn:
                self._paused = False
                self._turn.notify_all()

    def check(self) -> None:
        """Cancellation point for long calls: raises Cancelled once the context manager has exited."""
        if self.closed:
            raise Cancelled

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._turn:
            self.closed = True
            self._turn.notify_all()
        super().__exit__(kind, error, tb)
