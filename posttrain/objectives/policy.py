"""Policy-gradient losses: pure functions of (B, T) tensors that return per-token losses (no reduction).

All share one signature, so a recipe selects them by name and the property tests cover them all:
`loss(logp, old_logp, advantages, mask, low, high) -> (loss (B, T), clipped (B, T) bool)`. Where `mask` is False, the
results are 0 and False whatever the other tensors hold, and no gradient flows. On-policy, where `old_logp` equals
`logp`, every loss has the gradient of REINFORCE and nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MAX_LOG_RATIO = 20.0  # exp(20) ≈ 5e8: a larger ratio means something is broken, and exp would soon overflow in fp32
DUAL_CLIP = 3.0  # the bound c of arXiv 1912.09729
TAU_POSITIVE, TAU_NEGATIVE = 1.0, 1.05  # SAPO's gate temperatures (arXiv 2511.20347)


def ratio(logp: torch.Tensor, old_logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """π(token) / π_old(token) (B, T), 1 outside the mask; log-ratios are clamped to ±20."""
    return torch.where(mask, logp - old_logp, 0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(
    logp: torch.Tensor, old_logp: torch.Tensor, mask: torch.Tensor, normalise: bool = True
) -> torch.Tensor:
    """One ratio per row (B, 1): π(row) / π_old(row), raised to the power 1 / length if `normalise`.

    Length is the row's number of trained tokens; a row without any has ratio 1. The log of the result is clamped
    to ±20.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0).sum(1, keepdim=True)
    if normalise:
        log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp_min(1)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def reinforce(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE: −A · log π (Williams, 1992). Ignores `old_logp`, `low` and `high`; nothing is clipped."""
    loss = -torch.where(mask, advantages, 0) * torch.where(mask, logp, 0)
    return loss, torch.zeros_like(mask)


def importance(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """−r A, the unclipped surrogate of PPO (arXiv 1707.06347, eq. 6). Ignores `low` and `high`; nothing is clipped.

    Unbiased for the token's own factor of the off-policy gradient, but with unbounded variance.
    """
    loss = -ratio(logp, old_logp, mask) * torch.where(mask, advantages, 0)
    return loss, torch.zeros_like(mask)


def clip(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate −min(r A, clip(r, 1 − low, 1 + high) A) (arXiv 1707.06347, eq. 7).

    DAPO's clip-higher sets `high > low`. `clipped` marks tokens whose gradient was removed by the clip.
    """
    return _pessimistic(ratio(logp, old_logp, mask), advantages, mask, low, high)


def dual_clip(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
    bound: float = DUAL_CLIP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clip with the surrogate bounded below by `bound` · A where A < 0 (Ye et al., arXiv 1912.09729).

    PPO leaves r A unbounded for a negative advantage and a large ratio; here such a token gets no gradient once
    r > bound. `clipped` marks tokens whose gradient was removed by either clip.
    """
    loss, clipped = clip(logp, old_logp, advantages, mask, low, high)
    ceiling = -bound * torch.where(mask, advantages, 0)
    above = (ceiling > 0) & (loss > ceiling)
    return torch.where(above, ceiling, loss), clipped | above


def gspo(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clip with one length-normalised ratio per row, shared by its tokens (GSPO, arXiv 2507.18071, eq. 5, 7).

    All tokens of a row are clipped together. A row's advantages must be equal: each token's gradient is that of their
    mean. The paper's bounds are 3e-4 and 4e-4, far tighter than PPO's, and its aggregation is "seq-mean-token-mean".
    """
    return _pessimistic(sequence_ratio(logp, old_logp, mask), advantages, mask, low, high)


def gspo_token(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GSPO's value, but each token's gradient uses its own advantage (arXiv 2507.18071, eq. 13 and 14).

    The ratio is sg[s] · π / sg[π], where s is the row's ratio and sg stops the gradient. With equal advantages and
    equal weights within a row, value and gradient are those of `gspo`.
    """
    here = torch.where(mask, logp, 0)
    r = sequence_ratio(logp, old_logp, mask).detach() * (here - here.detach()).exp()
    return _pessimistic(r, advantages, mask, low, high)


def cispo(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): −sg[clip(r, 1 − low, 1 + high)] A log π.

    The weight is clipped and detached, so no token loses its gradient; `clipped` marks tokens whose weight was
    clipped. Bounds are relative to 1, as in the paper, verl and NeMo-RL; TRL takes the absolute maximum 1 + high.
    """
    r = ratio(logp, old_logp, mask).detach()
    weight = r.clamp(1 - low, 1 + high)
    loss = -weight * torch.where(mask, advantages, 0) * torch.where(mask, logp, 0)
    return loss, mask & (weight != r)


def sapo(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
    tau_positive: float = TAU_POSITIVE,
    tau_negative: float = TAU_NEGATIVE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAPO (arXiv 2511.20347): −(4 / τ) σ(τ (r − 1)) A, a soft gate instead of a clip; τ depends on the sign of A.

    The gradient's weight is 1 at r = 1 and decays smoothly on both sides, faster for negative advantages. Ignores
    `low` and `high`; nothing is clipped.
    """
    advantage = torch.where(mask, advantages, 0)
    positive = torch.full_like(advantage, tau_positive)  # keeps the tensors' dtype: 1.05 is not exactly 1.05 in fp32
    tau = torch.where(advantage > 0, positive, tau_negative)
    gate = torch.sigmoid(tau * (ratio(logp, old_logp, mask) - 1)) * 4 / tau
    return -gate * advantage, torch.zeros_like(mask)


def _pessimistic(
    r: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """−min(r A, clip(r) A) for ratios (B, T) or (B, 1), and which tokens lost their gradient to the clip."""
    advantage = torch.where(mask, advantages, 0)
    unclipped, clipped = r * advantage, r.clamp(1 - low, 1 + high) * advantage
    return torch.where(mask, -torch.minimum(unclipped, clipped), 0), mask & (clipped < unclipped)


IS_MODES = (
    "token-truncate",
    "token-mask",
    "sequence-truncate",
    "sequence-mask",
    "sequence-sum-truncate",
    "sequence-sum-mask",
)


def is_correction(
    old_logp: torch.Tensor,
    behaviour_logp: torch.Tensor,
    mask: torch.Tensor,
    cap: float,
    how: str = "token-truncate",
    floor: float = 0.0,
) -> torch.Tensor:
    """Importance weight (B, T) from the sampler to the learner, detached; multiplies a per-token loss.

    Corrects for a sampler whose numerics or weights differ from the learner's. With w = π_old / π_sampler:

    | how            | w                            | outside [floor, cap] | known as                                |
    |----------------|------------------------------|----------------------|-----------------------------------------|
    | token-truncate | the token's                  | the nearer bound     | IMPALA's c̄ (arXiv 1802.01561), "TIS"    |
    | token-mask     | the token's                  | 0                    | IcePop                                  |
    | sequence-…     | the row's, to the 1 / length | either of these      | geometric mean over the row             |
    | sequence-sum-… | the row's, the exact product | either of these      | exact within the bounds; high variance  |

    Outside the mask, w is 1. Log-ratios are clamped to ±20. Raises ValueError for an unknown `how`.
    """
    if how not in IS_MODES:
        raise ValueError(f"unknown importance correction {how!r}; expected one of {', '.join(IS_MODES)}.")
    if how.startswith("token"):
        weight = ratio(old_logp, behaviour_logp, mask)
    else:
        row = sequence_ratio(old_logp, behaviour_logp, mask, normalise="sum" not in how)
        weight = torch.where(mask, row, 1)
    if how.endswith("mask"):
        weight = torch.where((weight >= floor) & (weight <= cap), weight, 0)
    return weight.clamp(floor if how.endswith("truncate") else 0, cap).detach()


PolicyLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, float], tuple[torch.Tensor, torch.Tensor]
]

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clip": clip,
    "dual-clip": dual_clip,
    "gspo": gspo,
    "gspo-token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
    "importance": importance,
    "reinforce": reinforce,
}
