"""Experiment trackers, such as TensorBoard, that receive what is written to a run.

A tracker is a module in posttrain/store/trackers with a function `open(run) -> Tracker`; `run.track` selects it. Each
step is passed on after it is stored, so the run folder stays the record. If a tracker fails, the run stores a warning,
drops the tracker and continues.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Protocol

from posttrain.store.run import EpisodeRow, Event, Run


class Tracker(Protocol):
    """Receives a run's steps. After a resume, the steps since the last checkpoint are sent again, with equal values."""

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        episodes: Sequence[EpisodeRow],
        events: Sequence[Event],
    ) -> None:
        """Receives one step, as stored by `Run.write`."""
        ...

    def close(self) -> None:
        """Flushes and releases everything; called once."""
        ...


@contextmanager
def open_trackers(names: str, run: Run) -> Generator[None]:
    """Within the block, forwards what `run` stores to the trackers in `names`, comma-separated.

    Raises ConfigError if a tracker's package is not installed.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    trackers: dict[str, Tracker] = {
        name: import_module(f"posttrain.store.trackers.{name}").open(run) for name in chosen
    }

    def turn_off(name: str, step: int, error: Exception) -> None:
        del trackers[name]
        text = f"run.track: {name} failed and was turned off ({type(error).__name__}: {error})."
        run.note(step, Event("warning", "tracker", text))

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
            except Exception as error:  # a failing tracker must not end the run
                turn_off(name, step, error)

    run.on_write = forward if trackers else None
    try:
        yield
    finally:
        run.on_write = None
        for name, tracker in list(trackers.items()):
            try:
                tracker.close()
            except Exception as error:  # likewise; the steps are stored
                turn_off(name, run.last_step() or 0, error)
