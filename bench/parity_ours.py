"""Our half of `bench/parity.py`: the same weights and batch through this package's own batching, forward and losses.

Every objective is a function (world, …settings) → a loss whose gradient it leaves in the model. Rows go through the
packed forward pass that trains, in passes of a few rows each, and token weights come from the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from posttrain.data import batching
from posttrain.models.load import Policy
from posttrain.objectives import advantages as estimators
from posttrain.objectives import policy as policies
from posttrain.objectives import preference
from posttrain.objectives import reward as rewards
from posttrain.objectives.tokens import kl, token_weights
from posttrain.train.forward import logprobs, row_scores, sample_logprobs, token_stats
from posttrain.types import Batch, Sample

TOKENS_PER_PASS = 96  # two or three rows, so that a batch is several passes
LONGEST = 64  # what Dr. GRPO divides by
Ids = Sequence[int]


@dataclass
class World:
    """The policy (with a scalar head), the reference, and the batch as it was written for the peer."""

    policy: Policy
    reference: Policy
    batch: dict[str, Any]


def sample(prompt: Ids, answer: Ids, **more: Any) -> Sample:
    """A row of which the answer is trained (but never a row's first token); `more` are Sample's other fields."""
    zeros = np.zeros(len(prompt) + len(answer), np.float32)
    mask = np.arange(len(zeros)) >= max(1, len(prompt))
    more = {"behaviour_logp": zeros, "advantages": zeros, **more}
    return Sample(np.array([*prompt, *answer]), loss_mask=mask, **more)


def whole(rows: Sequence[Sample]) -> Batch:
    """All rows in one pass, every trained token with weight 1: for losses of whole rows."""
    return batching.pad(rows, batching.loss_masks(rows).float())


def backward(loss: torch.Tensor) -> float:
    loss.backward()
    return loss.item()


def sft(world: World) -> float:
    """Mean cross-entropy of the chosen answers' tokens."""
    rows = [sample(pair["prompt_ids"], pair["chosen_ids"]) for pair in world.batch["pairs"]]
    total = 0.0
    for batch in batching.micro(rows, TOKENS_PER_PASS, "token-mean"):
        logp, _ = token_stats(world.policy, batch, 1.0)
        total += backward((batch.weights * -logp).sum())
    return total


def reward(world: World, margin: bool = False, centring: float = 0.0) -> float:
    """Bradley–Terry on the scalar head's scores, averaged over pairs."""
    pairs = world.batch["pairs"]
    rows = [sample(p["prompt_ids"], p[f"{side}_ids"]) for side in ("chosen", "rejected") for p in pairs]
    chosen, rejected = row_scores(world.policy, whole(rows))[0][:, 0].chunk(2)
    margins = torch.tensor([p["margin"] if margin else 0.0 for p in pairs])
    loss = rewards.bradley_terry(chosen, rejected, torch.ones(len(pairs)), margins)
    return backward((loss + centring * rewards.centring(chosen, rejected)).mean())


def pair(
    world: World,
    loss: str,
    beta: float,
    label: float = 1.0,
    margin: float = 0.0,
    data: str = "pairs",
    mean: bool = False,
    reference: bool = True,
    nll: str = "none",
) -> float:
    """A pair loss averaged over pairs. `mean` takes log-probabilities per token; without `reference` those of the
    reference are 0; `nll` adds the cross-entropy of "answer" (the chosen answers' tokens) or "all" (prompts too)."""
    pairs = world.batch[data]
    chosen = [sample(p["prompt_ids"], p["chosen_ids"]) for p in pairs]
    rejected = [sample(p["prompt_ids"], p["rejected_ids"]) for p in pairs]
    batch = whole([*chosen, *rejected])
    per_token = token_stats(world.policy, batch, 1.0)[0]
    c, r = preference.sequence_logp(per_token, batch.mask, mean).chunk(2)
    known = preference.sequence_logp(logprobs(world.reference, batch), batch.mask, mean)
    rc, rr = (known if reference else torch.zeros_like(known)).chunk(2)
    n = len(pairs)
    values = preference.PAIR_LOSSES[loss](c, r, rc, rr, beta, torch.full((n,), label), torch.full((n,), margin))
    total = values.mean()
    if nll != "none":
        if nll == "all":
            chosen = [replace(row, loss_mask=np.arange(len(row.tokens)) > 0) for row in chosen]
        text = whole(chosen)
        weights = token_weights(text.mask, "token-mean")
        total = total - (weights * token_stats(world.policy, text, 1.0)[0]).sum()
    return backward(total)


def kto(world: World, beta: float, desirable: float, undesirable: float, swap: bool = False) -> float:
    """KTO averaged over answers; `swap` makes the reference the policy, and its gradient is the one that counts."""
    policy, reference = (world.reference, world.policy) if swap else (world.policy, world.reference)
    answers = world.batch["judgements"]
    own = whole([sample(a["prompt_ids"], a["completion_ids"]) for a in answers])
    other = whole([sample(a["prompt_ids"], a["KL_completion_ids"]) for a in answers])

    def rows(logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        return preference.sequence_logp(logp, batch.mask)

    baseline = preference.kto_baseline(rows(logprobs(policy, other), other), rows(logprobs(reference, other), other))
    logp = rows(token_stats(policy, own, 1.0)[0], own)
    ref_logp = rows(logprobs(reference, own), own)
    liked = torch.tensor([a["label"] for a in answers])
    return backward(preference.kto(logp, ref_logp, liked, baseline, beta, desirable, undesirable).mean())


def attempts(world: World, data: str, tools: bool, off_policy: bool) -> list[Sample]:
    """The attempts as samples, without advantages; `tools` takes the tool's tokens out of the loss."""
    rows = []
    for a in world.batch[data]:
        prompt, answer = a["prompt_ids"], a["completion_ids"]
        gap = np.zeros(len(prompt), np.float32)
        row = sample(prompt, answer, behaviour_logp=np.append(gap, a["sampler_logp"]).astype(np.float32))
        if tools:
            row = replace(row, loss_mask=row.loss_mask & np.append(gap, a["tool_mask"]).astype(bool))
        rows.append(replace(row, old_logp=np.append(gap, a["old_logp"]).astype(np.float32)) if off_policy else row)
    return rows


def with_advantages(world: World, rows: Sequence[Sample], per_row: torch.Tensor, ref: bool) -> list[Sample]:
    """Spreads one advantage per row over its tokens, and adds the log-probabilities that are not there yet."""
    own = sample_logprobs(world.policy, rows, TOKENS_PER_PASS)
    base = sample_logprobs(world.reference, rows, TOKENS_PER_PASS) if ref else [None] * len(rows)
    return [
        replace(
            row,
            advantages=np.where(row.loss_mask, a, 0).astype(np.float32),
            old_logp=own[i] if row.old_logp is None else row.old_logp,
            ref_logp=base[i],
        )
        for i, (row, a) in enumerate(zip(rows, per_row.tolist(), strict=True))
    ]


def grouped(world: World, data: str) -> torch.Tensor:
    """The rewards (P, G), NaN where an attempt could not be scored."""
    values = [float("nan") if a["reward"] is None else a["reward"] for a in world.batch[data]]
    return torch.tensor(values).view(-1, world.batch["group_size"])


def grpo(
    world: World,
    loss: str = "clip",
    how: str = "token-mean",
    low: float = 0.2,
    high: float = 0.2,
    std: str = "sample",
    kl_estimator: str = "k3",
    kl_coef: float = 0.0,
    kl_ratio: bool = False,
    off_policy: bool = True,
    data: str = "attempts",
    tools: bool = False,
    drop_cut: bool = False,
    correction: str = "",
    cap: float = 3.0,
    updates: int = 1,
    **loss_settings: float,
) -> float:
    """A GRPO loss from rewards to gradient. `kl_ratio` multiplies the KL by π / π_old, `correction` is an
    importance correction at `cap`, `drop_cut` leaves out answers without a stop token, and of several `updates` per
    rollout the loss is the first one's."""
    policy_loss = partial(policies.POLICY_LOSSES[loss], **loss_settings)
    rows = attempts(world, data, tools, off_policy)
    if drop_cut:
        rows = [replace(r, loss_mask=r.loss_mask & (r.tokens[-1] in world.policy.stop_ids)) for r in rows]
    scaled = estimators.group_relative(grouped(world, data), std=std, eps=0.0 if std == "none" else 1e-4)
    samples = with_advantages(world, rows, scaled.flatten(), ref=kl_coef > 0)
    samples = samples[: len(samples) // updates]
    total = 0.0
    for b in batching.micro(samples, TOKENS_PER_PASS, how, LONGEST):
        logp, _ = token_stats(world.policy, b, 1.0)
        assert b.old_logp is not None
        per_token, _ = policy_loss(logp, b.old_logp, b.advantages, b.mask, low, high)
        if correction:
            per_token = per_token * policies.is_correction(b.old_logp, b.behaviour_logp, b.mask, cap, correction)
        if b.ref_logp is not None:
            penalty = kl_coef * kl(logp, b.ref_logp, kl_estimator)
            per_token = per_token + penalty * (policies.ratio(logp, b.old_logp, b.mask).detach() if kl_ratio else 1)
        total += backward((b.weights * per_token).sum())
    return total


def rloo(
    world: World,
    kl_coef: float = 0.0,
    off_policy: bool = False,
    whiten: bool = False,
    per_token: bool = False,
) -> float:
    """RLOO with KL (k1, of whole answers) in the reward. The clipped ratio is that of the whole answer, as in the
    paper's bandit view; `per_token` takes each token's own, as the other presets do."""
    data = "attempts"
    rows = attempts(world, data, False, off_policy)
    score = grouped(world, data)
    if kl_coef:
        pairs = zip(*(sample_logprobs(p, rows, TOKENS_PER_PASS) for p in (world.policy, world.reference)), strict=True)
        score = score - kl_coef * torch.tensor([float((own - ref).sum()) for own, ref in pairs]).view_as(score)
    scaled = estimators.leave_one_out(score)
    if whiten:
        scaled = estimators.batch_relative(scaled, eps=1e-4)
    total = 0.0
    for b in batching.micro(
        with_advantages(world, rows, scaled.flatten(), ref=False), TOKENS_PER_PASS, "seq-mean-token-sum"
    ):
        logp, _ = token_stats(world.policy, b, 1.0)
        assert b.old_logp is not None
        if per_token:
            loss, _ = policies.clip(logp, b.old_logp, b.advantages, b.mask, 0.2, 0.2)
            total += backward((b.weights * loss).sum())
            continue
        row, old = (preference.sequence_logp(x, b.mask).unsqueeze(1) for x in (logp, b.old_logp))
        advantage = b.advantages.gather(1, b.mask.int().argmax(1, keepdim=True))
        loss, _ = policies.clip(row, old, advantage, torch.ones_like(row, dtype=torch.bool), 0.2, 0.2)
        total += backward((b.row_weights * loss[:, 0]).sum())
    return total
