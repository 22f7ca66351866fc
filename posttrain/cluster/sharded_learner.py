"""The sharded learner as the driver sees it: every rank gets every call (cluster/sharded.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from posttrain import rng
from posttrain.cluster.actors import Actor, ask, message
from posttrain.cluster.learner import OnRanks, check_size
from posttrain.config import TrainConfig
from posttrain.models.load import Policy
from posttrain.train.forward import Forward
from posttrain.train.learner import Loss
from posttrain.types import Batch, Json, Sample, Stat


class RemoteShards(OnRanks):
    """`Learner` on ranks that hold a model together; equal to one process to rounding.

    The stats of the first update have `shard_difference`, the relative norm of the difference between the ranks'
    gradient and that of rank 0 alone.
    """

    def __init__(
        self,
        ranks: Sequence[Actor],
        timeout: float,
        key: str,
        policy: Policy,
        cfg: TrainConfig,
        total_steps: int,
        temperature: float,
        forward: Forward,
    ) -> None:
        super().__init__(ranks, timeout, key, policy)
        self._compared = False
        self._all("shard", policy, cfg, total_steps, temperature, forward)

    def outputs(self, samples: Sequence[Sample], forward: Forward) -> list[np.ndarray]:
        """See `Learner.outputs`."""
        return self._together("outputs", list(samples), forward)[0] if samples else []

    def forward_backward(self, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """See `Learner.forward_backward`."""
        if not batches:
            return []
        check_size(loss)
        drawn = int(torch.randint(1 << 62, ()))
        more: dict[str, Stat] = {}
        if not (self._compared or self.steps):
            self._compared = True
            asked = [
                message("difference", self.key, drawn, None if rank else self.policy, batches, loss)
                for rank in range(len(self.ranks))
            ]
            more = {"shard_difference": Stat(ask(self.ranks, asked, self.timeout)[0], 1, "max")}
        stats = self._all("seeded", drawn, batches, loss)[0]
        rng.seed_global("after", drawn)
        stats[0] |= more
        return stats

    def _fetched(self) -> dict[str, torch.Tensor]:
        return self._all("gathered")[0]

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
        """See `Learner.state`."""
        return self._together("state")[0]
