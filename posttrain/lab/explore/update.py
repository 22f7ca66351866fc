"""Real updates of a copy of the model on one group: how each answer's probability changes, token by token.

The loss is the clipped surrogate with equal weight for each token of the group; the optimizer is AdamW with training's
default settings. The model itself is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from posttrain.config import TrainConfig
from posttrain.lab.explore.group import COMPARE, Group, Writer, write
from posttrain.models.load import Policy, packed_logits, trainable
from posttrain.objectives.policy import clip, ratio
from posttrain.objectives.tokens import select, token_weights
from posttrain.rollout.engines.embedded import EmbeddedGenerator

AGAIN = 64
"""New answers sampled before and after, to measure the effect of an update."""


def update(
    writer: Writer, group: Group, rewards: Sequence[float], how: str, lr: float, updates: int, low: float, high: float
) -> dict[str, Any]:
    """Takes `updates` optimizer steps on a group's answers as one batch, and returns their effect."""
    with writer.lock:
        policy = replace(writer.policy, model=copy.deepcopy(writer.policy.model))
        rows, mask = _rows(group, policy.device)
        advantages = COMPARE[how](torch.tensor([rewards], dtype=torch.float64))[0]
        per_token = advantages.float().to(policy.device).unsqueeze(1).expand(mask.shape)  # (G, T)
        weights = token_weights(mask, "token-mean")
        optimizer = _optimizer(policy, lr)
        old = _logp(policy, group, rows, mask).detach()
        steps: list[dict[str, float]] = []
        for _ in range(updates):
            loss, clipped = clip(_logp(policy, group, rows, mask), old, per_token, mask, low, high)
            total = (weights * loss).sum()
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable(policy).values(), TrainConfig().max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            share = clipped.sum() / mask.sum()
            steps.append({"loss": total.item(), "norm": norm.item(), "clipped": share.item()})
        with torch.no_grad():
            new = _logp(policy, group, rows, mask)
            loss, clipped = clip(new, old, per_token, mask, low, high)
        after = write(EmbeddedGenerator(policy, AGAIN), group.task, group.prompt, 0, AGAIN, "again")
    parts = (old, new, ratio(new, old, mask), -loss, clipped)
    return {
        "steps": steps,
        "clipped": float(clipped.sum() / mask.sum()),
        "answers": [_answer(*(part[i][mask[i]] for part in parts)) for i in range(len(mask))],
        "asked": AGAIN,
        "right": after.right,
    }


def _rows(group: Group, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The rows' tokens, prompt first, and the mask (G, T) of tokens written by the model."""
    prompt = torch.from_numpy(group.prompt).long()
    rows = [torch.cat([prompt, torch.from_numpy(a.completion.tokens).long()]).to(device) for a in group.answers]
    at = torch.arange(max(map(len, rows)), device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
    return rows, (at >= len(prompt)) & (at < lengths)


def _logp(policy: Policy, group: Group, rows: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """(G, T) log-probabilities of the tokens written by the model, 0 elsewhere, with gradient."""
    start = len(group.prompt)
    logits = packed_logits(policy, rows).split([len(row) for row in rows])
    before = torch.cat([own[start - 1 : -1] for own in logits])
    found, _ = select(before, torch.cat([row[start:] for row in rows]))
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, found)


def _optimizer(policy: Policy, lr: float) -> torch.optim.AdamW:
    cfg = TrainConfig()
    return torch.optim.AdamW(trainable(policy).values(), lr, (cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)


def _answer(
    old: torch.Tensor, new: torch.Tensor, moved: torch.Tensor, earned: torch.Tensor, clipped: torch.Tensor
) -> dict[str, Any]:
    """One answer of L tokens; `before` and `after` are the geometric means of its tokens' probabilities."""
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
