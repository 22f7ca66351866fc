"""Our side of `bench/parity.py`: computes losses and gradients with the code of `posttrain/algos`.

Every objective is a function (world, settings) → loss that leaves its gradient in the model; the settings are those of
a recipe. Rows go through the packed forward pass used in training, a few rows per pass. Advantages, token weights and
losses are those of `posttrain/algos`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from posttrain.algos import dpo as dpo_algorithm
from posttrain.algos import grpo as grpo_algorithm
from posttrain.algos import reward as reward_algorithm
from posttrain.algos import sft as sft_algorithm
from posttrain.config.dpo import DPOConfig
from posttrain.config.grpo import GRPOConfig, GRPORecipe
from posttrain.config.reward import RewardModelConfig
from posttrain.config.sections import RolloutConfig, TrainConfig
from posttrain.data import batching
from posttrain.models.load import Policy
from posttrain.objectives import advantages as estimators
from posttrain.objectives import policy as policies
from posttrain.objectives import preference
from posttrain.objectives.tokens import token_weights
from posttrain.rollout.collector import to_sample, with_logp
from posttrain.rollout.dynamic_sampling import shaped_rewards
from posttrain.train.forward import row_scores, sample_logprobs, token_stats
from posttrain.train.learners.local import LocalLearner
from posttrain.types import Batch, Episode, Sample, Span

TOKENS_PER_PASS = 96  # two or three rows, so that a batch takes several passes
LONGEST = 64  # Dr. GRPO's constant divisor
Ids = Sequence[int]


@dataclass
class World:
    """Policy (with a scalar head), reference, and the batch as written for the peer."""

    policy: Policy
    reference: Policy
    batch: dict[str, Any]


def sample(prompt: Ids, answer: Ids, **more: Any) -> Sample:
    """A row whose completion is trained (but never a row's first token); `more` are other fields of Sample."""
    zeros = np.zeros(len(prompt) + len(answer), np.float32)
    mask = np.arange(len(zeros)) >= max(1, len(prompt))
    return Sample(np.array([*prompt, *answer]), loss_mask=mask, behaviour_logp=zeros, advantages=zeros, **more)


def whole(rows: Sequence[Sample]) -> Batch:
    """All rows in one pass, with weight 1 for every trained token: for sequence-level losses."""
    return batching.pad(rows, batching.loss_masks(rows).float())


def backward(loss: torch.Tensor) -> float:
    loss.backward()
    return loss.item()


def sft(world: World) -> float:
    """Supervised fine-tuning loss on the chosen completions."""
    rows = [sample(pair["prompt_ids"], pair["chosen_ids"]) for pair in world.batch["pairs"]]
    batches = batching.micro(rows, TOKENS_PER_PASS, "token-mean")
    return sum(backward(sft_algorithm.loss(*token_stats(world.policy, b, 1.0), b)[0]) for b in batches)


def reward(world: World, **algo: Any) -> float:
    """Reward model loss; `algo` are settings of `posttrain reward`."""
    pairs = [
        (sample(p["prompt_ids"], p["chosen_ids"], margin=p["margin"]), sample(p["prompt_ids"], p["rejected_ids"]))
        for p in world.batch["pairs"]
    ]
    total = 0.0
    loss = reward_algorithm.make_loss(RewardModelConfig(**algo), torch.full((len(pairs), 1), 1 / len(pairs)))
    for batch in reward_algorithm.pair_batches(pairs, TOKENS_PER_PASS, world.policy.device):
        total += backward(loss(*row_scores(world.policy, batch), batch)[0])
    return total


def dpo(world: World, data: str = "pairs", swap: bool = False, **algo: Any) -> float:
    """Losses of DPO and its variants; `algo` are settings of `posttrain dpo`. `swap` swaps policy and reference."""
    cfg = DPOConfig(**algo)
    policy, reference = (world.reference, world.policy) if swap else (world.policy, world.reference)
    items, others = world.batch["judgements" if cfg.loss == "kto" else data], []
    if cfg.loss == "kto":
        rows = [sample(a["prompt_ids"], a["completion_ids"], label=float(a["label"])) for a in items]
        others = [sample(a["prompt_ids"], a["KL_completion_ids"]) for a in items]
    else:
        rows = [sample(p["prompt_ids"], p[f"{side}_ids"]) for p in items for side in ("chosen", "rejected")]
    if cfg.referenced:
        known = partial(sample_logprobs, reference, micro_batch_tokens=TOKENS_PER_PASS)
        rows, others = (with_logp(part, "ref_logp", known) for part in (rows, others))
    part = dpo_algorithm.Feedback(rows, 1 if others else 2, others)
    learner = LocalLearner(policy, TrainConfig(micro_batch_tokens=TOKENS_PER_PASS), 1)
    loss = dpo_algorithm.make_loss(cfg, cfg.beta, dpo_algorithm.mismatch_kl(learner, part, cfg))
    batches = batching.micro(part.rows, TOKENS_PER_PASS, "seq-mean-token-sum", together=part.together)
    return sum(backward(loss(*token_stats(policy, b, 1.0), b)[0]) for b in batches)


def with_cross_entropy(world: World, loss: str, mean: bool, prompts: bool) -> float:
    """A reference-free loss at β = 0.1 plus the mean cross-entropy over all chosen tokens of the batch.

    With `prompts` it also covers the prompt tokens. These are TRL's choices for CPO and ORPO.
    """
    pairs = world.batch["pairs"]
    chosen, rejected = ([sample(p["prompt_ids"], p[f"{side}_ids"]) for p in pairs] for side in ("chosen", "rejected"))
    batch = whole([*chosen, *rejected])
    c, r = preference.sequence_logp(token_stats(world.policy, batch, 1.0)[0], batch.mask, mean).chunk(2)
    none = torch.zeros_like(c)
    values = preference.PAIR_LOSSES[loss](c, r, none, none, 0.1, none + 1, none)
    if prompts:
        chosen = [replace(row, loss_mask=np.arange(len(row.tokens)) > 0) for row in chosen]
    text = whole(chosen)
    weights = token_weights(text.mask, "token-mean")
    return backward(values.mean() - (weights * token_stats(world.policy, text, 1.0)[0]).sum())


def episode(attempt: dict[str, Any], number: int, size: int, tools: bool) -> Episode:
    """An episode as the collector would record it; with `tools`, tokens outside `tool_mask` come from a tool."""
    ids, logp = np.array(attempt["completion_ids"]), np.array(attempt["sampler_logp"], np.float32)
    mine = np.array(attempt["tool_mask"] if tools else np.ones_like(ids)).astype(bool)
    edges = [0, *(np.flatnonzero(np.diff(mine)) + 1).tolist(), len(ids)]
    spans = [Span("prompt", np.array(attempt["prompt_ids"]))]
    for start, end in zip(edges, edges[1:], strict=False):
        own = bool(mine[start])
        spans.append(Span("model" if own else "env", ids[start:end], logp[start:end] if own else None))
    return Episode(
        task_id=str(number // size),
        group=number // size,
        index=number % size,
        spans=tuple(spans),
        text="",
        reward=attempt["reward"],
        stop="length" if attempt["cut"] else "stop",
    )


def grpo(
    world: World, data: str = "attempts", off_policy: bool = True, tools: bool = False, updates: int = 1, **algo: Any
) -> float:
    """GRPO loss, from rewards to gradient; `algo` are settings of `posttrain grpo`.

    `off_policy` uses the batch's log-probabilities as those of the older policy. With several `updates` per rollout,
    the loss is that of the first update.
    """
    size = world.batch["group_size"]
    cfg = GRPOConfig(prompts=len(world.batch[data]) // size, group_size=size, **algo)
    recipe = GRPORecipe(algo=cfg, rollout=RolloutConfig(max_tokens=LONGEST))
    learner = LocalLearner(world.policy, TrainConfig(micro_batch_tokens=TOKENS_PER_PASS), 1)
    episodes = [episode(a, i, size, tools) for i, a in enumerate(world.batch[data])]
    groups = [episodes[i : i + size] for i in range(0, len(episodes), size)]
    samples = [to_sample(e, 0.0) for e in episodes]
    if off_policy:
        old = [np.array([*np.zeros(len(a["prompt_ids"])), *a["old_logp"]], np.float32) for a in world.batch[data]]
        samples = [replace(s, old_logp=row) for s, row in zip(samples, old, strict=True)]
    if cfg.kl_coef:
        samples = with_logp(samples, "ref_logp", lambda rows: sample_logprobs(world.reference, rows, TOKENS_PER_PASS))
    rewards = shaped_rewards(recipe, groups)
    samples, _, _ = grpo_algorithm.credit(cfg, samples, rewards, None, learner)
    each = torch.arange(len(samples))
    samples = grpo_algorithm.trained(cfg, samples, groups, [True] * len(groups), each)
    batches = batching.micro(samples[: len(samples) // updates], TOKENS_PER_PASS, cfg.aggregate, LONGEST)
    loss = grpo_algorithm.make_loss(recipe)
    world.policy.model.train()
    return sum(backward(loss(*token_stats(world.policy, b, 1.0), b)[0]) for b in batches)


def rloo_of_answers(world: World, kl_coef: float = 0.0, whiten: bool = False) -> float:
    """Off-policy RLOO with one clipped ratio per completion, built from the same pure functions; no recipe uses it."""
    attempts = world.batch["attempts"]
    rows = [sample(a["prompt_ids"], a["completion_ids"]) for a in attempts]
    score = torch.tensor([a["reward"] for a in attempts]).view(-1, world.batch["group_size"])
    if kl_coef:
        pairs = zip(*(sample_logprobs(p, rows, TOKENS_PER_PASS) for p in (world.policy, world.reference)), strict=True)
        score = score - kl_coef * torch.tensor([float((own - ref).sum()) for own, ref in pairs]).view_as(score)
    scaled = estimators.leave_one_out(score)
    advantages = (estimators.batch_relative(scaled, eps=1e-4) if whiten else scaled).view(-1, 1)
    old = torch.tensor([sum(a["old_logp"]) for a in attempts]).unsqueeze(1)
    batch = whole(rows)
    logp = preference.sequence_logp(token_stats(world.policy, batch, 1.0)[0], batch.mask).unsqueeze(1)
    loss, _ = policies.clip(logp, old, advantages, torch.ones_like(logp, dtype=torch.bool), 0.2, 0.2)
    return backward(loss.mean())
