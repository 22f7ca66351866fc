"""What the preference and reward objectives must give, written a second time: float64, one pair at a time, no torch.

Kept apart from the package on purpose, like `oracle.py`: it shares no helper with it, and gradients are analytic. The
package writes each loss once, as a function of the signed gap, and takes the expectation over both orders. Here the
two orders are two separate lines: who wins, by how much, and what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
CLOSEST_TO_CERTAIN = -1e-7  # the package documents this clamp of mean log-probabilities in the odds


def logistic(x: float) -> float:
    """1 / (1 + e^−x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_loss(lead: float) -> tuple[float, float]:
    """log(1 + e^−lead) and its derivative: what a lead of the better answer costs."""
    return max(-lead, 0.0) + math.log1p(math.exp(-abs(lead))), -logistic(-lead)


def hinge_loss(lead: float) -> tuple[float, float]:
    """max(0, 1 − lead); the derivative at the kink is 0, as torch's relu has it."""
    return (1 - lead, -1.0) if lead < 1 else (0.0, 0.0)


Cost = Callable[[float], tuple[float, float]]


def pairs(cost: Cost, of_gap: Callable[..., tuple[float, float, float, float]], sign: int = 1, scaled: bool = False):
    """A pair loss from the cost of a lead and from `of_gap`: (gap, its slope in chosen, in rejected, weight)."""

    def loss(
        chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float, label: Array, margin: Array
    ) -> tuple[Array, Array, Array]:
        value, d_chosen, d_rejected = (np.zeros(len(chosen)) for _ in range(3))
        for i in range(len(chosen)):
            gap, up, down, weight = of_gap(chosen[i], rejected[i], ref_chosen[i], ref_rejected[i], beta)
            first, first_slope = cost(gap - margin[i])
            second, second_slope = cost(-gap - margin[i])
            p, q = float(label[i]), sign * (1 - float(label[i]))
            weight = weight / (p + q) if scaled else weight
            value[i] = weight * (p * first + q * second)
            slope = weight * (p * first_slope - q * second_slope)
            d_chosen[i], d_rejected[i] = slope * up, slope * down
        return value, d_chosen, d_rejected

    return loss


def with_reference(c: float, r: float, ref_c: float, ref_r: float, beta: float) -> tuple[float, float, float, float]:
    """β (log π(c)/π_ref(c) − log π(r)/π_ref(r))."""
    return beta * (c - ref_c - r + ref_r), beta, -beta, 1.0


def without_reference(c: float, r: float, ref_c: float, ref_r: float, beta: float) -> tuple[float, float, float, float]:
    """β (log π(c) − log π(r))."""
    return beta * c - beta * r, beta, -beta, 1.0


def odds(c: float, r: float, ref_c: float, ref_r: float, beta: float) -> tuple[float, float, float, float]:
    """log odds(c) − log odds(r), weighted by β; d log odds / d log p = 1 / (1 − p), 0 beyond the clamp."""

    def one(logp: float) -> tuple[float, float]:
        x = min(logp, CLOSEST_TO_CERTAIN)
        wrong = -math.expm1(x)
        return x - math.log(wrong), (1 / wrong if logp <= CLOSEST_TO_CERTAIN else 0.0)

    (a, up), (b, down) = one(c), one(r)
    return a - b, up, -down, beta


def ipo(
    chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float, label: Array, margin: Array
) -> tuple[Array, Array, Array]:
    """Multiplied out: h² − 2 (2p − 1) a h + a², with a = (½ + margin) / β the gap wanted of a sure pair."""
    value, d_chosen, d_rejected = (np.zeros(len(chosen)) for _ in range(3))
    for i in range(len(chosen)):
        h = chosen[i] - ref_chosen[i] - rejected[i] + ref_rejected[i]
        wanted, sure = (0.5 + margin[i]) / beta, 2 * label[i] - 1
        value[i] = h * h - 2 * sure * wanted * h + wanted * wanted
        d_chosen[i] = 2 * h - 2 * sure * wanted
        d_rejected[i] = -d_chosen[i]
    return value, d_chosen, d_rejected


# name → (loss, gradient with respect to chosen, to rejected), each (N,)
PAIR_LOSSES = {
    "sigmoid": pairs(log_loss, with_reference),
    "robust": pairs(log_loss, with_reference, sign=-1, scaled=True),
    "ipo": ipo,
    "hinge": pairs(hinge_loss, with_reference),
    "simpo": pairs(log_loss, without_reference),
    "orpo": pairs(log_loss, odds),
    "cpo": pairs(log_loss, without_reference),
}


def sequence_logp(logp: Array, mask: Array, mean: bool) -> tuple[Array, Array]:
    """Sum or mean of each row's answer tokens (B,), and its gradient (B, T)."""
    value, gradient = np.zeros(len(logp)), np.zeros(logp.shape)
    for b, row in enumerate(mask):
        tokens = [t for t, scored in enumerate(row) if scored]
        for t in tokens:
            share = 1 / len(tokens) if mean else 1.0
            value[b] += share * logp[b, t]
            gradient[b, t] = share
    return value, gradient


def kto_baseline(kl_logp: Array, kl_ref_logp: Array) -> float:
    """Mean log-ratio of mismatched answers."""
    return math.fsum(a - b for a, b in zip(kl_logp, kl_ref_logp, strict=True)) / len(kl_logp)


def kto(
    logp: Array, ref_logp: Array, desirable: Array, kl_baseline: float, beta: float, good: float, bad: float
) -> tuple[Array, Array]:
    """λ − λ σ(± β (r − z₀)) (N,) and its gradient with respect to logp."""
    value, gradient = np.zeros(len(logp)), np.zeros(len(logp))
    for i in range(len(logp)):
        sign, weight = (1, good) if desirable[i] else (-1, bad)
        utility = sign * beta * (logp[i] - ref_logp[i] - max(kl_baseline, 0.0))
        value[i] = weight * logistic(-utility)
        gradient[i] = -sign * weight * beta * logistic(utility) * logistic(-utility)
    return value, gradient


def bradley_terry(chosen: Array, rejected: Array, label: Array, margin: Array) -> tuple[Array, Array, Array]:
    """(loss, gradient with respect to chosen, to rejected), each (N,)."""
    zeros = np.zeros(len(chosen))
    return pairs(log_loss, without_reference)(chosen, rejected, zeros, zeros, 1.0, label, margin)


def centring(chosen: Array, rejected: Array) -> tuple[Array, Array, Array]:
    """(c + r)² and twice (c + r), for both."""
    total = chosen + rejected
    return total**2, 2 * total, 2 * total


def binary(logits: Array, targets: Array) -> tuple[Array, Array]:
    """−t log σ(z) − (1 − t) log(1 − σ(z)) and its gradient σ(z) − t, any shape."""
    value = [t * log_loss(z)[0] + (1 - t) * log_loss(-z)[0] for z, t in zip(logits.flat, targets.flat, strict=True)]
    gradient = [logistic(z) - t for z, t in zip(logits.flat, targets.flat, strict=True)]
    return np.reshape(value, logits.shape), np.reshape(gradient, logits.shape)


def aggregate_steps(probabilities: Array, mask: Array, how: str) -> tuple[Array, Array]:
    """(B,) scores, NaN for a row without steps, and the gradient (B, S); a tied minimum shares it equally."""
    value, gradient = np.full(len(mask), math.nan), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        steps = [s for s, real in enumerate(row) if real]
        if not steps:
            continue
        p = {s: float(probabilities[b, s]) for s in steps}
        value[b] = {"min": min(p.values()), "product": math.prod(p.values()), "last": p[steps[-1]]}.get(
            how, math.fsum(p.values()) / len(p)
        )
        weakest = [s for s in steps if p[s] == min(p.values())]
        for s in steps:
            gradient[b, s] = {
                "min": (s in weakest) / len(weakest),
                "product": math.prod(p[other] for other in steps if other != s),
                "last": float(s == steps[-1]),
                "mean": 1 / len(steps),
            }[how]
    return value, gradient


def ensemble(scores: Array, how: str, coef: float) -> tuple[Array, Array]:
    """(N,) and the gradient (K, N); a tied minimum shares it equally."""
    members = len(scores)
    value, gradient = np.zeros(scores.shape[1]), np.zeros(scores.shape)
    for i, column in enumerate(scores.T):
        mean = math.fsum(column) / members
        if how == "min":
            weakest = [k for k in range(members) if column[k] == min(column)]
            value[i] = min(column)
            gradient[weakest, i] = 1 / len(weakest)
            continue
        penalty = coef if how == "penalised" else 0.0
        value[i] = mean - penalty * math.fsum((x - mean) ** 2 for x in column) / members
        gradient[:, i] = [(1 - 2 * penalty * (x - mean)) / members for x in column]
    return value, gradient


def expected_calibration_error(
    probability: Sequence[float], outcome: Sequence[float], bins: int
) -> tuple[float, list[int]]:
    """The error, and how many predictions are in each bin [b / bins, (b + 1) / bins), the last closed."""
    inside: list[list[int]] = [[] for _ in range(bins)]
    for i, p in enumerate(probability):
        inside[max(b for b in range(bins) if b / bins <= p)].append(i)
    error = 0.0
    for rows in inside:
        if rows:
            apart = math.fsum(outcome[i] for i in rows) - math.fsum(probability[i] for i in rows)
            error += abs(apart) / len(probability)
    return error, [len(rows) for rows in inside]
