"""Sampled training data, saved in the run folder so that a resumed run trains on the same data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from posttrain.store import durable

T = TypeVar("T")


def read(folder: Path, names: tuple[str, str], read_one: Callable[[Path], list[T]]) -> tuple[list[T], list[T]] | None:
    """(training, held-out) data from the files `names`, or None if no started run has saved any."""
    train, test = (folder / name for name in names)
    if not ((folder / "run.json").exists() and train.exists()):
        return None
    return read_one(train), read_one(test) if test.exists() else []


def keep(
    folder: Path, names: tuple[str, str], train: list[T], test: list[T], write: Callable[[Path, Sequence[T]], None]
) -> None:
    """Writes both files atomically; the training file comes last, because `read` takes it as the sign of completion."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[1]).unlink(missing_ok=True)
    for name, items in ((names[1], test), (names[0], train)):
        if items:
            temporary = folder / f".tmp-{name}-{os.getpid()}"
            write(temporary, items)
            durable.sync_file(temporary)
            durable.rename(temporary, folder / name)
