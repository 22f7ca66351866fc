"""Concurrent environment calls with a concurrency limit and a timeout per call.

Each call runs in its own thread. A call that times out is abandoned: its result is a TimeoutError, its thread keeps
running in the background, and its slot goes to the next call.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from posttrain.types import RolloutError

K = TypeVar("K", bound=Hashable)
MOST_LEFT = 64  # abandoned calls still running, above which the run stops


class Calls(Generic[K]):
    """Runs at most `limit` calls at once, each for at most `timeout` seconds; further calls are queued.

    A call is identified by a key, which can be reused once its result has been collected.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self.limit, self.timeout = limit, timeout
        self._changed = threading.Condition()
        self._waiting: deque[tuple[K, Callable[[], Any], Callable[[], None]]] = deque()
        self._running: dict[K, tuple[float, object]] = {}  # deadline, and a token that identifies this call
        self._results: list[tuple[K, Any]] = []
        self._abandoned = 0

    def submit(self, key: K, call: Callable[[], Any], late: Callable[[], None]) -> None:
        """Runs `call` as soon as a slot is free. If it returns after it timed out, `late` is called."""
        with self._changed:
            self._waiting.append((key, call, late))
            self._start()

    @property
    def pending(self) -> int:
        """Number of calls whose result has not been collected."""
        with self._changed:
            return len(self._waiting) + len(self._running) + len(self._results)

    def finished(self, patience: float, linger: float = 0.0) -> list[tuple[K, Any]]:
        """Collects finished calls: pairs of key and return value, or the exception raised.

        Waits up to `patience` seconds for the first result, then up to `linger` seconds for more. Raises RolloutError
        if too many timed-out calls are still running.
        """
        end: float | None = None
        until = time.monotonic() + patience
        with self._changed:
            while True:
                now = time.monotonic()
                self._abandon_late(now)
                busy = bool(self._running or self._waiting)
                if self._results and end is None:
                    end = now + linger
                if not busy or now >= (until if end is None else end):
                    done, self._results = self._results, []
                    return done
                soonest = min((deadline for deadline, _ in self._running.values()), default=until)
                self._changed.wait(max(0.0, min(soonest, until if end is None else end) - now))

    def _abandon_late(self, now: float) -> None:
        for key in [k for k, (deadline, _) in self._running.items() if deadline <= now]:
            del self._running[key]
            self._abandoned += 1
            self._results.append((key, TimeoutError(f"it took longer than {self.timeout:g} seconds")))
        if self._abandoned > MOST_LEFT:
            raise RolloutError(
                f"{self._abandoned} calls into the environment timed out after {self.timeout:g} s (env.timeout) and "
                "are still running. Find out what they wait for, or raise env.timeout.",
                boundary="env",
            )
        self._start()

    def _start(self) -> None:
        while self._waiting and len(self._running) < self.limit:
            key, call, late = self._waiting.popleft()
            token = object()
            self._running[key] = (time.monotonic() + self.timeout, token)
            threading.Thread(target=self._run, args=(key, token, call, late), daemon=True).start()

    def _run(self, key: K, token: object, call: Callable[[], Any], late: Callable[[], None]) -> None:
        try:
            result = call()
        except BaseException as error:  # returned by `finished`
            result = error
        with self._changed:
            in_time = self._running.get(key, (0.0, None))[1] is token
            if in_time:
                del self._running[key]
                self._results.append((key, result))
                self._start()
            else:
                self._abandoned -= 1
            self._changed.notify_all()
        if not in_time:
            late()
