"""What every learner does alike: the backward pass of one micro-batch, and the learning rate of an update."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch

from posttrain.config import TrainConfig
from posttrain.models.policy import Policy, learner_mode
from posttrain.train.forward import Forward
from posttrain.train.learner import Loss
from posttrain.types import Batch, ResumeError, Stat, TrainingDiverged


def backward(
    policy: Policy, batch: Batch, loss: Loss, forward: Forward, temperature: float, update: int
) -> dict[str, Stat]:
    """Adds the gradient of one micro-batch to the parameters' `grad`; returns the loss and its stats.

    Raises TrainingDiverged on a non-finite loss; `update` is its number (from 1) for the message.
    """
    learner_mode(policy)
    value, stats = checked_loss(forward(policy, batch, temperature), batch, loss, update)
    value.backward()
    return stats


def checked_loss(
    outputs: tuple[torch.Tensor, ...], batch: Batch, loss: Loss, update: int
) -> tuple[torch.Tensor, dict[str, Stat]]:
    """The loss of one micro-batch from its forward pass's outputs, and its stats, among them the loss itself.

    Raises TrainingDiverged if it is not finite; `update` is its number (from 1) for the message.
    """
    value, stats = loss(*outputs, batch)
    if not torch.isfinite(value):
        rows = (~torch.isfinite(outputs[0])).any(1).nonzero().flatten().tolist()
        raise TrainingDiverged(
            f"the loss of update {update} is {value.item()} (rows with non-finite model outputs: "
            f"{rows or 'none'}). The update was not applied; lower train.lr or inspect the step's data."
        )
    return value, {"loss": Stat(value.item(), 1, "sum"), **stats}


def check_norm(norm: torch.Tensor, update: int) -> None:
    """Raises TrainingDiverged if the gradient norm of update number `update` (from 1) is not finite."""
    if not torch.isfinite(norm):
        raise TrainingDiverged(
            f"the gradient norm of update {update} is {norm.item()}. The update was not applied; "
            "lower train.lr or set train.max_grad_norm."
        )


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all values of all tensors are finite."""
    largest = [torch.linalg.vector_norm(t.detach(), math.inf) for t in tensors if t.numel()]  # NaN if any is
    return not largest or bool(torch.isfinite(torch.stack(largest)).all())


def check_weights(all_finite: bool, update: int) -> None:
    """Raises TrainingDiverged if the weights after update number `update` (from 1) are not all finite."""
    if not all_finite:
        raise TrainingDiverged(
            f"the weights are no longer finite after update {update}. They were not saved; lower train.lr, and go on "
            "from the last checkpoint with `posttrain resume`."
        )


def check_names(saved: Collection[str], own: Collection[str]) -> None:
    """Raises ResumeError if a checkpoint's tensors have other names than the learner's."""
    if odd := sorted({*saved} ^ {*own}):
        raise ResumeError(f"the checkpoint does not fit the model: {len(odd)} names differ, first {odd[0]!r}.")


def learning_rate(cfg: TrainConfig, total_steps: int, step: int) -> float:
    """Learning rate of planned update `step` (from 0): linear warm-up, then constant, or decay to 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    if cfg.schedule == "linear":
        return cfg.lr * max(0.0, 1 - done)
    if cfg.schedule == "cosine":
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return cfg.lr
