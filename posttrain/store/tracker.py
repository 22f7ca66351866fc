"""Trackers: other tools that receive what is written to a run, such as TensorBoard.

A tracker is one file in posttrain/store/trackers with a function `open(run) -> Tracker`; `run.track` names it. It gets
each step after the step is stored, so the run folder stays the record. If a tracker fails, the run notes it, drops the
tracker and continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Protocol

from posttrain.store.run import EpisodeRow, Event, Run


class Tracker(Protocol):
    """Receives a run's steps. After a resume, steps since the last checkpoint come again, with equal values."""

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        episodes: Sequence[EpisodeRow],
        events: Sequence[Event],
    ) -> None:
        """One step, as `Run.write` stored it."""
        ...

    def close(self) -> None:
        """Flushes and releases everything; called once."""
        ...


@contextmanager
def open_trackers(names: str, run: Run) -> Iterator[None]:
    """Within the block, what `run` stores also goes to the trackers of `names`, comma separated.

    Raises ConfigError where a tracker's package is not installed.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    trackers: dict[str, Tracker] = {
        name: import_module(f"posttrain.store.trackers.{name}").open(run) for name in chosen
    }

    def forward(
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        episodes: Sequence[EpisodeRow],
        events: Sequence[Event],
    ) -> None:
        for name, tracker in list(trackers.items()):
            try:
                tracker.write(step, metrics, timings, episodes, events)
            except Exception as error:  # another tool's fault must not end the run
                del trackers[name]
                text = f"run.track: {name} failed and gets no more steps ({type(error).__name__}: {error})."
                run.note(step, Event("warning", "tracker", text))

    run.on_write = forward if trackers else None
    try:
        yield
    finally:
        run.on_write = None
        for tracker in trackers.values():
            tracker.close()
