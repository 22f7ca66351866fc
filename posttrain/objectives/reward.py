"""Reward modelling: losses of scores, and what is done with scores afterwards. Nothing is reduced over rows here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

STEP_AGGREGATIONS = ("min", "product", "last", "mean")
ENSEMBLES = ("mean", "min", "penalised")


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, label: torch.Tensor, margin: torch.Tensor
) -> torch.Tensor:
    """−log σ(chosen − rejected − margin) of scores (N,), → (N,) (Llama 2, arXiv 2307.09288, eq. 2).

    `label` (N,) is the probability that `chosen` is the better, 0.5 a tie; the loss is the expectation over which of
    the two is. `margin` (N,) is by how much the better should win; 0 for the plain loss.
    """
    gap = chosen - rejected
    return -label * logsigmoid(gap - margin) - (1 - label) * logsigmoid(-gap - margin)


def centring(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """(chosen + rejected)² (N,): Bradley–Terry leaves the zero of the scores free, this fixes it (arXiv 2312.09244)."""
    return (chosen + rejected).square()


def binary(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of σ(logits) against targets in [0, 1], any shape, same shape back.

    One logit an answer makes an outcome verifier (ORM, arXiv 2110.14168), one a step a process model (PRM, arXiv
    2305.20050). Soft targets are what Monte-Carlo labels are.
    """
    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


def aggregate_steps(probabilities: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """The score (B,) of each solution from its steps' probabilities (B, S) of being right, where `mask` (B, S).

    `product` is the chance that every step is right and `min` the weakest step (arXiv 2305.20050), `last` reads the
    final step as a value (arXiv 2312.08935 compares them), `mean` forgets none. A row without steps is NaN: it has no
    score. Raises ValueError for an unknown `how`.
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
    """One score (N,) from those of K reward models (K, N), so that no single model's error is optimised for.

    `mean`; `min`, the worst case; `penalised`, the mean minus `coef` times the variance between members, taken over
    the K there are (not K − 1), as in arXiv 2310.02743. Raises ValueError for an unknown `how`.
    """
    if how == "mean":
        return scores.mean(0)
    if how == "min":
        return scores.amin(0)
    if how == "penalised":
        return scores.mean(0) - coef * scores.var(0, correction=0)
    raise ValueError(f"unknown ensemble {how!r}; expected one of {', '.join(ENSEMBLES)}.")


class Calibration(NamedTuple):
    """`error` is a scalar; the table has one entry a bin, with NaN means where `counts` is 0. All are float64."""

    error: torch.Tensor
    counts: torch.Tensor  # (bins,) predictions that fell into the bin
    confidence: torch.Tensor  # (bins,) their mean predicted probability
    frequency: torch.Tensor  # (bins,) their mean outcome


def expected_calibration_error(probability: torch.Tensor, outcome: torch.Tensor, bins: int = 10) -> Calibration:
    """Σ_b (n_b / N) |frequency_b − confidence_b| over equal bins [b / bins, (b + 1) / bins), the last closed.

    probability (N,) in [0, 1] as predicted, outcome (N,) what happened: 1, 0, or 0.5 for a tie (Guo et al., arXiv
    1706.04599, eq. 3). A number always depends on `bins`; compare only equal ones. Raises ValueError for no
    bins, no predictions, or one that is not a probability.
    """
    if bins < 1:
        raise ValueError(f"calibration got bins={bins}; expected 1 or more.")
    if not probability.numel() or not bool(((probability >= 0) & (probability <= 1)).all()):
        raise ValueError("calibration needs one probability in [0, 1] or more; pass σ(score difference), not scores.")
    edges = torch.arange(1, bins, dtype=probability.dtype, device=probability.device) / bins
    index = torch.bucketize(probability.detach(), edges, right=True)

    def total(values: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(bins, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, index, values.detach().double())

    counts = total(torch.ones_like(probability))
    confidence, frequency = total(probability) / counts, total(outcome) / counts
    gaps = torch.where(counts > 0, (frequency - confidence).abs(), 0)
    return Calibration((counts * gaps).sum() / counts.sum(), counts, confidence, frequency)
