"""Advantage estimators. P tasks, G attempts at each; a reward of NaN means the attempt could not be scored."""

from __future__ import annotations

import torch


def group_relative(rewards: torch.Tensor, std: bool = False) -> torch.Tensor:
    """Each attempt's reward minus its group's mean; with `std` divided by the group's standard deviation.

    rewards (P, G) float → advantages (P, G), same dtype. Unscored attempts (NaN) are left out of the statistics and
    get advantage 0; so does every attempt of a group whose scored rewards are all equal, exactly.
    GRPO (arXiv 2402.03300) divides by the sample standard deviation (Bessel's n − 1, as torch, TRL and verl compute
    it); Dr. GRPO (arXiv 2503.20783) does not divide. Raises ValueError for G < 2.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}; expected (tasks, attempts) with 2 attempts or more."
        )
    scored = rewards.isfinite()
    wide = torch.where(scored, rewards, 0).double()
    count = scored.sum(1, keepdim=True)
    centred = torch.where(scored, wide - wide.sum(1, keepdim=True) / count.clamp_min(1), 0)
    if std:
        centred = centred / (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt().clamp_min(1e-12)
    return torch.where(flat_groups(rewards).unsqueeze(1), 0, centred).to(rewards.dtype)


def flat_groups(rewards: torch.Tensor) -> torch.Tensor:
    """(P, G) → (P,) bool: groups whose scored rewards do not differ, so that nothing can be learned from them."""
    scored = rewards.isfinite()
    top = torch.where(scored, rewards, -torch.inf).amax(1)
    bottom = torch.where(scored, rewards, torch.inf).amin(1)
    return top <= bottom
