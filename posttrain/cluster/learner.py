"""The learner as the driver sees it: plans the passes and deals them to ranks.

Passes are planned over all rows first and dealt afterwards, so what a pass computes does not depend on the number of
ranks. No collective is begun before every rank has computed its part, so a failed pass leaves no rank waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from posttrain import rng
from posttrain.cluster.actors import Actor, ask, ask_all, message
from posttrain.cluster.messages import encode
from posttrain.config import TrainConfig
from posttrain.models.load import Policy, trainable
from posttrain.train import lanes
from posttrain.train.forward import Forward, per_token, planned, token_stats
from posttrain.train.lane_learner import MOMENTS, named_state
from posttrain.train.learner import Loss
from posttrain.train.ranks import shares
from posttrain.types import Batch, ConfigError, Json, JsonView, Sample, Stat

LARGEST_LOSS = 1 << 20  # bytes; a loss is sent with every call, so it must not hold a model


def check_size(loss: Loss) -> None:
    """Raises ConfigError if a loss holds a model, or is too large to be sent with every call."""
    modules: list[nn.Module] = []
    size = sum(memoryview(part).nbytes for part in encode(loss, modules.append))
    if modules or size > LARGEST_LOSS:
        what = f"a model ({type(modules[0]).__name__})" if modules else f"{size / 1e6:.1f} MB"
        raise ConfigError(
            f"the loss holds {what}, which would be sent to every learner at every update (at most "
            f"{LARGEST_LOSS / 1e6:.0f} MB). Let it hold numbers, not a model or a large tensor."
        )


class OnRanks:
    """What learners on ranks have in common. `policy` is the driver's copy, as of the latest call of `weights`."""

    def __init__(self, ranks: Sequence[Actor], timeout: float, key: str, policy: Policy) -> None:
        self.ranks, self.timeout, self.key, self.policy = ranks, timeout, key, policy
        self.steps = 0
        self._fresh = True  # whether the driver's policy has the ranks' weights

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every rank."""
        return ask_all(self.ranks, self.timeout, method, self.key, *arguments)

    def _together(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every rank's learner, in which all take part."""
        return self._all("together", method, *arguments)

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See `Learner.logprobs`."""
        return per_token(samples, lambda rows: self.outputs(rows, token_stats))

    def outputs(self, samples: Sequence[Sample], forward: Forward) -> list[np.ndarray]:
        """See `Learner.outputs`."""
        raise NotImplementedError

    def step(self, only: str = "", update: int | None = None) -> dict[str, Stat]:
        """See `Learner.step`."""
        stats = self._together("step", only, update)[0]
        self.steps, self._fresh = self.steps + 1, False
        return stats

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Learner.weights`; fetches them from the ranks if they have changed."""
        own = trainable(self.policy)
        if not self._fresh:
            with torch.no_grad():
                for name, tensor in self._fetched().items():
                    own[name].copy_(tensor)
            self._fresh = True
        return {name: parameter.detach() for name, parameter in own.items()}

    def _fetched(self) -> dict[str, torch.Tensor]:
        """The ranks' trainable tensors, whole."""
        raise NotImplementedError

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Learner.assign`."""
        self._together("assign", dict(tensors))
        self._fresh = False

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: JsonView) -> None:
        """See `Learner.load`."""
        kept = {group: dict(tensors[group]) for group in ("model", "optim")}
        self._together("load", kept, dict(state))
        self.steps, self._fresh = int(state["steps"]), False


class RemoteLearner(OnRanks):
    """`Learner` on ranks that have the whole model each, and a share of the optimizer."""

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
        self.cfg = cfg
        self.layout = lanes.Layout({name: p.shape for name, p in trainable(policy).items()}, cfg.lanes)
        self._all("open", policy, cfg, total_steps, temperature, forward)

    def outputs(self, samples: Sequence[Sample], forward: Forward) -> list[np.ndarray]:
        """See `Learner.outputs`."""
        plan, count = planned(samples, self.cfg.micro_batch_tokens), len(self.ranks)
        dealt = [[[samples[i] for i in part] for part in plan[rank::count]] for rank in range(count)]
        busy = [rank for rank, passes in zip(self.ranks, dealt, strict=True) if passes]
        asked = [message("outputs", self.key, passes, forward) for passes in dealt if passes]
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples)
        for first, computed in enumerate(ask(busy, asked, self.timeout)):
            for part, rows in zip(plan[first::count], computed, strict=True):
                for i, row in zip(part, rows, strict=True):
                    out[i] = row
        return out

    def forward_backward(self, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """See `Learner.forward_backward`."""
        if not batches:
            return []
        check_size(loss)
        drawn, own = int(torch.randint(1 << 62, ())), self.cfg.lanes // len(self.ranks)
        order = lanes.order(len(batches), self.cfg.lanes)
        asked = [
            message(
                "accumulate",
                self.key,
                {number: batches[number] for lane in order[r * own : (r + 1) * own] for number in lane},
                len(batches),
                loss,
                drawn,
            )
            for r in range(len(self.ranks))
        ]
        stats = dict(one for part in ask(self.ranks, asked, self.timeout) for one in part or ())
        self._together("reduce")
        rng.seed_global("after", drawn)
        return [stats[number] for number in range(len(batches))]

    def _fetched(self) -> dict[str, torch.Tensor]:
        (tensors,) = ask_all(self.ranks[:1], self.timeout, "weights", self.key)  # every rank has them
        return tensors

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
        """See `Learner.state`: the same tensors and names for any number of ranks."""
        vectors = {name: torch.zeros(self.layout.size) for name in ("model", *MOMENTS)}
        for number, rank in enumerate(self.ranks):  # one after the other: the driver holds one share at a time
            for name, parts in ask_all([rank], self.timeout, "kept", self.key)[0].items():
                for (start, end), part in zip(shares(self.layout, number, len(self.ranks)), parts, strict=True):
                    vectors[name][start:end] = part
        return named_state(self.layout, vectors, self.steps)
