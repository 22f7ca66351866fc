"""The learner: what turns batches into updates of one policy. The protocol, and the factory every algorithm calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch

from posttrain.config import TrainConfig
from posttrain.models.load import Policy
from posttrain.train.forward import Forward, token_stats
from posttrain.types import Batch, Sample, Stat

Loss = Callable[..., tuple[torch.Tensor, dict[str, Stat]]]
"""loss(*forward(policy, batch, temperature), batch) → (scalar already weighted over the optimizer batch, stats).

With the default `forward` that is loss(logp (B, T), entropy (B, T), batch).
"""


class Learner(Protocol):
    """Owns the optimizer of one policy: `logprobs`, `forward_backward`, `step`, `weights`, `state`/`load`."""

    policy: Policy
    steps: int  # updates applied so far

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Per-token log-probabilities [L] float32 under the current weights, without gradient, in the order given."""
        ...

    def forward_backward(self, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """Adds the gradients of all micro-batches of an update, in their order; stats of each.

        Raises TrainingDiverged on a loss that is not finite; nothing is applied.
        """
        ...

    def step(self, only: str = "") -> dict[str, Stat]:
        """Applies the summed gradient once and clears it; returns its norm and the learning rate used.

        With `only`, parameters whose names do not start with it get no gradient.
        """
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name (views, not copies)."""
        ...

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Everything `load` needs: tensors by file, and small values for JSON."""
        ...

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
        """Restores what `state` returned, bit for bit."""
        ...


def make_learner(
    policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float = 1.0, forward: Forward = token_stats
) -> Learner:
    """The learner that `train.learner` names: a module of posttrain/train/learners with a function `make`.

    `total_steps` are the updates the learning-rate schedule spans, `temperature` the one log-probabilities are taken
    at, and `forward` gives the tensors that the loss reads (train/forward.py).
    """
    module = import_module(f"posttrain.train.learners.{cfg.learner}")
    return module.make(policy, cfg, total_steps, temperature, forward)
