"""Distances between a student's and a teacher's next-token distributions, per state; never reduced here.

N states, V vocabulary. The whole-vocabulary divergences take log-probabilities (N, V) of both and return (N,). They
share one signature, so that a recipe swaps them by name and the law tests cover every one. The student comes first and
alone is differentiated. Where the two distributions are equal, value and gradient are 0 up to rounding.

A state is a prompt and the tokens written so far. That earlier tokens decide which states are visited is left out of
every gradient here (a discount of 0: each token answers for its own state only).
"""

from __future__ import annotations

import math

import torch


def reverse_kl(logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """KL(student ‖ teacher) = Σ_v π(v) (log π(v) − log τ(v)): the student avoids what the teacher would not say.

    `beta` is not used. MiniLLM (arXiv 2306.08543) and on-policy distillation minimise it.
    """
    return _gap(_finite(logp), _finite(teacher_logp.detach()))


def forward_kl(logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """KL(teacher ‖ student) = Σ_v τ(v) (log τ(v) − log π(v)): the student covers all that the teacher might say.

    `beta` is not used. Its gradient is that of the cross-entropy with the teacher's soft labels (Hinton et al.,
    arXiv 1503.02531, at this temperature and without its factor T²).
    """
    return _gap(_finite(teacher_logp.detach()), _finite(logp))


def jensen_shannon(logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """The generalised Jensen–Shannon divergence of GKD (arXiv 2306.13649, section 2) with teacher τ and student π:

    β KL(τ ‖ m) + (1 − β) KL(π ‖ m), m = β τ + (1 − β) π; bounded by the entropy of a β coin, at most ln 2.
    Divided by β it tends to the forward KL as β → 0; by 1 − β, to the reverse KL as β → 1. Both ends are 0 themselves,
    so 0 < β < 1 is required (ValueError).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} weighs one side with 0; the Jensen–Shannon divergence needs 0 < beta < 1.")
    student, teacher = _finite(logp), _finite(teacher_logp.detach())
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _gap(teacher, mixture) + (1 - beta) * _gap(student, mixture)


DIVERGENCES = {"reverse-kl": reverse_kl, "forward-kl": forward_kl, "jsd": jensen_shannon}


def sampled_reverse_kl(logp: torch.Tensor, teacher_logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The reverse KL from one token that the student drew in each state: policy gradient with a per-token reward.

    logp, teacher_logp: log-probabilities of the drawn tokens, mask: bool, all of one shape → that shape. The value is
    log π − log τ, unbiased for KL(π ‖ τ). The gradient is −A ∇ log π with the advantage A = log τ − log π held fixed
    and no discount; its expectation under π is the gradient of `reverse_kl`. 0 outside the mask, whatever is there.
    """
    gap = torch.where(mask, logp - teacher_logp, 0).detach()
    surrogate = gap * torch.where(mask, logp, 0)
    return gap + surrogate - surrogate.detach()


def _gap(logp: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Σ_v p (log p − log q), where p = 0 counts as 0."""
    return (logp.exp() * (logp - other)).sum(-1)


def _finite(logp: torch.Tensor) -> torch.Tensor:
    """log 0 as the lowest finite number, so that 0 · log 0 is 0 and not NaN."""
    return logp.clamp_min(torch.finfo(logp.dtype).min / 2)
