"""Workers as the driver sees them: start, call, learn that one died. cluster/processes.py and cluster/on_ray.py do it.

A worker has one life: a death is final, and whoever owns it starts another one with the newest state. So no worker
answers from old weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Protocol

from posttrain.cluster.messages import Buffer, encode
from posttrain.store.workers import RUN_ENDED as RUN_ENDED
from posttrain.store.workers import STARTED_ANEW as STARTED_ANEW

POLL = 0.2  # seconds between two looks at the deadlines
OnPart = Callable[[Any], None]
"""Gets the values that a worker's generator yields, in another thread than the caller's."""


class WorkerDied(RuntimeError):
    """A worker ended before it answered, or was ended because it did not answer in time."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} died: {self.reason}"


class Actor(Protocol):
    """A worker process with one object. Calls are run in order."""

    name: str
    made: Future[Any]  # done when its object exists
    calls: int  # answered, without the one that made its object
    parts: int  # values that its generators have yielded

    @property
    def where(self) -> str:
        """Process id and machine; empty until they are known."""
        ...

    @property
    def reason(self) -> str:
        """Why it has ended; empty while it is alive."""
        ...

    def send(self, message: Sequence[Buffer], on_part: OnPart | None = None) -> Future[Any]:
        """Sends an encoded call. The future raises what the method raised, or WorkerDied."""
        ...

    def kill(self, reason: str) -> None:
        """Ends the worker now; open calls raise WorkerDied with `reason`."""
        ...

    @property
    def alive(self) -> bool:
        """Whether `reason` is empty."""
        ...


Start = Callable[[str, str, tuple[Any, ...]], Actor]
"""start(name, kind, arguments): starts a worker and makes its object, of class `kind` (MODULE:CLASS)."""


def message(method: str, *arguments: Any) -> list[Buffer]:
    """A call, encoded; the same message can be sent to several workers."""
    return encode((method, arguments))


def call(actor: Actor, method: str, *arguments: Any) -> Future[Any]:
    """Calls a method of a worker."""
    return actor.send(message(method, *arguments))


def ask(actors: Sequence[Actor], messages: Sequence[Sequence[Buffer]], timeout: float) -> list[Any]:
    """Sends each worker its call and waits for all; returns the results in order, lists for generators.

    Raises a death first, else the first exception. A worker that has neither answered nor yielded anything for
    `timeout` seconds is ended.
    """
    heard, parts = [time.monotonic()] * len(actors), [list[Any]() for _ in actors]

    def on_part(number: int, value: Any) -> None:
        heard[number] = time.monotonic()
        parts[number].append(value)

    futures = [
        actor.send(message, partial(on_part, number))
        for number, (actor, message) in enumerate(zip(actors, messages, strict=True))
    ]
    while pending := wait(futures, timeout=POLL).not_done:
        for number, actor in enumerate(actors):
            if not actor.made.done():
                heard[number] = time.monotonic()  # still loading
            if futures[number] in pending and time.monotonic() - heard[number] > timeout:
                actor.kill(f"it has not answered for {timeout:g} s")
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in (*(error for error in errors if isinstance(error, WorkerDied)), *errors):
        raise error
    return [part or future.result() for part, future in zip(parts, futures, strict=True)]


def ask_all(actors: Sequence[Actor], timeout: float, method: str, *arguments: Any) -> list[Any]:
    """`ask` with the same call for all."""
    return ask(actors, [message(method, *arguments)] * len(actors), timeout)
