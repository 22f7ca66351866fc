"""One algorithm, one file, named like the algorithm (online-dpo: online_dpo.py): its loss in sight of its loop.

Each has `prepare(setup) -> Job`, which refuses before step 0 whatever cannot work, and `run`, its loop. What a run
holds, samples and computes is declared by its recipe's `facts()` (config/).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from posttrain.train.job import Job, Setup


class Algorithm(Protocol):
    """The file of an algorithm."""

    def prepare(self, setup: Setup[Any]) -> Job:
        """Checks everything that a run needs and returns it ready to start."""
        ...


def load(name: str) -> Algorithm:
    """The file of the algorithm of that name, a key of `config.RECIPES`."""
    return import_module(f"posttrain.algos.{name.replace('-', '_')}")
