"""Advantage estimators for P prompts with G completions each; a reward of NaN marks an unscored completion.

Unscored completions are excluded from every statistic and get advantage 0. When all scored rewards that are compared
with each other are equal, advantages are exactly 0. Computed in float64 and returned in the dtype of `rewards`.
"""

from __future__ import annotations

import torch

STDS = ("none", "sample", "population", "batch")


def group_relative(rewards: torch.Tensor, std: bool | str = False, eps: float = 0.0) -> torch.Tensor:
    """Each completion's reward minus its group's mean, divided by the standard deviation named by `std` plus `eps`.

    rewards (P, G) float → advantages (P, G), same dtype.

    | std             | divisor                                 | used by                                             |
    |-----------------|-----------------------------------------|-----------------------------------------------------|
    | "none", False   | 1                                       | Dr. GRPO (arXiv 2503.20783)                         |
    | "sample", True  | the group's, Bessel's n − 1             | GRPO (arXiv 2402.03300) as in TRL (eps 1e-4),       |
    |                 |                                         | verl (1e-6) and OpenRLHF (1e-9)                     |
    | "population"    | the group's, n                          | open-instruct (eps 1e-8)                            |
    | "batch"         | of all scored rewards, Bessel's n − 1   | TRL's scale_rewards="batch" (arXiv 2508.08221)      |

    Raises ValueError for G < 2 or an unknown `std`.
    """
    how = ("sample" if std else "none") if isinstance(std, bool) else std
    if how not in STDS:
        raise ValueError(f"unknown std {std!r}; expected one of {', '.join(STDS)}.")
    _check_groups(rewards)
    advantages, count = _centred(rewards, (1,))
    if how == "batch":
        advantages = advantages / (_std(*_centred(rewards, (0, 1)), (0, 1)) + eps)
    elif how != "none":
        advantages = advantages / (_std(advantages, count, (1,), bessel=how == "sample") + eps)
    return _finish(advantages, rewards, (1,))


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Each completion's reward minus the mean of the others in its group (RLOO, arXiv 2402.14740, section 3).

    (P, G) → (P, G). This is n / (n − 1) times `group_relative`, and unbiased because a completion does not contribute
    to its own baseline. A group with a single scored completion gets advantage 0. Raises ValueError for G < 2.
    """
    _check_groups(rewards)
    centred, count = _centred(rewards, (1,))
    return _finish(centred * count / (count - 1).clamp_min(1), rewards, (1,))


def max_rl(rewards: torch.Tensor) -> torch.Tensor:
    """Each completion's reward minus its group's mean, divided by that mean (MaxRL, arXiv 2602.02710).

    (P, G) of rewards ≥ 0 → (P, G). With rewards of 0 and 1, a success is weighted by 1 / success rate: the expected
    gradient is that of pass@1 + pass@2 / 2 + … + pass@(G − 1) / (G − 1), which tends to log pass@1 as G grows. Raises
    ValueError for G < 2 or a negative reward.
    """
    _check_groups(rewards)
    if (rewards < 0).any():
        raise ValueError(
            f"max_rl got a reward of {rewards[rewards < 0].min().item():.4g}, but it divides by the group's mean. "
            "Use rewards of at least 0, or another estimator."
        )
    centred, count = _centred(rewards, (1,))
    mean = torch.where(rewards.isfinite(), rewards, 0).double().sum(1, keepdim=True) / count.clamp_min(1)
    return _finish(centred / torch.where(mean > 0, mean, 1), rewards, (1,))


def batch_relative(rewards: torch.Tensor, std: str = "sample", eps: float = 1e-8) -> torch.Tensor:
    """Rewards minus their mean over the whole batch, divided by the batch standard deviation plus `eps`.

    Any shape → the same shape; `std` is "sample" (n − 1: verl, TRL), "population" (n: OpenRLHF, NeMo-RL) or "none".
    REINFORCE++ (arXiv 2501.03262) normalises over all tokens instead (`tokens.whiten`); the two agree when there is one
    reward per completion and all completions have the same length. Raises ValueError for an unknown `std`.
    """
    if std not in ("none", "sample", "population"):
        raise ValueError(f"unknown std {std!r}; expected 'none', 'sample' or 'population'.")
    all_dims = tuple(range(rewards.dim()))
    advantages, count = _centred(rewards, all_dims)
    if std != "none":
        advantages = advantages / (_std(advantages, count, all_dims, bessel=std == "sample") + eps)
    return _finish(advantages, rewards, all_dims)


def minus_baseline(rewards: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """Reward minus a baseline independent of the completion, e.g. the greedy completion's reward (ReMax).

    rewards (P, G), baseline (P, 1) → (P, G); 0 where either is unscored. G may be 1. Source: arXiv 2310.10505.
    """
    known = rewards.isfinite() & baseline.isfinite()
    return torch.where(known, rewards - baseline, 0)


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted return from each trained token onwards (REINFORCE++, arXiv 2501.03262), 0 outside the mask.

    rewards (B, T), mask (B, T) bool → (B, T). Only trained tokens count as time steps: a gap between the model's turns
    (a tool result) neither discounts nor cuts the return. A reward on an untrained position is credited to the last
    trained token before it; non-finite rewards on untrained positions count as 0.
    """
    earned = rewards_on_trained(rewards, mask)
    out, ahead = torch.zeros_like(earned), torch.zeros_like(earned[:, 0])
    for t in reversed(range(mask.shape[1])):
        ahead = torch.where(mask[:, t], earned[:, t] + gamma * ahead, ahead)
        out[:, t] = torch.where(mask[:, t], ahead, 0)
    return out


