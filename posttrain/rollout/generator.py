"""Generator protocol, sampling requests, and token sampling.

A completion is a function of weights, prompt, seed and sampling parameters. Engines differ only in speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from posttrain import rng
from posttrain.types import Completion, RolloutError, SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt and one seed per completion. The prompt is prefilled once for all completions.

    `limits` caps the length of each completion below the sampling parameters' `max_tokens`; empty: no caps. `prefix` is
    the beginning of the completion: only tokens after it are returned and counted, and token t is drawn with the seed's
    random number for position len(prefix) + t. Continuing the first tokens of a completion with its own seed therefore
    reproduces the rest, up to rounding differences between prefill and decode (docs/concepts/exactness.md).

    `pieces` are the lengths of the parts in which the prefix was sampled: the prompt is prefilled and the prefix is
    decoded piece by piece, so an engine that kept its keys and values need not compute them again. `keep` tells it that
    completions of this request may be continued later. Without pieces, prompt and prefix are prefilled together.
    """

    prompt: np.ndarray  # [n] token ids
    seeds: tuple[int, ...]
    limits: tuple[int, ...] = ()
    prefix: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # [k] token ids
    pieces: tuple[int, ...] = ()  # add up to k
    keep: bool = False

    def __post_init__(self) -> None:
        if len(self.prompt) < 1 or not self.seeds:
            raise RolloutError(
                f"request has {len(self.prompt)} prompt tokens and {len(self.seeds)} seeds; both must be at least 1.",
                boundary="generator",
            )
        if self.limits and (len(self.limits) != len(self.seeds) or min(self.limits) < 1):
            raise RolloutError(
                f"request has limits {self.limits} for {len(self.seeds)} seeds; give one limit of at least 1 per seed.",
                boundary="generator",
            )
        if (self.pieces or self.keep) and (sum(self.pieces) != len(self.prefix) or min(self.pieces, default=1) < 1):
            raise RolloutError(
                f"request has pieces {self.pieces} for a prefix of {len(self.prefix)} tokens; give the length of "
                "each part in which it was sampled, at least 1 and adding up to the prefix.",
                boundary="generator",
            )

    @property
    def context(self) -> np.ndarray:
        """Token ids [n + k] before the first new token: prompt and prefix."""
        return np.concatenate([self.prompt, self.prefix.astype(self.prompt.dtype)]) if len(self.prefix) else self.prompt

    def part(self, indices: Sequence[int]) -> Request:
        """The request for some of its completions."""
        limits = tuple(self.limits[i] for i in indices) if self.limits else ()
        return replace(self, seeds=tuple(self.seeds[i] for i in indices), limits=limits)

    def limit(self, index: int, max_tokens: int) -> int:
        """The maximum length of completion `index`, given the overall `max_tokens`."""
        return min(self.limits[index], max_tokens) if self.limits else max_tokens


OnToken = Callable[[int, int, int], None]
"""Called with (request, index, token) as each token is drawn."""

OnDone = Callable[[int, int, Completion], None]
"""Called with (request, index, completion) as each completion ends, in any order."""


def ended(group: int, index: int, completion: Completion, on_token: OnToken | None, on_done: OnDone | None) -> None:
    """Reports a whole completion: its tokens to `on_token`, then itself to `on_done`."""
    if on_token:
        for token in completion.tokens.tolist():
            on_token(group, index, token)
    if on_done:
        on_done(group, index, completion)


class Generator(Protocol):
    """Samples completions. `version` identifies the current weights and is recorded in each completion."""

    version: int

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """Returns one list per request with one completion per seed, in order."""
        ...

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Loads new weights for the completions that follow."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """The current weights."""
        ...


def completion_seed(run_seed: int, purpose: str, step: int, task_id: str, index: int) -> int:
    """The seed of completion `index` of a task in a step, independent of batch, slots and workers."""
    return rng.key(run_seed, purpose, step, task_id, index)


def shape_logits(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Full and truncated log-probabilities, each (R, V) fp32: softmax(logits / T), then top-k, then top-p.

    Top-p keeps the smallest set of most likely tokens whose total probability reaches `top_p`, at least one token. The
    truncated ones are not renormalised; dropped tokens are −inf. With temperature 0 the full ones are at T = 1.
    """
    full = torch.log_softmax(logits.float() / (params.temperature or 1.0), dim=-1)
    kept = full
    if 0 < params.top_k < logits.shape[-1]:
        floor = kept.topk(params.top_k, dim=-1).values[:, -1:]
        kept = kept.masked_fill(kept < floor, -torch.inf)
    if params.top_p < 1:
        ordered, order = kept.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        limit = params.top_p * ordered.exp().sum(-1, keepdim=True)
        drop = torch.zeros_like(kept, dtype=torch.bool).scatter(-1, order, before >= limit)
        drop.scatter_(-1, order[:, :1], False)
        kept = kept.masked_fill(drop, -torch.inf)
    return full, kept


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples one token per row by inverting the cumulative distribution at the row's uniform number.

    logits (R, V), uniforms (R,) float64 in [0, 1) → tokens (R,) int64, logprobs (R,) under the full distribution,
    kept_logmass (R,): log of the probability mass kept by truncation. Greedy decoding (temperature 0) takes the largest
    logit and reports log-probabilities at temperature 1.
    """
    full, kept = shape_logits(logits, params)
    if params.temperature == 0:
        tokens = logits.argmax(-1)
        mass = torch.zeros(len(tokens), device=logits.device)
    else:
        cumulative = kept.double().exp().cumsum(-1)
        total = cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, uniforms.unsqueeze(1) * total, right=True).squeeze(1)
        # rounding at the end of the distribution must not select a dropped token
        last = (kept > -torch.inf).long().cumsum(-1).argmax(-1)
        tokens = torch.minimum(tokens, last)
        mass = total.squeeze(1).log().float() if kept is not full else torch.zeros(len(tokens), device=logits.device)
    return tokens, full.gather(-1, tokens.unsqueeze(1)).squeeze(1), mass
