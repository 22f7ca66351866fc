"""Who works for a run: `cluster.json` in the run folder, for `posttrain cluster status`; no digest includes it.

A thread writes the file when a worker has started or ended, and every few seconds while they work.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.cluster.actors import Actor
from posttrain.store.durable import publish_file
from posttrain.store.workers import FILE, RUN_ENDED, STARTED_ANEW
from posttrain.types import Json

LOOK, WRITE = 0.2, 5.0  # seconds between two looks at the workers, and between two writes of what they have done


@dataclass
class Record:
    """The workers of a run's process, in the order in which they were started."""

    backend: str
    workers: list[tuple[str, Actor, float]] = field(default_factory=list[tuple[str, Actor, float]])
    _ready: dict[str, float] = field(default_factory=dict[str, float])  # name → when its object existed
    _ended: dict[str, float] = field(default_factory=dict[str, float])  # name → when its end was seen
    _folder: Path | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def add(self, role: str, actor: Actor) -> None:
        """Adds a worker that has just been started."""
        self._states()  # the one that it replaces has ended before
        self.workers.append((role, actor, time.time()))
        actor.made.add_done_callback(lambda made: made.exception() or self._ready.setdefault(actor.name, time.time()))
        self._begin()

    def write_to(self, folder: Path) -> None:
        """Writes the record to a run folder from now on."""
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        """Starts to write, once there are a folder and a worker."""
        if self._thread is None and self.workers and self._folder is not None:
            self._write()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Writes the last state."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._write()

    def _watch(self) -> None:
        """Writes when the state of a worker has changed, and what they have done from time to time."""
        seen, written = self._states(), time.monotonic()
        while not self._stop.wait(LOOK):
            if (now := self._states()) != seen or time.monotonic() - written > WRITE:
                seen, written = now, time.monotonic()
                self._write()

    def _states(self) -> list[tuple[str, str]]:
        """(state, process and machine) of each worker."""
        actors = [actor for _, actor, _ in self.workers]
        for actor in actors:
            if not actor.alive:
                self._ended.setdefault(actor.name, time.time())
        return [(_state(actor), actor.where) for actor in actors]

    def _write(self) -> None:
        self._states()
        if self._folder is not None:
            with suppress(OSError):  # a full disk stops the run when it saves, with a message of its own
                publish_file(self._folder / FILE, json.dumps(self.as_dict(), indent=1) + "\n")

    def as_dict(self) -> Json:
        """The record, as in the file; times are seconds since 1970."""
        rows: list[Json] = [
            {
                "name": actor.name,
                "role": role,
                "where": actor.where,
                "state": _state(actor),
                "reason": actor.reason,
                "done": actor.calls if role == "judge" else actor.parts,
                "started": started,
                "ready": self._ready.get(actor.name),
                "ended": self._ended.get(actor.name),
            }
            for role, actor, started in list(self.workers)
        ]
        driver = {"pid": os.getpid(), "machine": platform.node()}
        return {"backend": self.backend, "driver": driver, "workers": rows}


def _state(actor: Actor) -> str:
    """`starting`, `alive`, `dead`, or `ended` if the run ended it itself."""
    if actor.alive:
        return "alive" if actor.made.done() else "starting"
    return "ended" if actor.reason in (RUN_ENDED, STARTED_ANEW) else "dead"
