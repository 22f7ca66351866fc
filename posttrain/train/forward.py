"""Packed forward passes: differentiable log-probabilities, entropies, values and scores of a batch.

Padding tokens never go through a linear layer, and log-probabilities come from a chunked projection of the trained
positions only, so the full (tokens, vocabulary) logits never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from posttrain.data import batching
from posttrain.models.policy import Policy, states
from posttrain.objectives.tokens import select
from posttrain.train.projection import log_probabilities
from posttrain.types import Batch, Sample

LOGITS_PER_CHUNK = 1 << 24  # elements of a (tokens, vocabulary) block held at once, 64 MiB in fp32

Forward = Callable[[Policy, Batch, float], tuple[torch.Tensor, ...]]
"""forward(policy, batch, temperature) → the tensors passed to the loss ahead of the batch."""


def hidden_at(policy: Policy, batch: Batch, where: torch.Tensor) -> torch.Tensor:
    """Last hidden states (K, width) at positions `where` (K,) among the batch's real tokens, row by row.

    Prefixes that rows share (`batch.shared`) are computed once; their gradient is the sum over those rows.
    """
    return states(policy, batch.tokens[batch.real], batch.real.sum(1), batch.shared, where)


def trained_positions(batch: Batch) -> torch.Tensor:
    """Indices (K,) of the trained tokens among the real tokens."""
    return batch.mask[batch.real].nonzero().squeeze(1)


def scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Puts values (K,) at the K true entries of mask (B, T), 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def token_stats(policy: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (B, T) of the trained tokens, 0 elsewhere; entropies are detached."""
    logp, entropy = token_stats_with_entropy(policy, batch, temperature)
    return logp, entropy.detach()


