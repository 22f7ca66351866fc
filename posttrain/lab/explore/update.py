"""Real updates of a copy of the model on one group, with the learner, loss and batches of `posttrain grpo`.

The loss is `posttrain.algos.grpo.make_loss` with its default settings, and the learner takes the optimizer step. The
model itself is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np
import torch

from posttrain.algos.grpo import make_loss
from posttrain.config import GRPOConfig, GRPORecipe, TrainConfig
from posttrain.data import batching
from posttrain.lab.explore.group import COMPARE, Group, Writer, write
from posttrain.objectives.policy import clip, ratio
from posttrain.rollout.collector import with_logp
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.train.learner import Learner, make_learner
from posttrain.types import Sample, stat_values

AGAIN = 64
"""New answers sampled before and after, to measure the effect of an update."""


class MovedTokens(TypedDict):
    """Per token: its probability before and after, the ratio, its part of the objective, and whether it is clipped."""

    before: list[float]
    after: list[float]
    ratio: list[float]
    earned: list[float]
    clipped: list[bool]


class MovedAnswer(TypedDict):
    """Geometric means of an answer's token probabilities before and after; `factor` is the whole answer's ratio."""

    before: float
    after: float
    factor: float
    tokens: MovedTokens


class Effect(TypedDict):
    """The effect of updates: numbers per step, the share of clipped tokens, and `right` of the `asked` new answers."""

    steps: list[dict[str, float]]
    clipped: float
    answers: list[MovedAnswer]
    asked: int
    right: int


def update(
    writer: Writer, group: Group, rewards: Sequence[float], how: str, lr: float, updates: int, low: float, high: float
) -> Effect:
    """Takes `updates` optimizer steps on a group's answers as one batch, and returns their effect."""
    with writer.lock:
        policy = replace(writer.policy, model=copy.deepcopy(writer.policy.model))
        recipe = GRPORecipe(algo=GRPOConfig(clip_low=low, clip_high=high), train=TrainConfig(lr=lr))
        learner = make_learner(policy, recipe.train, updates)
        advantages = COMPARE[how](torch.tensor([rewards], dtype=torch.float64))[0]
        samples = with_logp(training_rows(group, advantages), "old_logp", learner.logprobs)
        steps = [one_step(learner, recipe, samples) for _ in range(updates)]
        new = learner.logprobs(samples)
        after = write(EmbeddedGenerator(policy, AGAIN), group.task, group.prompt, 0, AGAIN, "again")
    answers = [_moved(sample, logp, low, high) for sample, logp in zip(samples, new, strict=True)]
    clipped = sum(sum(answer["tokens"]["clipped"]) for answer in answers)
    return {
        "steps": steps,
        "clipped": clipped / sum(int(sample.loss_mask.sum()) for sample in samples),
        "answers": answers,
        "asked": AGAIN,
        "right": after.right,
    }


def training_rows(group: Group, advantages: torch.Tensor) -> list[Sample]:
    """One row per answer, with its advantage (one of G) at every token the model wrote."""
    rows: list[Sample] = []
    for answer, advantage in zip(group.answers, advantages.tolist(), strict=True):
        tokens = np.concatenate([group.prompt, answer.completion.tokens])
        mask = np.arange(len(tokens)) >= len(group.prompt)
        logp = np.zeros(len(tokens), np.float32)
        logp[mask] = answer.completion.logprobs
        rows.append(Sample(tokens, mask, logp, np.where(mask, np.float32(advantage), np.float32(0))))
    return rows


def one_step(learner: Learner, recipe: GRPORecipe, samples: Sequence[Sample]) -> dict[str, float]:
    """One update as in training. If all advantages are 0, there is no gradient and nothing changes."""
    batches = batching.micro(
        samples,
        recipe.train.micro_batch_tokens,
        recipe.algo.aggregate,
        device=learner.policy.device,
        skip_zero_advantage=True,
    )
    if not batches:
        return {"loss": 0.0, "norm": 0.0, "clipped": 0.0}
    values = stat_values([*learner.forward_backward(batches, make_loss(recipe)), learner.step()])
    return {"loss": values["loss"], "norm": values["grad_norm"], "clipped": values["clipped"]}


def _moved(sample: Sample, logp: np.ndarray, low: float, high: float) -> MovedAnswer:
    """One answer before and after the updates; `logp` [L] are its row's log-probabilities after them."""
    assert sample.old_logp is not None
    own = sample.loss_mask
    old, new, advantages = (torch.from_numpy(row[own]).double() for row in (sample.old_logp, logp, sample.advantages))
    mask = torch.ones(1, len(old), dtype=torch.bool)
    loss, clipped = clip(new[None], old[None], advantages[None], mask, low, high)
    return _answer(old, new, ratio(new[None], old[None], mask)[0], -loss[0], clipped[0])


def _answer(
    old: torch.Tensor, new: torch.Tensor, moved: torch.Tensor, earned: torch.Tensor, clipped: torch.Tensor
) -> MovedAnswer:
    """One answer of L tokens."""
    return {
        "before": old.mean().exp().item(),
        "after": new.mean().exp().item(),
        "factor": (new - old).sum().clamp(-20, 20).exp().item(),
        "tokens": {
            "before": old.exp().tolist(),
            "after": new.exp().tolist(),
            "ratio": moved.tolist(),
            "earned": earned.tolist(),
            "clipped": clipped.tolist(),
        },
    }
