"""The learner protocol (forward, backward and optimizer steps of one policy) and its factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Protocol

import numpy as np
import torch

from posttrain.config import TrainConfig
from posttrain.models.load import Policy
from posttrain.train.forward import Forward, token_stats
from posttrain.types import Batch, Json, JsonView, Sample, Stat

Loss = Callable[..., tuple[torch.Tensor, dict[str, Stat]]]
"""loss(*forward(policy, batch, temperature), batch) → (scalar weighted over the optimizer batch, stats).

With the default `forward`: loss(logp (B, T), entropy (B, T), batch).
"""


class Learner(Protocol):
    """Owns the optimizer of one policy: `logprobs`, `forward_backward`, `step`, `weights`, `state`/`load`."""

    policy: Policy
    steps: int  # updates applied so far

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Per-token log-probabilities [L] float32 under the current weights, without gradient, in input order."""
        ...

    def outputs(self, samples: Sequence[Sample], forward: Forward) -> list[np.ndarray]:
        """The first output of `forward` for each row under the current weights, without gradient, in input order."""
        ...

    def forward_backward(self, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """Accumulates the gradients of an update's micro-batches, in order; returns the stats of each.

        Raises TrainingDiverged on a non-finite loss, before any update is applied.
        """
        ...

    def step(self, only: str = "", update: int | None = None) -> dict[str, Stat]:
        """Takes one optimizer step and clears the gradient; returns its norm and the learning rate.

        With `only`, the gradient of parameters whose names do not start with it is zero. `update` is the number of the
        planned update (from 0), which the learning rate follows where some are left out; None: that of updates applied.
        """
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainable tensors by name: those of `policy` (views, not copies)."""
        ...

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Sets trainable tensors to other values, as when a head is rescaled; the optimizer's state stays."""
        ...

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
        """The state for `load`: tensors by file, and small JSON values."""
        ...

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: JsonView) -> None:
        """Restores the state that `state` returned, bit-exact."""
        ...


MakeLearner = Callable[[Policy, TrainConfig, int, float, Forward], Learner]
"""Makes a learner as `make_learner` does, from the same arguments."""


def make_learner(
    policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float = 1.0, forward: Forward = token_stats
) -> Learner:
    """Makes the learner named by `train.learner`: a module of posttrain/train/learners with a function `make`.

    `total_steps` is the length of the learning-rate schedule in updates, `temperature` that of the log-probabilities,
    and `forward` computes the inputs of the loss (train/forward.py).
    """
    module = import_module(f"posttrain.train.learners.{cfg.learner}")
    return module.make(policy, cfg, total_steps, temperature, forward)
