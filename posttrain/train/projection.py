"""Chunked output projection: log-probabilities and entropies without the full (tokens, vocabulary) logits.

The gradient with respect to the logits has a closed form, so autograd stores no intermediate results: each chunk of
logits is overwritten with its gradient. A single chunk is kept for the backward pass; several chunks are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from posttrain.models import kernels


def log_probabilities(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (K, width), targets (K,) → logp (K,) and entropy (K,) in fp32 under softmax(logits / temperature).

    Computes the logits of `rows` tokens at a time. Both results are differentiable once, in hidden, weight and bias.
    """
    result: Any = _LogProbabilities.apply(hidden, head.weight, head.bias, targets, temperature, rows)
    return result


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        rows: int,
    ) -> Any:
        parts: list[tuple[torch.Tensor, ...]] = []
        logits = hidden.new_empty(0)
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = hidden.new_empty(0)  # frees the previous chunk before allocating the next
            logits = _logits(part, weight, bias)
            parts.append(_select(logits, wanted, temperature))
        logp, entropy, norm = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.logits = logits if len(parts) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, norm)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, dlogp: torch.Tensor | None, dentropy: torch.Tensor | None) -> Any:  # type: ignore[override]
        hidden, weight, bias, targets, entropy, norm = ctx.saved_tensors
        if dlogp is None:
            dlogp = torch.zeros_like(norm)
        wants = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if wants[0] else None
        dweight = torch.zeros_like(weight, dtype=norm.dtype) if wants[1] else None
        dbias = torch.zeros_like(bias, dtype=norm.dtype) if wants[2] else None
        for start in range(0, len(hidden), ctx.rows):
            at = slice(start, start + ctx.rows)
            logits = ctx.logits if ctx.logits is not None else _logits(hidden[at], weight, bias)
            ctx.logits = None
            of_entropy = None if dentropy is None else dentropy[at].contiguous()
            kept = entropy[at], norm[at]
            _to_gradient(logits, targets[at], ctx.temperature, kept, dlogp[at].contiguous(), of_entropy)
            if dbias is not None:
                dbias += logits.sum(0)
            grad = logits.to(weight.dtype)
            if dhidden is not None:
                torch.mm(grad, weight, out=dhidden[at])
            if dweight is not None and dweight.dtype == grad.dtype:
                dweight.addmm_(grad.t(), hidden[at])
            elif dweight is not None:  # bf16 chunks are accumulated in fp32
                dweight += grad.t() @ hidden[at]
            del grad, logits
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dhidden, dweight, None if dbias is None else dbias.to(bias.dtype), None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias)
    return logits if logits.dtype == torch.float64 else logits.float()


def _select(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    """logits (K, V) → logp of the targets, entropy and log Σ exp(logits / temperature), each (K,)."""
    if kernels.takes(logits):
        return kernels.select_logp(logits, targets.contiguous(), temperature)
    wide = logits / temperature
    norm = wide.logsumexp(-1)
    logp = wide.sub_(norm.unsqueeze(1))
    picked = logp.gather(1, targets.unsqueeze(1)).squeeze(1)
    entropy = -(logp.exp() * logp.clamp_min_(torch.finfo(logp.dtype).min)).sum(-1)  # 0 · (−inf) counts as 0
    return picked, entropy, norm


def _to_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    kept: tuple[torch.Tensor, torch.Tensor],
    dlogp: torch.Tensor,
    dentropy: torch.Tensor | None,
) -> None:
    """Overwrites logits (K, V) with the gradient of the loss; `kept` are entropy and norm (K,).

    With p = softmax(logits / T): d logp_target / d logits = (onehot − p) / T, and
    d entropy / d logits = −p · (log p + entropy) / T.
    """
    if kernels.takes(logits):
        kernels.select_logp_grad_(logits, targets.contiguous(), temperature, kept, dlogp, dentropy)
        return
    entropy, norm = kept
    logits.div_(temperature).sub_(norm.unsqueeze(1))
    probabilities = logits.exp()
    if dentropy is None:
        torch.mul(probabilities, -dlogp.unsqueeze(1), out=logits)
    else:
        logits.clamp_min_(torch.finfo(logits.dtype).min).add_(entropy.unsqueeze(1)).mul_(dentropy.unsqueeze(1))
        logits.add_(dlogp.unsqueeze(1)).mul_(probabilities).neg_()
    logits.scatter_add_(1, targets.unsqueeze(1), dlogp.unsqueeze(1))
    logits.div_(temperature)