def rewards_on_trained(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Moves each reward (B, T) on an untrained position to the last trained token before it, or drops it if none."""
    pending = torch.zeros_like(rewards[:, 0])
    known = torch.where(mask | rewards.isfinite(), rewards, 0)
    columns: list[torch.Tensor] = []
    for t in reversed(range(mask.shape[1])):
        pending = pending + known[:, t]
        columns.append(torch.where(mask[:, t], pending, 0))
        pending = torch.where(mask[:, t], 0, pending)
    return torch.stack(columns[::-1], 1)


def overlong_penalty(lengths: torch.Tensor, max_len: int, buffer: int) -> torch.Tensor:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), which the caller adds to the reward.

    lengths, any shape, in tokens → float32, the same shape: 0 up to max_len − buffer, then falling linearly to −1 at
    max_len and −1 beyond. Raises ValueError unless 0 < buffer ≤ max_len.
    """
    if not 0 < buffer <= max_len:
        raise ValueError(f"the overlong buffer is {buffer} tokens; expected between 1 and max_len = {max_len}.")
    return ((max_len - buffer - lengths.float()) / buffer).clamp(-1, 0)


def flat_groups(rewards: torch.Tensor) -> torch.Tensor:
    """(P, G) → (P,) bool: groups whose scored rewards are all equal, which therefore carry no learning signal."""
    return _all_equal(rewards, (1,)).squeeze(1)


def _check_groups(rewards: torch.Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}; expected (prompts, completions) with at least 2 completions."
        )


def _centred(rewards: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards minus their mean in float64, 0 where unscored, and the number of scored rewards."""
    scored = rewards.isfinite()
    wide = torch.where(scored, rewards, 0).double()
    count = scored.sum(dims, keepdim=True)
    return torch.where(scored, wide - wide.sum(dims, keepdim=True) / count.clamp_min(1), 0), count


def _std(centred: torch.Tensor, count: torch.Tensor, dims: tuple[int, ...], bessel: bool = True) -> torch.Tensor:
    """Standard deviation of what `_centred` returned, with 0 replaced by 1 so that it can be divided by."""
    variance = centred.square().sum(dims, keepdim=True) / (count - int(bessel)).clamp_min(1)
    return torch.where(variance > 0, variance, 1).sqrt()


def _all_equal(rewards: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    scored = rewards.isfinite()
    top = torch.where(scored, rewards, -torch.inf).amax(dims, keepdim=True)
    bottom = torch.where(scored, rewards, torch.inf).amin(dims, keepdim=True)
    return top <= bottom


def _finish(advantages: torch.Tensor, rewards: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Exactly 0 where the rewards are equal (rounding would leave 1e-17), in the dtype of `rewards`."""
    return torch.where(_all_equal(rewards, dims), 0, advantages).to(rewards.dtype)
