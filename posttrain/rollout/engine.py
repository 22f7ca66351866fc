"""The embedded generator: continuous batching over slots in this process, on the learner's own weights.

A prompt is computed once and its keys and values are copied to the slots of its completions. Each decode step is one
model call over all used slots, at row counts that were found to give equal bits (see models/invariance.py), and each
token is drawn with a number that belongs to its own sequence and position. So a completion never depends on its
batch-mates, on the number of slots, or on what was sampled before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from posttrain import rng
from posttrain.models.attention import Prefill, SlotCache
from posttrain.models.invariance import ROW_COUNTS, TILE, equal_row_counts
from posttrain.models.load import Policy, hidden_states, trainable
from posttrain.rollout.generator import OnDone, OnToken, Request, draw
from posttrain.rollout.scheduler import Scheduler
from posttrain.types import Completion, RolloutError, SamplingParams

CACHE_BLOCK = 64  # room per sequence is a multiple of this many tokens
PROMPT_BLOCK = 32  # prompts are padded on the right to a multiple of this; no real token sees the padding


@dataclass
class _Prompt:
    """A computed prompt: what its completions start from."""

    keys: torch.Tensor  # (layers, Hkv, n, D)
    values: torch.Tensor
    logits: torch.Tensor  # (1, V) after the last prompt token


@dataclass
class _Sequence:
    """One completion being written."""

    group: int
    index: int
    position: int  # where the next token's keys go
    uniforms: np.ndarray  # [limit] its own random numbers
    limit: int  # tokens at which it is cut
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)


class EmbeddedGenerator:
    """`Generator` on a Policy in this process, the learner's own or a copy whose weights lag behind."""

    def __init__(self, policy: Policy, slots: int = 128) -> None:
        self.policy = policy
        self.slots = -(-slots // TILE) * TILE
        self.version = 0
        self.rows = equal_row_counts(policy.body, max(ROW_COUNTS), policy.device)
        self.head_rows = equal_row_counts(policy.head, self.slots, policy.device)
        self._cache: SlotCache | None = None

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Takes new weights, named as in `trainable(policy)`. The learner's own are already here and not copied."""
        with torch.no_grad():
            for name, own in trainable(self.policy).items():
                if own.data_ptr() != weights[name].data_ptr():
                    own.copy_(weights[name])
        self.version = version

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights it samples from, by name (views, not copies)."""
        return {name: parameter.detach() for name, parameter in trainable(self.policy).items()}

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
        cache = self._room(max(len(r.prompt) for r in requests) + params.max_tokens)
        scheduler = Scheduler(self.slots, [len(r.seeds) for r in requests])
        prompts: dict[int, _Prompt] = {}
        running: dict[int, _Sequence] = {}
        done: list[list[Completion | None]] = [[None] * len(r.seeds) for r in requests]

        def take(slots: list[int], logits: torch.Tensor) -> None:
            """Draws a token for each of `slots` from its row of `logits`; frees the slots whose sequence ended."""
            uniforms = np.array([running[s].uniforms[len(running[s].tokens)] for s in slots])
            drawn = draw(logits, torch.from_numpy(uniforms).to(logits.device), params)
            for slot, token, logprob, kept in zip(slots, *(column.tolist() for column in drawn), strict=True):
                seq = running[slot]
                seq.tokens.append(token)
                seq.logprobs.append(logprob)
                seq.kept.append(kept)
                if on_token:
                    on_token(seq.group, seq.index, token)
                stopped = token in self.policy.stop_ids
                if stopped or len(seq.tokens) == seq.limit:
                    done[seq.group][seq.index] = completion = self._complete(seq, stopped)
                    if on_done:
                        on_done(seq.group, seq.index, completion)
                    del running[slot]
                    scheduler.finish(slot)

        while scheduler.waiting or running:
            while started := scheduler.admit():
                self._prefill(sorted({g for _, g, _ in started} - prompts.keys()), requests, prompts)
                for slot, group, index in started:
                    prompt = prompts[group]
                    cache.fill(slot, prompt.keys, prompt.values)
                    request = requests[group]
                    limit = request.limit(index, params.max_tokens)
                    uniforms = rng.uniforms(request.seeds[index], limit)
                    running[slot] = _Sequence(group, index, len(request.prompt), uniforms, limit)
                take([s for s, _, _ in started], torch.cat([prompts[g].logits for _, g, _ in started]))
                for group in {g for _, g, _ in started}:
                    if scheduler.last_of_group(group):
                        del prompts[group]
            for source, target in scheduler.compact():
                running[target] = running.pop(source)
                cache.move(source, target, running[target].position)
            if running:
                slots = list(range(scheduler.active))
                take(slots, self._decode([running[s] for s in slots], cache))
        return [[c for c in group if c is not None] for group in done]

    def _decode(self, sequences: list[_Sequence], cache: SlotCache) -> torch.Tensor:
        """Feeds each sequence its newest token and returns the next logits (len(sequences), V)."""
        count, device = len(sequences), self.policy.device
        logits: list[torch.Tensor] = []
        tokens = torch.tensor([s.tokens[-1] for s in sequences], device=device)
        positions = torch.tensor([s.position for s in sequences], device=device)
        for first, rows in self._calls(count, self.rows):
            real = min(rows, count - first)
            part = torch.zeros(2, rows, dtype=torch.int64, device=device)
            part[0, :real], part[1, :real] = tokens[first : first + real], positions[first : first + real]
            layout = cache.step(part[1], first)
            hidden = hidden_states(self.policy, part[0].unsqueeze(1), part[1].unsqueeze(1), layout)
            logits.append(self._head(hidden[:real, 0]))
        for seq in sequences:
            seq.position += 1
        return torch.cat(logits)

    def _prefill(self, groups: list[int], requests: Sequence[Request], prompts: dict[int, _Prompt]) -> None:
        """Computes prompts, several in one call where that cannot change their bits."""
        by_length: dict[int, list[int]] = {}
        for group in groups:
            padded = -(-len(requests[group].prompt) // PROMPT_BLOCK) * PROMPT_BLOCK
            by_length.setdefault(padded, []).append(group)
        for padded, members in sorted(by_length.items()):
            while members:  # one prompt alone is exact by definition; more only at a proven row count
                sizes = [n for n in range(2, len(members) + 1) if {padded, n * padded} <= {*self.rows}]
                size = max(sizes, default=1)
                self._prefill_call(members[:size], padded, requests, prompts)
                members = members[size:]

    def _prefill_call(
        self, groups: list[int], padded: int, requests: Sequence[Request], prompts: dict[int, _Prompt]
    ) -> None:
        tokens = torch.zeros(len(groups), padded, dtype=torch.int64)
        for row, group in enumerate(groups):
            tokens[row, : len(requests[group].prompt)] = torch.from_numpy(requests[group].prompt.astype(np.int64))
        tokens = tokens.to(self.policy.device)
        layout = Prefill(padded)
        positions = torch.arange(padded, device=tokens.device).expand_as(tokens)
        hidden = hidden_states(self.policy, tokens, positions, layout)
        last = torch.stack([hidden[row, len(requests[g].prompt) - 1] for row, g in enumerate(groups)])
        logits = self._head(last)
        keys, values = torch.stack(layout.keys, 1), torch.stack(layout.values, 1)  # (n, layers, Hkv, padded, D)
        for row, group in enumerate(groups):
            length = len(requests[group].prompt)
            prompts[group] = _Prompt(keys[row, :, :, :length], values[row, :, :, :length], logits[row : row + 1])

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of hidden states (R, width), at proven row counts."""
        out = []
        for first, rows in self._calls(len(hidden), self.head_rows):
            part = hidden[first : first + rows]
            padding = hidden.new_zeros(rows - len(part), hidden.shape[1])
            out.append(self.policy.head(torch.cat([part, padding]))[: len(part)])
        return torch.cat(out)

    def _calls(self, count: int, allowed: tuple[int, ...]) -> list[tuple[int, int]]:
        """Splits `count` rows into (first, rows) calls of proven sizes that stay within the slots."""
        calls: list[tuple[int, int]] = []
        first = 0
        while first < count:
            sizes = [c for c in allowed if first + c <= max(self.slots, count)] or [TILE]
            rows = min((c for c in sizes if c >= count - first), default=max(sizes))
            calls.append((first, rows))
            first += rows
        return calls

    def _room(self, longest: int) -> SlotCache:
        config = self.policy.config
        capacity = -(-longest // CACHE_BLOCK) * CACHE_BLOCK
        if self._cache is None or self._cache.capacity < capacity:
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            like = next(self.policy.model.parameters())
            heads = config.num_key_value_heads
            self._cache = SlotCache(config.num_hidden_layers, self.slots, heads, capacity, width, like)
        return self._cache

    def _complete(self, seq: _Sequence, stopped: bool) -> Completion:
        return Completion(
            np.array(seq.tokens, np.int32),
            np.array(seq.logprobs, np.float32),
            np.array(seq.kept, np.float32),
            "stop" if stopped else "length",
            self.version,
        )

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        context = getattr(self.policy.config, "max_position_embeddings", None)
        longest = max((len(r.prompt) for r in requests), default=0)
        if context and longest + params.max_tokens > context:
            raise RolloutError(
                f"a prompt of {longest} tokens plus max_tokens={params.max_tokens} exceeds the model's context of "
                f"{context}. Lower rollout.max_tokens or data.max_prompt_tokens.",
                boundary="generator",
            )
