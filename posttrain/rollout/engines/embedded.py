"""The embedded generator: continuous batching over slots in this process, on the learner's own weights.

A prompt is computed once for all its completions. Each decode step is one pass over all used slots, in which a row's
bits do not depend on the others (products.py, models/invariance.py), and each token is drawn with a number that belongs
to its own sequence and position. So a completion never depends on its batch-mates, on the number of slots, or on what
was sampled before. How a step is computed is a decoder's matter: `FusedDecoder` where it fits, else `PlainDecoder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from posttrain import rng
from posttrain.config import RolloutConfig
from posttrain.models import decoder, kernels
from posttrain.models.invariance import TILE
from posttrain.models.load import Policy, take_weights, weight_views
from posttrain.rollout.fused import FusedDecoder
from posttrain.rollout.generator import OnDone, OnToken, Request, draw
from posttrain.rollout.plain import PlainDecoder
from posttrain.rollout.scheduler import Scheduler
from posttrain.types import Completion, ConfigError, RolloutError, SamplingParams


class Decoder(Protocol):
    """What computes logits for the slots in use, which are always 0 … R−1."""

    def prepare(self, sequences: int, longest_prompt: int, max_tokens: int) -> None: ...
    def prefill(self, prompts: Sequence[np.ndarray]) -> Sequence[Any]: ...
    def start(self, slot: int, prompt: Any) -> None: ...
    def move(self, source: int, target: int, length: int) -> None: ...
    def step(self, newest: torch.Tensor, positions: torch.Tensor) -> torch.Tensor: ...


class _Slots:
    """What has been written in each slot so far, as arrays (slots, max_tokens) and (slots,)."""

    def __init__(self, slots: int, max_tokens: int) -> None:
        self.sequence: list[tuple[int, int] | None] = [None] * slots  # (request, index)
        self.tokens = np.zeros((slots, max_tokens), np.int64)
        self.logprobs = np.zeros((slots, max_tokens), np.float32)
        self.kept = np.zeros((slots, max_tokens), np.float32)
        self.uniforms = np.zeros((slots, max_tokens))
        self.lengths = np.zeros(slots, np.int64)
        self.limits = np.zeros(slots, np.int64)
        self.prompts = np.zeros(slots, np.int64)  # tokens in the prompt

    def begin(self, slot: int, group: int, index: int, request: Request, max_tokens: int) -> None:
        """Puts a completion that is still empty into a slot."""
        limit = request.limit(index, max_tokens)
        self.sequence[slot] = (group, index)
        begun = len(request.prefix)
        self.uniforms[slot, :limit] = rng.uniforms(request.seeds[index], begun + limit)[begun:]
        self.lengths[slot], self.limits[slot], self.prompts[slot] = 0, limit, len(request.prompt) + begun

    def move(self, source: int, target: int) -> int:
        """Copies one slot over another; returns the tokens its sequence has in the cache."""
        self.sequence[target] = self.sequence[source]
        for array in (self.tokens, self.logprobs, self.kept, self.uniforms, self.lengths, self.limits, self.prompts):
            array[target] = array[source]
        return int(self.prompts[target] + self.lengths[target] - 1)

    def add(self, slots: np.ndarray, drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> np.ndarray:
        """Appends a token to each of `slots`; returns the tokens."""
        tokens, logprobs, kept = (column.cpu().numpy() for column in drawn)
        at = self.lengths[slots]
        self.tokens[slots, at], self.logprobs[slots, at], self.kept[slots, at] = tokens, logprobs, kept
        self.lengths[slots] += 1
        return tokens

    def completion(self, slot: int, stopped: bool, version: int) -> Completion:
        """What a slot holds."""
        n = self.lengths[slot]
        tokens = self.tokens[slot, :n].astype(np.int32)
        logprobs, kept = self.logprobs[slot, :n].copy(), self.kept[slot, :n].copy()
        return Completion(tokens, logprobs, kept, "stop" if stopped else "length", version)


class EmbeddedGenerator:
    """`Generator` on a Policy in this process, the learner's own or a copy whose weights lag behind."""

    def __init__(self, policy: Policy, slots: int = 128, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of the sampler's matrix products, the model's own unless given. Raises ConfigError where
        another one cannot be had."""
        self.policy = policy
        self.slots = -(-slots // TILE) * TILE
        self.version = 0
        own = policy.head.weight.dtype
        if decoder.fits(policy.body):
            self.decoder: Decoder = FusedDecoder(policy, self.slots, dtype or own)
        elif dtype in (None, own):
            self.decoder = PlainDecoder(policy, self.slots)
        else:
            raise ConfigError(
                f"rollout.dtype asks for products in {dtype} on a {own} model that the fused decoder does not fit (a "
                'Llama-like model in float32 on a CPU with a C compiler). Set rollout.dtype = "model" or model.dtype.'
            )

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Takes new weights, named as in `trainable(policy)`. The learner's own are already here and not copied."""
        take_weights(self.policy, weights)
        self.version = version

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights it samples from, by name (views, not copies)."""
        return weight_views(self.policy)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """See `Generator.generate`. Raises RolloutError if prompt and completion exceed the model's context."""
        if not requests:
            return []
        self._check(requests, params)
        self.policy.model.eval()
        scheduler = Scheduler(self.slots, [len(r.seeds) for r in requests])
        self.decoder.prepare(len(scheduler.waiting), max(len(r.context) for r in requests), params.max_tokens)
        slots = _Slots(min(self.slots, len(scheduler.waiting)), params.max_tokens)
        stops = np.array(self.policy.stop_ids)
        prompts: dict[int, Any] = {}
        done: list[list[Completion | None]] = [[None] * len(r.seeds) for r in requests]

        def take(used: np.ndarray, logits: torch.Tensor) -> None:
            """Draws a token for each of the `used` slots from its row of `logits`; frees those that ended."""
            uniforms = torch.from_numpy(slots.uniforms[used, slots.lengths[used]])
            tokens = slots.add(used, _draw(logits, uniforms, params))
            stopped = np.isin(tokens, stops)
            if on_token:
                for slot, token in zip(used.tolist(), tokens.tolist(), strict=True):
                    on_token(*slots.sequence[slot], token)  # type: ignore[misc]
            for row in np.flatnonzero(stopped | (slots.lengths[used] == slots.limits[used])).tolist():
                slot = int(used[row])
                group, index = slots.sequence[slot]  # type: ignore[misc]
                done[group][index] = completion = slots.completion(slot, bool(stopped[row]), self.version)
                scheduler.finish(slot)
                if on_done:
                    on_done(group, index, completion)

        while True:
            while started := scheduler.admit():
                new = sorted({group for _, group, _ in started} - prompts.keys())
                prompts |= zip(new, self.decoder.prefill([requests[g].context for g in new]), strict=True)
                for slot, group, index in started:
                    slots.begin(slot, group, index, requests[group], params.max_tokens)
                    self.decoder.start(slot, prompts[group])
                take(np.array([s for s, _, _ in started]), torch.cat([prompts[g].logits for _, g, _ in started]))
                for group in {g for _, g, _ in started if scheduler.last_of_group(g)}:
                    del prompts[group]
            for source, target in scheduler.compact():
                self.decoder.move(source, target, slots.move(source, target))
            if not scheduler.active:
                return [[c for c in group if c is not None] for group in done]
            used = np.arange(scheduler.active)
            written = slots.lengths[used] - 1
            newest = torch.from_numpy(slots.tokens[used, written])
            take(used, self.decoder.step(newest, torch.from_numpy(slots.prompts[used] + written)))

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        context = getattr(self.policy.config, "max_position_embeddings", None)
        longest = max((len(r.context) for r in requests), default=0)
        if context and longest + params.max_tokens > context:
            raise RolloutError(
                f"a prompt of {longest} tokens plus max_tokens={params.max_tokens} exceeds the model's context of "
                f"{context}. Lower rollout.max_tokens or data.max_prompt_tokens.",
                boundary="generator",
            )


def _draw(
    logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`draw`, by the kernel where the whole distribution is sampled in float32 on the CPU."""
    whole = params.top_p == 1 and not 0 < params.top_k < logits.shape[-1]
    if not (whole and kernels.takes(logits)):
        return draw(logits, uniforms.to(logits.device), params)
    tokens, logprobs = kernels.draw(logits, uniforms, params.temperature)
    return tokens, logprobs, torch.zeros(len(tokens))


def make(policy: Policy, cfg: RolloutConfig) -> EmbeddedGenerator:
    """The engine of `rollout.engine = "embedded"`."""
    return EmbeddedGenerator(policy, cfg.slots, torch.bfloat16 if cfg.dtype == "bfloat16" else None)


def versions() -> dict[str, str]:
    """Nothing: this package's own version is in every run's header."""
    return {}
