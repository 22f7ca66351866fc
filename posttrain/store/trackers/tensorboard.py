"""TensorBoard tracker: metrics and timings as scalars, events as text, in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.store import checkpoint
from posttrain.store.run import EpisodeRow, Event, Run
from posttrain.types import ConfigError


class TensorBoard:
    """A `Tracker` that writes to a SummaryWriter. A resumed run continues its curves; replayed steps are replaced."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        episodes: Sequence[EpisodeRow],
        events: Sequence[Event],
    ) -> None:
        for name, value in {**metrics, **timings}.items():
            self.writer.add_scalar(name, value, step)
        for event in events:
            self.writer.add_text(f"events/{event.kind}", event.message, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def open(run: Run) -> TensorBoard:
    """Opens a writer for the run and purges the steps after its newest checkpoint, because they will be replayed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            'run.track = "tensorboard" needs TensorBoard. Install it: pip install "posttrain[tensorboard]".'
        ) from None
    saved = checkpoint.folders(run.folder)
    purge = saved[0][0] + 1 if saved else 0
    return TensorBoard(SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge))
