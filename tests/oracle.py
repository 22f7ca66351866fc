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


def k3_plus(logp: float, ref: float) -> tuple[float, float]:
    """The value of k3 and the gradient of k2."""
    return k3(logp, ref)[0], k2(logp, ref)[1]


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3_plus}


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


# --- advantages --------------------------------------------------------------------------------------------------


def moments(values: Sequence[float], bessel: bool = True) -> tuple[float, float]:
    """Mean and variance, the latter over n − 1 or n; 0 with fewer values than that needs."""
    n = len(values)
    mean = math.fsum(values) / n if n else 0.0
    return mean, math.fsum((v - mean) ** 2 for v in values) / max(n - bessel, 1)


def scored(values: Sequence[float]) -> list[float]:
    return [float(v) for v in values if not math.isnan(v)]


def group_relative(rewards: Sequence[Sequence[float]], std: bool | str = False, eps: float = 0.0) -> Array:
    """Rewards by group, NaN for an unscored attempt → advantages; exactly 0 where a group's rewards are equal."""
    out = np.zeros((len(rewards), len(rewards[0])))
    everything = scored([r for group in rewards for r in group])
    for g, group in enumerate(rewards):
        known = scored(group)
        if len(set(known)) < 2:
            continue
        spread = {
            False: 1.0,
            "none": 1.0,
            True: math.sqrt(moments(known)[1]) + eps,
            "sample": math.sqrt(moments(known)[1]) + eps,
            "population": math.sqrt(moments(known, bessel=False)[1]) + eps,
            "batch": math.sqrt(moments(everything)[1]) + eps,
        }[std]
        for i, r in enumerate(group):
            out[g, i] = 0.0 if math.isnan(r) else (r - moments(known)[0]) / spread
    return out


def leave_one_out(rewards: Sequence[Sequence[float]]) -> Array:
    """Reward minus the mean of the other scored attempts in the group; 0 for one that has no others."""
    out = np.zeros((len(rewards), len(rewards[0])))
    for g, group in enumerate(rewards):
        for i, r in enumerate(group):
            others = scored([x for j, x in enumerate(group) if j != i])
            if others and not math.isnan(r):
                out[g, i] = r - math.fsum(others) / len(others)
    return out


def max_rl(rewards: Sequence[Sequence[float]]) -> Array:
    """(r − mean) / mean by group; 0 where no attempt earned anything."""
    out = np.zeros((len(rewards), len(rewards[0])))
    for g, group in enumerate(rewards):
        mean = moments(scored(group))[0]
        for i, r in enumerate(group):
            out[g, i] = 0.0 if math.isnan(r) or mean == 0 else (r - mean) / mean
    return out


def batch_relative(rewards: Sequence[Sequence[float]], std: str = "sample", eps: float = 1e-8) -> Array:
    """(r − mean) / (std + eps) over all scored attempts; exactly 0 if they are equal."""
    out = np.zeros((len(rewards), len(rewards[0])))
    everything = scored([r for group in rewards for r in group])
    if len(set(everything)) > 1:
        mean, variance = moments(everything, bessel=std == "sample")
        for g, group in enumerate(rewards):
            for i, r in enumerate(group):
                divisor = 1.0 if std == "none" else math.sqrt(variance) + eps
                out[g, i] = 0.0 if math.isnan(r) else (r - mean) / divisor
    return out


def whiten(values: Array, mask: Array, shift_mean: bool = True, bessel: bool = True, eps: float = 1e-8) -> Array:
    """(v − mean) / √(variance + eps) over the mask, plus the mean without `shift_mean`."""
    out = np.zeros(mask.shape)
    mean, variance = moments([float(v) for v in values[mask]], bessel)
    for at in zip(*np.nonzero(mask), strict=True):
        out[at] = (values[at] - mean) / math.sqrt(variance + eps) + (0.0 if shift_mean else mean)
    return out


def overlong_penalty(length: float, max_len: int, buffer: int) -> float:
    """DAPO eq. 13, case by case."""
    if length <= max_len - buffer:
        return 0.0
    return (max_len - buffer - length) / buffer if length <= max_len else -1.0


# --- returns and values ------------------------------------------------------------------------------------------


