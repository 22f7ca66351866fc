"""Training algorithms, one file each, with loss and training loop together; online-dpo is online_dpo.py.

Each file has `prepare(setup) -> Job`, which checks everything before step 0, and `run`, the training loop. The recipe's
`facts()` (config/) declare which models a run loads, what it samples and which passes it computes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from posttrain.train.job import Job, Setup


class Algorithm(Protocol):
    """The module of an algorithm."""

    def prepare(self, setup: Setup[Any]) -> Job:
        """Checks everything a run needs and returns a job that is ready to start."""
        ...


def load(name: str) -> Algorithm:
    """Imports the module of an algorithm; `name` is a key of `config.RECIPES`."""
    return cast(Algorithm, import_module(f"posttrain.algos.{name.replace('-', '_')}"))
