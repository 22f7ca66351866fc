"""What the objectives must give, written a second time: float64, plain loops over rows and tokens, no torch.

Kept apart from the package on purpose. It shares no helper with it, is slow, and each function reads like the formula
in the paper. Gradients are analytic. Where two answers are possible (ties, clamps), the comment says which and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray
MAX_LOG_RATIO = 20.0  # the package documents this clamp of log-ratios; beyond it nothing is learned


def log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    """logits (V,) → log-probabilities (V,)."""
    scaled = [float(z) / temperature for z in logits]
    top = max(scaled)
    total = math.log(sum(math.exp(z - top) for z in scaled)) + top
    return np.array([z - total for z in scaled])


def token_logprobs(logits: Array, tokens: Array, temperature: float = 1.0) -> Array:
    """logits (B, T, V), tokens (B, T) → (B, T): entry t is read from the logits at t − 1; entry 0 is 0."""
    out = np.zeros(tokens.shape)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            out[b, t] = log_softmax(logits[b, t - 1], temperature)[tokens[b, t]]
    return out


def logprob_gradient(logits: Array, token: int, temperature: float = 1.0) -> Array:
    """d log p(token) / d logits = (one-hot − p) / temperature."""
    p = np.exp(log_softmax(logits, temperature))
    return (np.eye(len(p))[token] - p) / temperature


def entropy(logits: Array, temperature: float = 1.0) -> float:
    """−Σ p log p of one row of logits (V,)."""
    return -sum(math.exp(x) * x for x in log_softmax(logits, temperature) if x > -math.inf)


def kl(logp: Array, ref_logp: Array) -> float:
    """Exact KL(π ‖ π_ref) of two distributions (V,) given as log-probabilities."""
    return sum(math.exp(a) * (a - b) for a, b in zip(logp, ref_logp, strict=True))


def k1(logp: float, ref: float) -> tuple[float, float]:
    """Value and gradient with respect to logp."""
    return logp - ref, 1.0


def k2(logp: float, ref: float) -> tuple[float, float]:
    """Value and gradient with respect to logp."""
    return (logp - ref) ** 2 / 2, logp - ref


def k3(logp: float, ref: float) -> tuple[float, float]:
    """Value and gradient with respect to logp: r − 1 − log r with r = exp(ref − logp), and 1 − r."""
    r = math.exp(ref - logp)
    return r - 1 - (ref - logp), 1 - r


def token_weights(mask: Array, how: str, max_len: int | None = None) -> Array:
    """mask (B, T) bool → weights (B, T)."""
    lengths = [sum(bool(m) for m in row) for row in mask]
    rows = sum(n > 0 for n in lengths)
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        for t, trained in enumerate(row):
            if trained:
                divisor = {
                    "token-mean": sum(lengths),
                    "seq-mean-token-mean": rows * lengths[b],
                    "seq-mean-token-sum": rows,
                    "constant": rows * (max_len or 0),
                }[how]
                out[b, t] = 1 / divisor
    return out


def group_relative(rewards: Sequence[Sequence[float]], std: bool = False) -> Array:
    """Rewards by group, NaN for an unscored attempt → advantages; exactly 0 where a group's rewards are equal."""
    out = np.zeros((len(rewards), len(rewards[0])))
    for g, group in enumerate(rewards):
        scored = [float(r) for r in group if not math.isnan(r)]
        if len(set(scored)) < 2:
            continue
        mean = math.fsum(scored) / len(scored)
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in scored) / (len(scored) - 1)) if std else 1.0
        for i, r in enumerate(group):
            out[g, i] = 0.0 if math.isnan(r) else (r - mean) / spread
    return out


def reinforce(logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float) -> tuple[Array, ...]:
    """−A log π: (loss, gradient with respect to logp, clipped), each (B, T)."""
    loss, gradient = np.zeros(mask.shape), np.zeros(mask.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        loss[at], gradient[at] = -advantages[at] * logp[at], -advantages[at]
    return loss, gradient, np.zeros(mask.shape, bool)


def clip(logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float) -> tuple[Array, ...]:
    """PPO: (loss, gradient with respect to logp, clipped), each (B, T)."""
    loss, gradient, clipped = np.zeros(mask.shape), np.zeros(mask.shape), np.zeros(mask.shape, bool)
    for at in zip(*np.nonzero(mask), strict=True):
        log_ratio = logp[at] - old[at]
        r = math.exp(min(max(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))
        free, bound = r * advantages[at], min(max(r, 1 - low), 1 + high) * advantages[at]
        loss[at], clipped[at] = -min(free, bound), bound < free
        if not clipped[at] and abs(log_ratio) <= MAX_LOG_RATIO:
            gradient[at] = -r * advantages[at]
    return loss, gradient, clipped


POLICY_LOSSES = {"reinforce": reinforce, "clip": clip}


def truncated_is(old: Array, behaviour: Array, mask: Array, cap: float) -> Array:
    """min(π_old / π_sampler, cap) on trained tokens, min(1, cap) elsewhere; (B, T)."""
    out = np.full(mask.shape, min(1.0, cap))
    for at in zip(*np.nonzero(mask), strict=True):
        log_ratio = min(max(old[at] - behaviour[at], -MAX_LOG_RATIO), MAX_LOG_RATIO)
        out[at] = min(math.exp(log_ratio), cap)
    return out
