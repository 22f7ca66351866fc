"""Per-token quantities: log-probabilities, entropy, KL estimators, and loss normalisation weights.

B rows, T padded length, V vocabulary. Index t refers to token t; logits at t − 1 predict token t, so entry 0 is 0.
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
    """logits (B, T, V), tokens (B, T) → log-probability (B, T) of each token given its prefix; [:, 0] is 0."""
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

    log r is clamped at +20, because exp would soon overflow in fp32; a clamped token has no gradient.
    """
    log_ratio = (ref_logp - logp).clamp(max=20.0)
    return torch.expm1(log_ratio) - log_ratio


def kl_k3_plus(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """The value of k3 with the gradient of k2: a low-variance value and an unbiased gradient."""
    k2 = kl_k2(logp, ref_logp)
    return kl_k3(logp, ref_logp).detach() + (k2 - k2.detach())


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "k3+": kl_k3_plus}


def kl(logp: torch.Tensor, ref_logp: torch.Tensor, how: str) -> torch.Tensor:
    """Per-token estimate of KL(π ‖ π_ref) at tokens sampled from π; `how` is a key of KL_ESTIMATORS.

    logp, ref_logp, any shape → the same shape. In the reward, where nothing is differentiated, any of them works:
    k1 and k3 are unbiased. In the loss, what matters is the expected gradient, and an unbiased value does not imply an
    unbiased gradient, because the sampling itself is not differentiated. With score s = ∇ log π, E_π[s] = 0:

    | how | gradient per token          | expected gradient under π                                     |
    |-----|-----------------------------|---------------------------------------------------------------|
    | k1  | s                           | 0: no penalty at all, only noise                              |
    | k2  | (log π − log π_ref) · s     | ∇ KL(π ‖ π_ref), the correct one                              |
    | k3  | (1 − π_ref / π) · s         | ∇ KL(π_ref ‖ π), the forward KL's: weak where π_ref is small  |
    | k3+ | that of k2                  | ∇ KL(π ‖ π_ref), with k3's value                              |

    "Correct" means per visited state: all four ignore that earlier tokens determine which states are visited.
    Raises ValueError for an unknown `how`.
    """
    if how not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {how!r}; expected one of {', '.join(KL_ESTIMATORS)}.")
    return KL_ESTIMATORS[how](logp, ref_logp)


AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
ORDERED_AGGREGATIONS = ("chunk-mean",)  # depend on the order of the rows
CHUNK_ROWS = 8  # nanochat's device_batch_size


def token_weights(loss_mask: torch.Tensor, how: str, max_len: int | None = None) -> torch.Tensor:
    """Weights (B, T) that turn per-token losses into the batch loss `(weights * loss).sum()`.

    Computed once over the whole optimizer batch, across all ranks; micro-batches then simply add up, so the gradient
    does not depend on the split. Rows without loss tokens are ignored. For N rows with loss tokens, len_b each:

    | how                 | weight           | used by                              |
    |---------------------|------------------|--------------------------------------|
    | token-mean          | 1 / Σ_b len_b    | DAPO (arXiv 2503.14476)              |
    | seq-mean-token-mean | 1 / (N · len_b)  | GRPO (arXiv 2402.03300)              |
    | seq-mean-token-sum  | 1 / N            | REINFORCE over whole sequences       |
    | constant            | 1 / (N · max_len)| Dr. GRPO (arXiv 2503.20783)          |
    | chunk-mean          | 1 / (C · Σ_c len)| nanochat: C chunks of 8 rows         |

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
            raise ValueError("aggregate 'constant' divides by max_len; pass the maximum completion length.")
        return mask / (rows * max_len)
    if how == "chunk-mean":
        chunk = torch.arange(len(mask), device=mask.device) // CHUNK_ROWS
        tokens = torch.zeros(int(chunk.max()) + 1, device=mask.device).index_add(0, chunk, length.squeeze(1))
        return mask / ((tokens > 0).sum().clamp_min(1) * tokens[chunk].clamp_min(1).unsqueeze(1))
    raise ValueError(f"unknown aggregate {how!r}; expected one of {', '.join(AGGREGATIONS + ORDERED_AGGREGATIONS)}.")


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is True, 0 for an empty mask; other entries may hold anything, even NaN."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


def masked_var(values: torch.Tensor, mask: torch.Tensor, bessel: bool = True) -> torch.Tensor:
    """Variance of `values` where `mask` is True, divided by n − 1 if `bessel`, else n; 0 for fewer than two entries."""
    centred = torch.where(mask, values - masked_mean(values, mask), 0)
    return centred.square().sum() / (mask.sum() - int(bessel)).clamp_min(1)


def whiten(
    values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, bessel: bool = True, eps: float = 1e-8
) -> torch.Tensor:
    """(values − mean) / √(var + eps) over the mask, 0 elsewhere; without `shift_mean` the mean is added back.

    values (B, T), mask (B, T) bool → (B, T), same dtype. Statistics cover only the tensors passed in, so whiten the
    whole batch before splitting it. verl and TRL use Bessel's n − 1, OpenRLHF and NeMo-RL n. Equal values give
    exactly 0 (or their mean).
    """
    wide = torch.where(mask, values, 0).double()
    mean = masked_mean(wide, mask)
    white = (wide - mean) * (masked_var(wide, mask, bessel) + eps).rsqrt()
    known = wide[mask]
    if known.numel() and known.min() == known.max():
        white = torch.zeros_like(wide)
    return torch.where(mask, white if shift_mean else white + mean, 0).to(values.dtype)
