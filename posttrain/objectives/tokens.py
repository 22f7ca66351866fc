"""Per-token quantities: log-probabilities, entropy, KL estimators and the weights that normalise a loss.

B rows, T padded length, V vocabulary. Index t describes token t; logits at t − 1 predict token t, so entry 0 is 0.
"""

from __future__ import annotations

import torch


def select(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each row, in fp32 (or fp64 if the logits are).

    logits (N, V), targets (N,) int64 → logp (N,), entropy (N,), both under softmax(logits / temperature).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(wide / temperature, dim=-1)
    entropy = -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)  # 0 · (−inf) counts as 0
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """logits (B, T, V), tokens (B, T) → log-probability (B, T) of each token given those before it; [:, 0] is 0."""
    rows, length, vocab = logits.shape
    logp, _ = select(logits[:, :-1].reshape(-1, vocab), tokens[:, 1:].reshape(-1), temperature)
    return torch.cat([logp.new_zeros(rows, 1), logp.view(rows, length - 1)], dim=1)


def kl_k1(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """log π − log π_ref per token: unbiased for KL(π ‖ π_ref) under π, high variance, can be negative."""
    return logp - ref_logp


def kl_k2(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """½ (log π − log π_ref)²: its gradient is an unbiased estimate of the KL's gradient."""
    return 0.5 * (logp - ref_logp).square()


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """r − 1 − log r with r = π_ref / π (Schulman, "Approximating KL divergence"): unbiased and never negative.

    log r is clamped at +20: beyond it exp would soon overflow in fp32, and one such token already stops learning.
    """
    log_ratio = (ref_logp - logp).clamp(max=20.0)
    return torch.expm1(log_ratio) - log_ratio


AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")


def token_weights(loss_mask: torch.Tensor, how: str, max_len: int | None = None) -> torch.Tensor:
    """Weights (B, T) that turn per-token losses into the batch loss `(weights * loss).sum()`.

    Computed once over the whole optimizer batch, all ranks included; micro-batches then only add, so no split can
    change the gradient. Rows without a loss token count for nothing. For N rows with a loss token, length len_b:

    | how                 | weight           | used by                              |
    |---------------------|------------------|--------------------------------------|
    | token-mean          | 1 / Σ_b len_b    | DAPO (arXiv 2503.14476)              |
    | seq-mean-token-mean | 1 / (N · len_b)  | GRPO (arXiv 2402.03300)              |
    | seq-mean-token-sum  | 1 / N            | REINFORCE over whole sequences       |
    | constant            | 1 / (N · max_len)| Dr. GRPO (arXiv 2503.20783)          |

    Raises ValueError for an unknown `how`, or "constant" without `max_len`.
    """
    mask = loss_mask.to(torch.float32)
    length = mask.sum(1, keepdim=True)
    rows = (length > 0).sum().clamp_min(1)
    if how == "token-mean":
        return mask / length.sum().clamp_min(1)
    if how == "seq-mean-token-mean":
        return mask / (rows * length.clamp_min(1))
    if how == "seq-mean-token-sum":
        return mask / rows
    if how == "constant":
        if not max_len:
            raise ValueError("aggregate 'constant' divides by max_len; pass the longest completion allowed.")
        return mask / (rows * max_len)
    raise ValueError(f"unknown aggregate {how!r}; expected one of {', '.join(AGGREGATIONS)}.")


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask`, 0 when the mask is empty; unmasked entries may hold anything, even NaN."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)
