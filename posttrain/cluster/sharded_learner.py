"""The sharded learner as the driver sees it: every rank gets every call (cluster/sharded.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.cluster.actors import Actor, ask, ask_all, message
from posttrain.cluster.learner import check_size
from posttrain.config import TrainConfig
from posttrain.models.load import Policy, trainable
from posttrain.train.forward import Forward, per_token, token_stats
from posttrain.train.learner import Loss
from posttrain.types import Batch, Json, JsonView, Sample, Stat


class RemoteShards:
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
        self.ranks, self.timeout, self.key, self.policy = ranks, timeout, key, policy
        self.steps, self._fresh, self._compared = 0, True, False
        self._all("shard", policy, cfg, total_steps, temperature, forward)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every rank."""
        return ask_all(self.ranks, self.timeout, method, self.key, *arguments)

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See `Learner.logprobs`."""
        return per_token(samples, lambda rows: self.outputs(rows, token_stats))

    def outputs(self, samples: Sequence[Sample], forward: Forward) -> list[np.ndarray]:
        """See `Learner.outputs`."""
        return self._all("sharded", "outputs", list(samples), forward)[0] if samples else []

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

    def step(self, only: str = "", update: int | None = None) -> dict[str, Stat]:
        """See `Learner.step`."""
        self.steps, self._fresh = self.steps + 1, False
        return self._all("sharded", "step", only, update)[0]

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Learner.weights`; gathers them from the ranks if they have changed."""
        own = trainable(self.policy)
        if not self._fresh:
            with torch.no_grad():
                for name, tensor in self._all("gathered")[0].items():
                    own[name].copy_(tensor)
            self._fresh = True
        return {name: parameter.detach() for name, parameter in own.items()}

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Learner.assign`."""
        self._all("sharded", "assign", dict(tensors))
        self._fresh = False

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
        """See `Learner.state`."""
        return self._all("sharded", "state")[0]

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: JsonView) -> None:
        """See `Learner.load`."""
        kept = {group: dict(tensors[group]) for group in ("model", "optim")}
        self._all("sharded", "load", kept, dict(state))
        self.steps, self._fresh = int(state["steps"]), False
