"""Goes on after a learner has died: all workers start anew and the run continues from its newest checkpoint.

Every step is a function of the checkpoint and the seed, so what is computed again has the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from posttrain.cluster.actors import WorkerDied
from posttrain.cluster.launch import Cluster
from posttrain.store import checkpoint
from posttrain.store.run import Event, Run
from posttrain.types import RolloutError

T = TypeVar("T")


def supervised(store: Run, cluster: Cluster, attempt: Callable[[bool], T]) -> T:
    """The result of `attempt(again)`, which is called again after a learner died, until that has happened more than
    `cluster.max_restarts` times at the same checkpoint. Raises RolloutError then."""
    deaths: Counter[int] = Counter()
    while True:
        try:
            return attempt(bool(deaths))
        except WorkerDied as died:
            saved = checkpoint.latest(store.folder)
            step = saved.step if saved else 0
            deaths[step] += 1
            if deaths[step] > cluster.cfg.max_restarts:
                raise RolloutError(
                    f"{died}. Learners died {deaths[step]} times after step {step} (cluster.max_restarts="
                    f"{cluster.cfg.max_restarts}). Check their memory, then resume.",
                    boundary="cluster",
                ) from None
            store.note(step, Event("warning", "cluster", f"{died}. All learners start anew from step {step}."))
            cluster.restart()
