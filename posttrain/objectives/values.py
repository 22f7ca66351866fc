"""Actor-critic pieces: per-token rewards, generalised advantage estimation, the value loss and a KL controller.

Only trained tokens count as time steps. A gap between the model's turns (a tool result, the next user message) is
skipped as if the turns were adjacent: it neither discounts nor has a value. Results are 0 outside the mask.
"""

from __future__ import annotations

import torch

from posttrain.objectives.advantages import rewards_on_trained

MAX_KL_ERROR = 0.2  # the controller's proportional error is clipped to ±0.2 (arXiv 1909.08593, section 2.2)


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """−kl_coef · kl on each trained token, plus the row's score on its last trained token (arXiv 1909.08593, eq. 2).

    scores (B,), kl (B, T), mask (B, T) bool → (B, T). A non-finite score (unscored) adds nothing; give such a row
    weight 0 in the loss. A row without trained tokens has no reward.
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    score = torch.where(scores.isfinite(), scores, 0).unsqueeze(1)
    return torch.where(mask, -kl_coef * kl, 0) + torch.where(last, score, 0)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over each row's trained tokens.

    rewards, values (B, T), mask (B, T) bool → advantages, returns = advantages + values, each (B, T). `values[:, t]`
    is the critic's estimate before token t is generated; after a row's last trained token the value is 0. A reward on
    an untrained position is credited to the last trained token before it; non-finite rewards on untrained positions
    count as 0. `lam` = 1 gives return − V, `lam` = 0 the TD error.
    """
    earned = rewards_on_trained(rewards, mask)
    known = torch.where(mask, values, 0)
    ahead = next_value = torch.zeros_like(known[:, 0])
    columns: list[torch.Tensor] = []
    for t in reversed(range(mask.shape[1])):
        here, value = mask[:, t], known[:, t]
        advantage = earned[:, t] + gamma * next_value - value + gamma * lam * ahead
        ahead, next_value = torch.where(here, advantage, ahead), torch.where(here, value, next_value)
        columns.append(torch.where(here, advantage, 0))
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + known


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """½ max((V − R)², (V_clip − R)²) with V_clip within ±clip_range of the value at sampling time, as in PPO2's code.

    All (B, T) → loss (B, T), clipped (B, T) bool; `clipped` marks tokens whose gradient was removed by the clip. A
    `clip_range` of 0 disables clipping. OpenRLHF and NeMo-RL also use the factor ½; TRL folds it into `vf_coef`.
    """
    value, target = torch.where(mask, values, 0), torch.where(mask, returns, 0)
    unclipped = 0.5 * (value - target).square()
    if not clip_range:
        return unclipped, torch.zeros_like(mask)
    old = torch.where(mask, old_values, 0)
    near = value.clamp(old - clip_range, old + clip_range)  # exactly `value` inside the range, so ties stay ties
    clipped = 0.5 * (near - target).square()
    return torch.maximum(unclipped, clipped), mask & (clipped > unclipped)


def adaptive_kl(coef: float, kl: float, target: float, horizon: float, episodes: float) -> float:
    """Adaptive KL coefficient after `episodes` more episodes with mean KL `kl` (arXiv 1909.08593, section 2.2).

    coef · (1 + clip((kl − target) / target, ±0.2) · episodes / horizon). `kl` and `target` share one unit: nats per
    episode in the paper. Raises ValueError unless target and horizon are positive.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"the KL controller has target {target} and horizon {horizon}; both must be positive.")
    error = min(max(kl / target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    return coef * (1 + error * episodes / horizon)
