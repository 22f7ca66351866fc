"""Advantage estimators. P tasks, G attempts at each; a reward of NaN means the attempt could not be scored.

Unscored attempts are left out of every statistic and get advantage 0. Where all the scored rewards that are compared
with each other are equal, advantages are exactly 0. Arithmetic is in float64; results have the dtype of `rewards`.
"""

from __future__ import annotations

import torch

STDS = ("none", "sample", "population", "batch")


def group_relative(rewards: torch.Tensor, std: bool | str = False, eps: float = 0.0) -> torch.Tensor:
    """Each attempt's reward minus its group's mean, divided by `eps` plus the standard deviation that `std` names.

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
        advantages = advantages / (_spread(*_centred(rewards, (0, 1)), (0, 1)) + eps)
    elif how != "none":
        advantages = advantages / (_spread(advantages, count, (1,), bessel=how == "sample") + eps)
    return _finish(advantages, rewards, (1,))


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Each attempt's reward minus the mean of the others in its group (RLOO, arXiv 2402.14740, section 3).

    (P, G) → (P, G). It is n / (n − 1) times `group_relative`, and unbiased because an attempt is not in its own
    baseline. A group with one scored attempt has nothing to compare: 0. Raises ValueError for G < 2.
    """
    _check_groups(rewards)
    centred, count = _centred(rewards, (1,))
    return _finish(centred * count / (count - 1).clamp_min(1), rewards, (1,))


def max_rl(rewards: torch.Tensor) -> torch.Tensor:
    """Each attempt's reward minus its group's mean, divided by that mean (MaxRL, arXiv 2602.02710).

    (P, G) of rewards ≥ 0 → (P, G). For rewards 0 and 1 a rare success weighs 1 / rate: in expectation the gradient is
    that of pass@1 + pass@2 / 2 + … + pass@(G − 1) / (G − 1), which tends to log pass@1 as G grows. Raises ValueError
    for G < 2 or a negative reward.
    """
    _check_groups(rewards)
    if (rewards < 0).any():
        raise ValueError(
            f"max_rl divides by the group's mean, but a reward is {rewards[rewards < 0].min().item():.4g}. "
            "Use rewards of 0 and more, or another estimator."
        )
    centred, count = _centred(rewards, (1,))
    mean = torch.where(rewards.isfinite(), rewards, 0).double().sum(1, keepdim=True) / count.clamp_min(1)
    return _finish(centred / torch.where(mean > 0, mean, 1), rewards, (1,))


def batch_relative(rewards: torch.Tensor, std: str = "sample", eps: float = 1e-8) -> torch.Tensor:
    """Rewards minus their mean over the whole batch, divided by its standard deviation plus `eps`.

    Any shape → the same shape; `std` is "sample" (n − 1: verl, TRL), "population" (n: OpenRLHF, NeMo-RL) or "none".
    REINFORCE++ (arXiv 2501.03262) normalises so over all tokens (`tokens.whiten`); with one reward per answer and
    answers of equal length this is the same. Raises ValueError for an unknown `std`.
    """
    if std not in ("none", "sample", "population"):
        raise ValueError(f"unknown std {std!r}; expected 'none', 'sample' or 'population'.")
    everything = tuple(range(rewards.dim()))
    advantages, count = _centred(rewards, everything)
    if std != "none":
        advantages = advantages / (_spread(advantages, count, everything, bessel=std == "sample") + eps)
    return _finish(advantages, rewards, everything)


def minus_baseline(rewards: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """Reward minus a baseline that does not depend on the attempt, e.g. the greedy answer's (ReMax, arXiv 2310.10505).

    rewards (P, G), baseline (P, 1) → (P, G); 0 where either could not be scored. G may be 1.
    """
    known = rewards.isfinite() & baseline.isfinite()
    return torch.where(known, rewards - baseline, 0)


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards from each trained token on (REINFORCE++, arXiv 2501.03262), 0 outside the mask.

    rewards (B, T), mask (B, T) bool → (B, T). Only trained tokens count as time: a gap between a model's turns (a
    tool's answer) neither discounts nor stops a return. A reward that sits on an untrained position belongs to the
    last trained token before it; there a value that is not finite counts as 0.
    """
    earned = rewards_on_trained(rewards, mask)
    out, ahead = torch.zeros_like(earned), torch.zeros_like(earned[:, 0])
    for t in reversed(range(mask.shape[1])):
        ahead = torch.where(mask[:, t], earned[:, t] + gamma * ahead, ahead)
        out[:, t] = torch.where(mask[:, t], ahead, 0)
    return out


def rewards_on_trained(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Moves each reward (B, T) on an untrained position to the last trained token before it; none before: dropped."""
    pending = torch.zeros_like(rewards[:, 0])
    known = torch.where(mask | rewards.isfinite(), rewards, 0)
    columns: list[torch.Tensor] = []
    for t in reversed(range(mask.shape[1])):
        pending = pending + known[:, t]
        columns.append(torch.where(mask[:, t], pending, 0))
        pending = torch.where(mask[:, t], 0, pending)
    return torch.stack(columns[::-1], 1)


def overlong_penalty(lengths: torch.Tensor, max_len: int, buffer: int) -> torch.Tensor:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), to be added to the reward.

    lengths, any shape, in tokens → float32, the same shape: 0 up to max_len − buffer, then falling linearly to −1 at
    max_len and −1 beyond. Raises ValueError unless 0 < buffer ≤ max_len.
    """
    if not 0 < buffer <= max_len:
        raise ValueError(f"the overlong buffer is {buffer} tokens; expected 1 to max_len = {max_len}.")
    return ((max_len - buffer - lengths.float()) / buffer).clamp(-1, 0)


def flat_groups(rewards: torch.Tensor) -> torch.Tensor:
    """(P, G) → (P,) bool: groups whose scored rewards do not differ, so that nothing can be learned from them."""
    return _flat(rewards, (1,)).squeeze(1)


def _check_groups(rewards: torch.Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}; expected (tasks, attempts) with 2 attempts or more."
        )


def _centred(rewards: torch.Tensor, over: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards minus their mean in float64, 0 where unscored, and how many were scored."""
    scored = rewards.isfinite()
    wide = torch.where(scored, rewards, 0).double()
    count = scored.sum(over, keepdim=True)
    return torch.where(scored, wide - wide.sum(over, keepdim=True) / count.clamp_min(1), 0), count


def _spread(centred: torch.Tensor, count: torch.Tensor, over: tuple[int, ...], bessel: bool = True) -> torch.Tensor:
    """The standard deviation of what `_centred` returned, and 1 in place of 0, which nothing can be divided by."""
    variance = centred.square().sum(over, keepdim=True) / (count - int(bessel)).clamp_min(1)
    return torch.where(variance > 0, variance, 1).sqrt()


def _flat(rewards: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    scored = rewards.isfinite()
    top = torch.where(scored, rewards, -torch.inf).amax(over, keepdim=True)
    bottom = torch.where(scored, rewards, torch.inf).amin(over, keepdim=True)
    return top <= bottom


def _finish(advantages: torch.Tensor, rewards: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    """Exactly 0 where the rewards are equal (rounding would leave 1e-17), in the dtype of `rewards`."""
    return torch.where(_flat(rewards, over), 0, advantages).to(rewards.dtype)
