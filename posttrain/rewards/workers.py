"""Background workers for rewards and sampling.

A worker thread uses as many CPU threads as the caller: torch keeps that number per thread, and the order in which a
matrix product adds its terms can depend on it. So results are bit-exact wherever they are computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

T = TypeVar("T")
LAST_CALL = 1.0  # seconds that a second Ctrl-C waits for calls in progress


class WorkerPool:
    """`count` threads that run the submitted calls in order, until the end of the `with` block.

    At the end of the block, calls that have not started are dropped and running ones are waited for, after a
    KeyboardInterrupt for at most `LAST_CALL` seconds. The threads are daemons, so a call that never returns does not
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
        """Queues a call and returns its Future; an exception of the call is raised by `result()`."""
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
            except BaseException as error:  # raised by `result()`
                future.set_exception(error)