def turns(rewards: Array, mask: Array) -> list[tuple[int, float]]:
    """One row's trained positions, each with the rewards from it up to the next trained position."""
    at = [t for t, m in enumerate(mask) if m]
    ends = [*at[1:], len(mask)][: len(at)]
    return [(t, math.fsum(float(r) for r in rewards[t:end])) for t, end in zip(at, ends, strict=True)]


def returns_to_go(rewards: Array, mask: Array, gamma: float) -> Array:
    """Σ_j γ^(j − i) r_j over the trained tokens j ≥ i of the row, counted without the gaps."""
    out = np.zeros(mask.shape)
    for b in range(len(mask)):
        row = turns(rewards[b], mask[b])
        for i, (t, _) in enumerate(row):
            out[b, t] = math.fsum(gamma ** (j - i) * r for j, (_, r) in enumerate(row) if j >= i)
    return out


def gae(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> tuple[Array, Array]:
    """Σ_j (γλ)^(j − i) δ_j with δ_j = r_j + γ V_{j + 1} − V_j over the row's trained tokens; and that plus V."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(len(mask)):
        row = turns(rewards[b], mask[b])
        v = [float(values[b, t]) for t, _ in row] + [0.0]
        delta = [r + gamma * v[j + 1] - v[j] for j, (_, r) in enumerate(row)]
        for i, (t, _) in enumerate(row):
            advantages[b, t] = math.fsum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(row)))
            returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def value_loss(values: Array, old: Array, returns: Array, mask: Array, clip_range: float) -> tuple[Array, ...]:
    """PPO2: (loss, gradient with respect to values, clipped), each (B, T)."""
    loss, gradient, clipped = np.zeros(mask.shape), np.zeros(mask.shape), np.zeros(mask.shape, bool)
    for at in zip(*np.nonzero(mask), strict=True):
        v = values[at]
        bounded = min(max(v, old[at] - clip_range), old[at] + clip_range) if clip_range else v
        free, bound = (v - returns[at]) ** 2 / 2, (bounded - returns[at]) ** 2 / 2
        loss[at], clipped[at] = max(free, bound), bound > free
        gradient[at] = 0.0 if clipped[at] else v - returns[at]
    return loss, gradient, clipped


def token_rewards(scores: Array, kl: Array, mask: Array, kl_coef: float) -> Array:
    """−kl_coef · kl on trained tokens, and the score on each row's last."""
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        trained = [t for t, m in enumerate(row) if m]
        for t in trained:
            out[b, t] = -kl_coef * kl[b, t] + (scores[b] if t == trained[-1] else 0.0)
    return out


# --- policy losses: (loss, gradient of the loss's sum with respect to logp, clipped), each (B, T) -----------------


def ratio_of(log_ratio: Array | float) -> float:
    return math.exp(min(max(float(log_ratio), -MAX_LOG_RATIO), MAX_LOG_RATIO))


def reinforce(logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float) -> tuple[Array, ...]:
    """−A log π."""
    loss, gradient = np.zeros(mask.shape), np.zeros(mask.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        loss[at], gradient[at] = -advantages[at] * logp[at], -advantages[at]
    return loss, gradient, np.zeros(mask.shape, bool)


def importance(logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float) -> tuple[Array, ...]:
    """−r A: PPO with bounds that nothing reaches."""
    return clip(logp, old, advantages, mask, math.inf, math.inf)


def clip(logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float) -> tuple[Array, ...]:
    """PPO."""
    loss, gradient, clipped = np.zeros(mask.shape), np.zeros(mask.shape), np.zeros(mask.shape, bool)
    for at in zip(*np.nonzero(mask), strict=True):
        log_ratio = logp[at] - old[at]
        r = ratio_of(log_ratio)
        free, bound = r * advantages[at], min(max(r, 1 - low), 1 + high) * advantages[at]
        loss[at], clipped[at] = -min(free, bound), bound < free
        if not clipped[at] and abs(log_ratio) <= MAX_LOG_RATIO:
            gradient[at] = -r * advantages[at]
    return loss, gradient, clipped


def dual_clip(
    logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float, bound: float = 3.0
) -> tuple[Array, ...]:
    """PPO, but where A < 0 the loss is at most −bound · A and flat beyond."""
    loss, gradient, clipped = clip(logp, old, advantages, mask, low, high)
    for at in zip(*np.nonzero(mask), strict=True):
        if advantages[at] < 0 and ratio_of(logp[at] - old[at]) > bound:
            loss[at], gradient[at], clipped[at] = -bound * advantages[at], 0.0, True
    return loss, gradient, clipped


def row_ratio(logp: Array, old: Array, mask: Array, normalise: bool = True) -> float:
    """(Π π / π_old)^(1 / n) of one row (T,), n = 1 without `normalise`; 1 for a row without a trained token."""
    gaps = [float(logp[t] - old[t]) for t in range(len(mask)) if mask[t]]
    return ratio_of(math.fsum(gaps) / (len(gaps) if normalise and gaps else 1))


def gspo(logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float) -> tuple[Array, ...]:
    """d s / d logp_u = s / n, so every unclipped token t of the row adds −A_t s / n to each of its n tokens u."""
    loss, gradient, clipped = gspo_token(logp, old, advantages, mask, low, high)
    for b, row in enumerate(mask):
        gradient[b] = np.where(row, math.fsum(gradient[b]) / max(int(row.sum()), 1), 0.0)
    return loss, gradient, clipped


def gspo_token(logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float) -> tuple[Array, ...]:
    """GSPO's value; d (sg[s] π / sg[π]) / d logp = s at the token itself and 0 elsewhere."""
    loss, gradient, clipped = np.zeros(mask.shape), np.zeros(mask.shape), np.zeros(mask.shape, bool)
    for b, t in zip(*np.nonzero(mask), strict=True):
        s, a = row_ratio(logp[b], old[b], mask[b]), advantages[b, t]
        free, bound = s * a, min(max(s, 1 - low), 1 + high) * a
        loss[b, t], clipped[b, t] = -min(free, bound), bound < free
        gradient[b, t] = 0.0 if clipped[b, t] else -s * a
    return loss, gradient, clipped


def cispo(logp: Array, old: Array, advantages: Array, mask: Array, low: float, high: float) -> tuple[Array, ...]:
    """REINFORCE times a constant: the bounded ratio."""
    loss, gradient, clipped = np.zeros(mask.shape), np.zeros(mask.shape), np.zeros(mask.shape, bool)
    for at in zip(*np.nonzero(mask), strict=True):
        r = ratio_of(logp[at] - old[at])
        weight = min(max(r, 1 - low), 1 + high)
        loss[at], gradient[at] = -weight * advantages[at] * logp[at], -weight * advantages[at]
        clipped[at] = r < 1 - low or r > 1 + high
    return loss, gradient, clipped


def sapo(
    logp: Array,
    old: Array,
    advantages: Array,
    mask: Array,
    low: float,
    high: float,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> tuple[Array, ...]:
    """−(4 / τ) σ A with σ = σ(τ (r − 1)); its derivative is −4 σ (1 − σ) r A."""
    loss, gradient = np.zeros(mask.shape), np.zeros(mask.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        r, a = ratio_of(logp[at] - old[at]), advantages[at]
        tau = tau_positive if a > 0 else tau_negative
        sigma = 1 / (1 + math.exp(-tau * (r - 1)))
        loss[at], gradient[at] = -4 / tau * sigma * a, -4 * sigma * (1 - sigma) * r * a
    return loss, gradient, np.zeros(mask.shape, bool)


POLICY_LOSSES = {
    "reinforce": reinforce,
    "importance": importance,
    "clip": clip,
    "dual-clip": dual_clip,
    "gspo": gspo,
    "gspo-token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
}


def is_correction(
    old: Array, behaviour: Array, mask: Array, cap: float, how: str = "token-truncate", floor: float = 0.0
) -> Array:
    """π_old / π_sampler by token or by row, bounded or zeroed beyond [floor, cap]; as for a ratio of 1 elsewhere."""
    out = np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            w = 1.0
            if mask[b, t] and how.startswith("token"):
                w = ratio_of(old[b, t] - behaviour[b, t])
            elif mask[b, t]:
                w = row_ratio(old[b], behaviour[b], mask[b], normalise=not how.startswith("sequence-sum"))
            bounded = min(max(w, floor), cap)
            out[b, t] = bounded if how.endswith("truncate") or bounded == w else 0.0
    return out