def token_stats_with_entropy(policy: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_stats` with differentiable entropies, for losses with an entropy bonus."""
    return _language(policy, batch, before_trained(policy, batch), temperature)


def token_values(policy: Policy, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor]:
    """Values (B, T) of the states before the trained tokens, 0 elsewhere: entry t depends on tokens before t."""
    return (_values(policy, batch, before_trained(policy, batch)),)


def actor_critic(policy: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, differentiable entropies and values (B, T) from one pass, for a shared critic."""
    hidden = before_trained(policy, batch)
    return (*_language(policy, batch, hidden, temperature), _values(policy, batch, hidden))


def row_scores(policy: Policy, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor]:
    """Scores (B, heads) of whole rows: the scalar head at each row's last real token."""
    last = batch.real.sum(1).cumsum(0) - 1
    return (_scalar(policy, hidden_at(policy, batch, last)),)


def step_scores(policy: Policy, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor]:
    """Scores (B, T) of the scalar head at the masked tokens themselves (step ends), 0 elsewhere."""
    hidden = hidden_at(policy, batch, trained_positions(batch))
    return (scatter(_scalar(policy, hidden)[:, 0], batch.mask),)


def step_scores_and_likelihood(
    policy: Policy, batch: Batch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`step_scores`, and from the same pass the mean log-probability (B, 1) of each row's tokens, without its first."""
    hidden = hidden_at(policy, batch, torch.arange(int(batch.real.sum()), device=batch.tokens.device))
    later = batch.real.clone()
    later[:, 0] = False
    before = later[batch.real].nonzero().squeeze(1) - 1
    logp, _ = project(policy, hidden.index_select(0, before), batch.tokens[later], temperature)
    scores = _scalar(policy, hidden.index_select(0, trained_positions(batch)))[:, 0]
    return scatter(scores, batch.mask), scatter(logp, later).sum(1, keepdim=True) / later.sum(1, keepdim=True)


def before_trained(policy: Policy, batch: Batch) -> torch.Tensor:
    """Last hidden states (K, width) that predict the trained tokens: at the token before each."""
    return hidden_at(policy, batch, trained_positions(batch) - 1)


def _language(
    policy: Policy, batch: Batch, hidden: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logp, entropy = project(policy, hidden, batch.tokens[batch.mask], temperature)
    return scatter(logp, batch.mask), scatter(entropy, batch.mask)


def _values(policy: Policy, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    return scatter(_scalar(policy, hidden)[:, 0], batch.mask)


def _scalar(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
    assert policy.scalar is not None, "this pass needs a scalar head"
    return policy.scalar(hidden.to(policy.scalar.weight.dtype))


def project(
    policy: Policy, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (K, width), targets (K,) → logp (K,), entropy (K,), in chunks of the (K, V) logits."""

    def chunk(part: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return select(policy.logits(part), labels, temperature)

    size = max(1, LOGITS_PER_CHUNK // policy.vocab)
    rule = policy.route.rule
    if type(policy.head) is nn.Linear and rule.cap is None and len(hidden):
        return log_probabilities(policy.head, hidden, targets, temperature / rule.scale, size)
    if len(hidden) <= size:  # a wrapped or quantised output layer, or capped logits: plain autograd
        return chunk(hidden, targets)
    parts = [
        checkpoint(chunk, part, labels, use_reentrant=False)
        for part, labels in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])  # type: ignore[misc]


@torch.no_grad()
def logprobs(policy: Policy, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (B, T) of the trained tokens, 0 elsewhere, without gradient."""
    policy.model.eval()
    return token_stats(policy, batch, temperature)[0]


def sample_logprobs(
    policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int, temperature: float = 1.0
) -> list[np.ndarray]:
    """Log-probabilities [L] float32 of each sample's trained tokens, in input order; 0 elsewhere."""
    return per_token(samples, lambda rows: outputs(policy, rows, micro_batch_tokens, token_stats, temperature))


def sample_values(policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int) -> list[np.ndarray]:
    """Values [L] float32 of the states before each trained token, in input order."""
    return per_token(samples, lambda rows: outputs(policy, rows, micro_batch_tokens, token_values))


def sample_step_scores(policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int) -> list[np.ndarray]:
    """Scores [L] float32 at each masked token, 0 elsewhere, in input order."""
    return per_token(samples, lambda rows: outputs(policy, rows, micro_batch_tokens, step_scores))


def sample_scores(policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int) -> np.ndarray:
    """Scores (N, heads) float32 of whole rows at their last token, in input order."""
    return np.stack(outputs(policy, samples, micro_batch_tokens, row_scores))


Outputs = Callable[[Sequence[Sample]], list[np.ndarray]]
"""A pass without gradient: rows → one array per row, in input order."""


def outputs(
    policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int, forward: Forward, temperature: float = 1.0
) -> list[np.ndarray]:
    """The first output of `forward` for each row, float32, without gradient, in input order."""
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples)
    for part in planned(samples, micro_batch_tokens):
        rows = outputs_of_pass(policy, [samples[i] for i in part], forward, temperature)
        for i, row in zip(part, rows, strict=True):
            out[i] = row
    return out


def planned(samples: Sequence[Sample], micro_batch_tokens: int) -> list[list[int]]:
    """The rows of each pass without gradient: as many as an update's micro-batch would hold."""
    return batching.plan(samples, [[i] for i in range(len(samples))], micro_batch_tokens)


@torch.no_grad()
def outputs_of_pass(policy: Policy, rows: Sequence[Sample], forward: Forward, temperature: float) -> np.ndarray:
    """The first output (B, …) float32 of `forward` for the rows of one pass."""
    policy.model.eval()
    batch = batching.pad(rows, batching.loss_masks(rows).float(), policy.device)
    return forward(policy, batch, temperature)[0].float().cpu().numpy()


def per_token(samples: Sequence[Sample], of: Outputs) -> list[np.ndarray]:
    """The rows [L] of a (B, T) output; zeros for rows without trained tokens, which are not computed."""
    out = [np.zeros(len(s.tokens), np.float32) for s in samples]
    trained = [i for i, s in enumerate(samples) if s.loss_mask.any()]
    for i, row in zip(trained, of([samples[i] for i in trained]), strict=True):
        out[i] = row[: len(out[i])]
    return out
