"""One life of a pipeline in a process of its own, which ends itself at a moment of its work."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.cli import main as cli
from posttrain.cli import pipeline
from posttrain.models.kernels.build import library
from posttrain.store import durable
from posttrain.store.run import Run

library()  # compiled once, by the process that all lives are forked from
assert pipeline  # the imports are the expensive part


def live(place: str, words: list[str], moment: str, number: int) -> None:
    """`posttrain pipeline` with some words, in folder `place`; signal `number` comes at `moment`, if there is one.

    A moment is `NAME:COUNT`: before the COUNTth time that a file NAME is published, a step stored (`write`), or a run
    finished (`finish`).
    """
    # as in a terminal; what a shell runs in the background is told to ignore Ctrl-C, and hands that down
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(place)
    os.environ["POSTTRAIN_CACHE"] = str(Path(place, "cache"))
    torch.set_num_threads(1)
    passed: Counter[str] = Counter()

    def before(function: Callable[..., Any], named: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            passed[named(*args)] += 1
            if f"{named(*args)}:{passed[named(*args)]}" == moment:
                os.kill(os.getpid(), number)
            return function(*args)

        return call

    durable.publish_file = before(durable.publish_file, lambda path, text: path.name)
    Run.write = before(Run.write, lambda *_: "write")
    Run.finish = before(Run.finish, lambda *_: "finish")
    with Path("said").open("w", encoding="utf-8") as said:
        sys.stdout = sys.stderr = said
        cli.main(["pipeline", *words])
