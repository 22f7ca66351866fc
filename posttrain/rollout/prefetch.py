"""Threads beside the caller: judges that score answers while others are written, a sampler one step ahead.

What a thread computes has the bits that the caller would have got, because it uses as many CPU threads: torch keeps
that number for each thread, and the order in which a product adds its terms can depend on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

T = TypeVar("T")
LAST_CALL = 1.0  # seconds that a second Ctrl-C waits for calls that are being made


class Abandoned(Exception):
    """Raised in a thread whose result is no longer wanted."""


class Threads:
    """`count` threads that make the calls given to `submit`, in that order; they end with the block.

    At the end of the block calls that were not begun are dropped and those being made are waited for, after a
    KeyboardInterrupt for `LAST_CALL` seconds at most. The threads are daemons, so a call that never returns does not
    keep the process alive.
    """

    def __init__(self, count: int) -> None:
        self.count, self.closed = count, False
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        cpu_threads = torch.get_num_threads()
        self._threads = [threading.Thread(target=self._work, args=(cpu_threads,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The call's future value; what the call raises, `result()` raises."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.closed = True
        for _ in self._threads:
            self._calls.put(None)
        patient = kind is None or issubclass(kind, Exception)
        end = time.monotonic() + LAST_CALL
        for thread in self._threads:
            thread.join(None if patient else max(0.0, end - time.monotonic()))

    def _work(self, cpu_threads: int) -> None:
        torch.set_num_threads(cpu_threads)
        while item := self._calls.get():
            future, call = item
            if self.closed:
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)


class Ahead(Threads, Generic[T]):
    """One call made ahead of the time its result is needed, in a thread of its own; without `on` there is none."""

    def __init__(self, on: bool = True) -> None:
        super().__init__(int(on))
        self._next: Future[tuple[T, float]] | None = None

    def start(self, call: Callable[[], T]) -> None:
        """Begins the call whose result the next `take` gives."""

        def timed() -> tuple[T, float]:
            start = time.monotonic()
            return call(), time.monotonic() - start

        self._next = self.submit(timed)

    def take(self, call: Callable[[], T]) -> tuple[T, float]:
        """The result of the call that was started, else of `call`, made now; and the seconds that were not waited for.

        Raises what the call raised.
        """
        if self._next is None:
            return call(), 0.0
        start = time.monotonic()
        result, seconds = self._next.result()
        self._next = None
        return result, max(0.0, seconds - (time.monotonic() - start))

    def wait(self) -> None:
        """Returns when no call is being made."""
        if self._next is not None:
            self._next.exception()

    def check(self) -> None:
        """For long calls, to be called now and then: raises Abandoned when the block has ended."""
        if self.closed:
            raise Abandoned
