"""Decoder on transformers' modules, for every model that the packed pass computes, in any dtype on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.models.attention import Prefill, SlotCache, Unsupported
from posttrain.models.invariance import ROW_COUNTS, TILE, calls, equal_row_counts, linear_shapes
from posttrain.models.policy import Policy, hidden_states

BLOCK = 64  # cache capacity per sequence is a multiple of this many tokens
PROMPT_BLOCK = 32  # prompts are right-padded to a multiple of this; no token attends to the padding


@dataclass
class Prompt:
    """A prefilled prompt, and the pieces that extend it: keys and values (layers, Hkv, n, D) of each part in order."""

    parts: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    logits: torch.Tensor  # (1, V) after the last token


class PlainDecoder:
    """`Decoder` of rollout/decoding.py. A prompt's keys and values are copied into each of its slots."""

    divisible = True

    def __init__(self, policy: Policy, slots: int) -> None:
        self.policy, self.slots = policy, slots
        like = policy.head.weight
        tiles = [c for c in ROW_COUNTS if c % TILE == 0]  # attention products need whole tiles too
        self.rows = equal_row_counts(linear_shapes(policy.body), tiles, like)
        self.head_rows = equal_row_counts(linear_shapes(policy.head), [c for c in ROW_COUNTS if c <= slots], like)
        self._cache: SlotCache | None = None
        self.begun = [0] * slots  # tokens of each slot's prompt
        self.layers, self.heads, self.width = self._sizes()

    @property
    def cache(self) -> SlotCache:
        """KV cache of the slots."""
        assert self._cache is not None, "call `prepare` first"
        return self._cache

    def prepare(self, sequences: int, longest_prompt: int, max_tokens: int, pieces: int = 0) -> None:
        """Allocates the KV cache for this many sequences of this length; weights are not copied."""
        used, capacity = min(self.slots, -(-sequences // TILE) * TILE), longest_prompt + max_tokens
        if self._cache is None or self._cache.capacity < capacity or self._cache.keys.shape[1] < used:
            shape = (used, self.heads, -(-capacity // BLOCK) * BLOCK, self.width)
            self._cache = SlotCache(self.layers, *shape, like=next(self.policy.model.parameters()))

    @torch.no_grad()
    def _sizes(self) -> tuple[int, int, int]:
        """Layers, key heads and head width of the cache, found with one token. Raises Unsupported if they vary."""
        layout, token = Prefill(1), torch.zeros(1, 1, dtype=torch.int64, device=self.policy.device)
        self.policy.model.eval()
        hidden_states(self.policy, token, token, layout)
        shapes = {(part.shape[1], part.shape[3]) for part in (*layout.keys, *layout.values)}
        if len(shapes) != 1:
            raise Unsupported("its layers have keys and values of different sizes")
        return len(layout.keys), *shapes.pop()

    def prefill(self, prompts: Sequence[np.ndarray]) -> list[Prompt]:
        """Prefills prompts, batched only where the results stay bit-exact."""
        done: dict[int, Prompt] = {}
        for padded, members in by_padded_length(prompts).items():
            for part in prefill_calls(members, padded, self.rows):
                longest = max(len(prompts[i]) for i in part)
                layout = Prefill(longest)
                tokens = padded_tokens([prompts[i] for i in part], padded).to(self.policy.device)
                # no position after the longest prompt: rotary frequencies may depend on the largest one
                positions = torch.arange(padded, device=tokens.device).clamp_max(longest - 1).expand_as(tokens)
                hidden = hidden_states(self.policy, tokens, positions, layout)
                logits = self._head(torch.stack([hidden[row, len(prompts[i]) - 1] for row, i in enumerate(part)]))
                keys, values = torch.stack(layout.keys, 1), torch.stack(layout.values, 1)  # (n, layers, Hkv, padded, D)
                for row, i in enumerate(part):
                    n = len(prompts[i])
                    own = keys[row, :, :, :n].clone(), values[row, :, :, :n].clone()  # not the whole call's memory
                    done[i] = Prompt((own,), logits[row : row + 1].clone())
        return [done[i] for i in range(len(prompts))]

    def start(self, slot: int, prompt: Prompt, kept: Any = None, tokens: int = 0) -> None:
        """Copies a prefilled prompt into a slot; see `Decoder.start`."""
        first = 0
        for keys, values in prompt.parts:
            self.cache.fill(slot, keys, values, first)
            first += keys.shape[2]
        if kept is not None:
            keys, values = kept
            self.cache.fill(slot, keys[:, :, :tokens], values[:, :, :tokens], first)
        self.begun[slot] = first

    def kept(self, slot: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the keys and values (layers, Hkv, tokens, D) of the slot's own first tokens."""
        return self.cache.part(slot, self.begun[slot], tokens)

    def extended(self, prompt: Prompt, kept: tuple[torch.Tensor, torch.Tensor], logits: torch.Tensor) -> Prompt:
        """See `Decoder.extended`; nothing is copied."""
        return Prompt((*prompt.parts, kept), logits)

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a sequence of `length` tokens to another slot."""
        self.cache.move(source, target, length)
        self.begun[target] = self.begun[source]

    def step(self, newest: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One decode step for slots 0 … R−1: newest tokens (R,) at positions (R,) → next logits (R, V)."""
        count, device = len(newest), self.policy.device
        logits: list[torch.Tensor] = []
        for first, rows in calls(count, self.rows, self.cache.keys.shape[1]):
            real = min(rows, count - first)
            part = torch.zeros(2, rows, dtype=torch.int64, device=device)
            part[0, :real], part[1, :real] = newest[first : first + real], positions[first : first + real]
            layout = self.cache.step(part[1], first)
            hidden = hidden_states(self.policy, part[0].unsqueeze(1), part[1].unsqueeze(1), layout)
            logits.append(self._head(hidden[:real, 0]))
        return torch.cat(logits)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of hidden states (R, width), at batch sizes verified to be bit-exact."""
        out = []
        for first, rows in calls(len(hidden), self.head_rows, self.slots):
            part = hidden[first : first + rows]
            padding = hidden.new_zeros(rows - len(part), hidden.shape[1])
            out.append(self.policy.logits(torch.cat([part, padding]))[: len(part)])
        return torch.cat(out)


def by_padded_length(prompts: Sequence[np.ndarray]) -> dict[int, list[int]]:
    """Groups prompt indices by padded length (a multiple of PROMPT_BLOCK), shortest first."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(-(-len(prompt) // PROMPT_BLOCK) * PROMPT_BLOCK, []).append(i)
    return dict(sorted(groups.items()))


def prefill_calls(members: Sequence[int], padded: int, rows: tuple[int, ...]) -> list[list[int]]:
    """Splits prompts of one padded length into calls of verified batch sizes; a single prompt is always exact."""
    out: list[list[int]] = []
    while members:
        sizes = [n for n in range(2, len(members) + 1) if {padded, n * padded} <= {*rows}]
        size = max(sizes, default=1)
        out.append(list(members[:size]))
        members = members[size:]
    return out


def padded_tokens(prompts: Sequence[np.ndarray], padded: int) -> torch.Tensor:
    """Token ids (n, padded) int64, zeros on the right."""
    tokens = torch.zeros(len(prompts), padded, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
    return tokens
