"""Calls into environments: many at once, but not too many, and none that the others wait for.

Each call has a thread of its own. One that does not return in time is given up: its result is a TimeoutError, its
thread is left behind, and its place is taken by the next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from posttrain.types import RolloutError

K = TypeVar("K", bound=Hashable)
MOST_LEFT = 64  # calls that never returned, before a run is stopped


class Calls(Generic[K]):
    """At most `limit` calls at once, each for `timeout` seconds at most; others wait for their turn.

    A call is named by a key, which is free again when its result has been taken.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self.limit, self.timeout = limit, timeout
        self._changed = threading.Condition()
        self._waiting: deque[tuple[K, Callable[[], Any], Callable[[], None]]] = deque()
        self._running: dict[K, tuple[float, object]] = {}  # deadline, and what names this very call
        self._results: list[tuple[K, Any]] = []
        self._left = 0

    def submit(self, key: K, call: Callable[[], Any], late: Callable[[], None]) -> None:
        """Makes `call` as soon as there is room. Where it returns after it was given up, `late` is called after it."""
        with self._changed:
            self._waiting.append((key, call, late))
            self._start()

    @property
    def pending(self) -> int:
        """Calls whose result has not been taken."""
        with self._changed:
            return len(self._waiting) + len(self._running) + len(self._results)

    def finished(self, patience: float, linger: float = 0.0) -> list[tuple[K, Any]]:
        """Results by key: what a call returned, or the exception it raised.

        Waits up to `patience` seconds for the first, then up to `linger` more for others. Raises RolloutError when too
        many calls were given up and still have not returned.
        """
        end: float | None = None
        until = time.monotonic() + patience
        with self._changed:
            while True:
                now = time.monotonic()
                self._give_up(now)
                busy = bool(self._running or self._waiting)
                if self._results and end is None:
                    end = now + linger
                if not busy or now >= (until if end is None else end):
                    done, self._results = self._results, []
                    return done
                soonest = min((deadline for deadline, _ in self._running.values()), default=until)
                self._changed.wait(max(0.0, min(soonest, until if end is None else end) - now))

    def _give_up(self, now: float) -> None:
        for key in [k for k, (deadline, _) in self._running.items() if deadline <= now]:
            del self._running[key]
            self._left += 1
            self._results.append((key, TimeoutError(f"it took longer than {self.timeout:g} seconds")))
        if self._left > MOST_LEFT:
            raise RolloutError(
                f"{self._left} calls into the environment have not returned, each given {self.timeout:g} s "
                "(env.timeout). Look at what it waits for, or raise the limit.",
                boundary="env",
            )
        self._start()

    def _start(self) -> None:
        while self._waiting and len(self._running) < self.limit:
            key, call, late = self._waiting.popleft()
            token = object()
            self._running[key] = (time.monotonic() + self.timeout, token)
            threading.Thread(target=self._make, args=(key, token, call, late), daemon=True).start()

    def _make(self, key: K, token: object, call: Callable[[], Any], late: Callable[[], None]) -> None:
        try:
            result = call()
        except BaseException as error:  # handed to whoever asks for the result
            result = error
        with self._changed:
            wanted = self._running.get(key, (0.0, None))[1] is token
            if wanted:
                del self._running[key]
                self._results.append((key, result))
                self._start()
            else:
                self._left -= 1
            self._changed.notify_all()
        if not wanted:
            late()
