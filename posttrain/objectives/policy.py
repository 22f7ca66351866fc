"""Policy-gradient losses: pure functions of (B, T) tensors that return per-token losses, never reduced here.

All share one signature, so that a recipe swaps them by name and the law tests cover every one:
`loss(logp, old_logp, advantages, mask, low, high) -> (loss (B, T), clipped (B, T) bool)`. Both results are 0 / False
where `mask` is, whatever the other tensors hold there, and no gradient flows to those entries.
"""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0  # exp(20) ≈ 5e8: beyond it the ratio says "broken", and exp would overflow in fp32


def ratio(logp: torch.Tensor, old_logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """π(token) / π_old(token) (B, T), 1 outside the mask; log-ratios are clamped to ±20."""
    return torch.where(mask, logp - old_logp, 0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def reinforce(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """−A · log π (Williams, 1992). `old_logp`, `low` and `high` are not used; nothing is clipped."""
    loss = -torch.where(mask, advantages, 0) * torch.where(mask, logp, 0)
    return loss, torch.zeros_like(mask)


def clip(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's pessimistic surrogate −min(r A, clip(r, 1 − low, 1 + high) A) (arXiv 1707.06347, eq. 7).

    DAPO's clip-higher is `high > low`. `clipped` marks tokens whose gradient the clip removed.
    """
    r = ratio(logp, old_logp, mask)
    advantage = torch.where(mask, advantages, 0)
    free, bound = r * advantage, r.clamp(1 - low, 1 + high) * advantage
    return torch.where(mask, -torch.minimum(free, bound), 0), mask & (bound < free)


def is_correction(old_logp: torch.Tensor, behaviour_logp: torch.Tensor, mask: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance weight min(π_old / π_sampler, cap) (B, T), detached; min(1, cap) outside the mask.

    Corrects for a sampler whose numerics or weights differ from the learner's (Espeholt et al., arXiv 1802.01561,
    truncation c̄; used token-wise for LLMs as "TIS").
    """
    return ratio(old_logp, behaviour_logp, mask).clamp(max=cap).detach()
