"""Reward modelling: losses on scores, step aggregation, ensembles and calibration. Rows are never reduced here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

STEP_AGGREGATIONS = ("min", "product", "last", "mean")
ENSEMBLES = ("mean", "min", "penalised")


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, label: torch.Tensor, margin: torch.Tensor
) -> torch.Tensor:
    """Bradley–Terry loss −log σ(chosen − rejected − margin), scores (N,) → (N,) (Llama 2, arXiv 2307.09288, eq. 2).

    `label` (N,) is the probability that `chosen` is better, 0.5 a tie; the loss is the expectation over which of the
    two is better. `margin` (N,) is the amount by which the better one should win; 0 gives the plain loss.
    """
    gap = chosen - rejected
    return -label * logsigmoid(gap - margin) - (1 - label) * logsigmoid(-gap - margin)


def centring(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """(chosen + rejected)² (N,), which centres the scores that Bradley–Terry leaves unanchored (arXiv 2312.09244)."""
    return (chosen + rejected).square()


def binary(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of σ(logits) against targets in [0, 1], any shape → the same shape.

    One logit per completion trains an outcome reward model (ORM, arXiv 2110.14168), one per step a process reward
    model (PRM, arXiv 2305.20050). Monte-Carlo labels are soft targets.
    """
    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


def aggregate_steps(probabilities: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """Score (B,) of each solution from its steps' probabilities of being correct (B, S), where `mask` (B, S) is True.

    `product` is the probability that every step is correct, `min` that of the weakest step (arXiv 2305.20050), `last`
    reads the final step as a value (compared in arXiv 2312.08935), `mean` averages all steps. A row without steps is
    NaN, i.e. unscored. Raises ValueError for an unknown `how`.
    """
    if how == "min":
        score = torch.where(mask, probabilities, torch.inf).amin(1)
    elif how == "product":
        score = torch.where(mask, probabilities, 1).prod(1)
    elif how == "last":
        position = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, position, -1).amax(1, keepdim=True)
        score = torch.where(position == last, probabilities, 0).sum(1)
    elif how == "mean":
        score = torch.where(mask, probabilities, 0).sum(1) / mask.sum(1).clamp_min(1)
    else:
        raise ValueError(f"unknown step aggregation {how!r}; expected one of {', '.join(STEP_AGGREGATIONS)}.")
    return torch.where(mask.any(1), score, torch.nan)


def ensemble(scores: torch.Tensor, how: str, coef: float = 1.0) -> torch.Tensor:
    """One score (N,) from the scores of K reward models (K, N), so that no single model's errors are exploited.

    `mean`; `min`, the worst case; `penalised`, the mean minus `coef` times the variance across members, with divisor
    K (not K − 1), as in arXiv 2310.02743. Raises ValueError for an unknown `how`.
    """
    if how == "mean":
        return scores.mean(0)
    if how == "min":
        return scores.amin(0)
    if how == "penalised":
        return scores.mean(0) - coef * scores.var(0, correction=0)
    raise ValueError(f"unknown ensemble {how!r}; expected one of {', '.join(ENSEMBLES)}.")


class Calibration(NamedTuple):
    """Calibration error (a scalar) and its bins, whose means are NaN where `counts` is 0. All float64."""

    error: torch.Tensor
    counts: torch.Tensor  # (bins,) predictions that fell into the bin
    confidence: torch.Tensor  # (bins,) their mean predicted probability
    frequency: torch.Tensor  # (bins,) their mean outcome


def expected_calibration_error(probability: torch.Tensor, outcome: torch.Tensor, bins: int = 10) -> Calibration:
    """Expected calibration error Σ_b (n_b / N) |frequency_b − confidence_b| (Guo et al., arXiv 1706.04599, eq. 3).

    probability (N,): predictions in [0, 1]; outcome (N,): 1, 0, or 0.5 for a tie. Bins are of equal width,
    [b / bins, (b + 1) / bins), the last one closed. The result depends on `bins`, so only compare values with the
    same number. Raises ValueError for bins < 1, no predictions, or a prediction outside [0, 1].
    """
    if bins < 1:
        raise ValueError(f"calibration got bins={bins}; expected at least 1.")
    if not probability.numel() or not bool(((probability >= 0) & (probability <= 1)).all()):
        raise ValueError(
            "calibration needs at least one prediction, all in [0, 1]; pass σ(score difference), not scores."
        )
    edges = torch.arange(1, bins, dtype=probability.dtype, device=probability.device) / bins
    index = torch.bucketize(probability.detach(), edges, right=True)

    def total(values: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(bins, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, index, values.detach().double())

    counts = total(torch.ones_like(probability))
    confidence, frequency = total(probability) / counts, total(outcome) / counts
    gaps = torch.where(counts > 0, (frequency - confidence).abs(), 0)
    return Calibration((counts * gaps).sum() / counts.sum(), counts, confidence, frequency)
