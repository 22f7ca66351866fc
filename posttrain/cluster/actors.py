"""Workers as the driver sees them: start, call, learn that one died. cluster/processes.py and cluster/on_ray.py do it.

A worker has one life: a death is final, and whoever owns it starts another one with the newest state. So no worker
answers from old weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from posttrain.cluster.messages import Buffer, encode

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
    where: str  # process id and machine
    made: Future[Any]  # done when its object exists

    def send(self, message: Sequence[Buffer], on_part: OnPart | None = None) -> Future[Any]:
        """Sends an encoded call. The future raises what the method raised, or WorkerDied."""
        ...

    def kill(self, reason: str) -> None:
        """Ends the worker now; open calls raise WorkerDied with `reason`."""
        ...

    @property
    def alive(self) -> bool: ...


Start = Callable[[str, str, tuple[Any, ...]], Actor]
"""start(name, kind, arguments): starts a worker and makes its object, of class `kind` (MODULE:CLASS)."""


def message(method: str, *arguments: Any) -> list[Buffer]:
    """A call, encoded; the same message can be sent to several workers."""
    return encode((method, arguments))


def call(actor: Actor, method: str, *arguments: Any) -> Future[Any]:
    """Calls a method of a worker."""
    return actor.send(message(method, *arguments))


def call_all(actors: Sequence[Actor], method: str, *arguments: Any) -> list[Any]:
    """Calls a method of several workers with the same arguments and waits for all results, in order."""
    sent = message(method, *arguments)
    return results([actor.send(sent) for actor in actors])


def results(futures: Sequence[Future[Any]]) -> list[Any]:
    """The results of calls. Waits for all of them, then raises a death, else the first exception, if any."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    deaths = [error for error in errors if isinstance(error, WorkerDied)]
    for error in (*deaths, *errors):
        raise error
    return [future.result() for future in futures]
