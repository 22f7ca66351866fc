"""Divergences between a student's and a teacher's next-token distributions, one value per state (no reduction).

N states, V vocabulary. The full-vocabulary divergences take log-probabilities (N, V) of both models and return (N,).
They share one signature, so a recipe selects them by name and the property tests cover them all. The student comes
first; only the student receives a gradient. If the distributions are equal, value and gradient are 0 up to rounding.

A state is a prompt plus the tokens generated so far. No gradient here accounts for the fact that earlier tokens
determine which states are visited (a discount of 0: each token is only responsible for its own state).
"""

from __future__ import annotations

import math

import torch


def reverse_kl(logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """KL(student ‖ teacher) = Σ_v π(v) (log π(v) − log τ(v)); mode-seeking: avoids tokens unlikely under the teacher.

    Ignores `beta`. MiniLLM (arXiv 2306.08543) and on-policy distillation minimise this divergence.
    """
    return _kl(_finite(logp), _finite(teacher_logp.detach()))


def forward_kl(logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """KL(teacher ‖ student) = Σ_v τ(v) (log τ(v) − log π(v)); mode-covering: spreads over all the teacher might say.

    Ignores `beta`. The gradient equals that of cross-entropy with the teacher's soft labels (Hinton et al.,
    arXiv 1503.02531, at this temperature and without the factor T²).
    """
    return _kl(_finite(teacher_logp.detach()), _finite(logp))


def jensen_shannon(logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """Generalised Jensen–Shannon divergence of GKD (arXiv 2306.13649, section 2) between teacher τ and student π.

    β KL(τ ‖ m) + (1 − β) KL(π ‖ m), m = β τ + (1 − β) π; bounded by the entropy of a Bernoulli(β), at most ln 2.
    Divided by β it tends to the forward KL as β → 0; divided by 1 − β, to the reverse KL as β → 1. At both ends the
    divergence itself is 0, so 0 < β < 1 is required (ValueError).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} gives one side a weight of 0; the Jensen–Shannon divergence needs 0 < beta < 1.")
    student, teacher = _finite(logp), _finite(teacher_logp.detach())
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


DIVERGENCES = {"reverse-kl": reverse_kl, "forward-kl": forward_kl, "jsd": jensen_shannon}


def sampled_reverse_kl(logp: torch.Tensor, teacher_logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Reverse KL estimated from one token sampled by the student per state: a policy gradient with per-token rewards.

    logp, teacher_logp: log-probabilities of the sampled tokens, mask: bool, all of one shape → that shape. The value
    is log π − log τ, unbiased for KL(π ‖ τ). The gradient is −A ∇ log π with the advantage A = log τ − log π detached
    and no discounting; its expectation under π is the gradient of `reverse_kl`. Entries outside the mask give 0.
    """
    gap = torch.where(mask, logp - teacher_logp, 0).detach()
    surrogate = gap * torch.where(mask, logp, 0)
    return gap + surrogate - surrogate.detach()


def _kl(logp: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Σ_v p (log p − log q), with terms of p = 0 counting as 0."""
    return (logp.exp() * (logp - other)).sum(-1)


def _finite(logp: torch.Tensor) -> torch.Tensor:
    """Replaces log 0 by a very low finite number, so that 0 · log 0 is 0 rather than NaN."""
    return logp.clamp_min(torch.finfo(logp.dtype).min / 2)
