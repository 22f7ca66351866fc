"""Decoder on the unchanged model, with transformers' own attention and the model's own cache: slow, and always right.

Each sequence is computed by itself, one row to a call, so its results are bit-exact whatever else is sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.models.policy import Cache, Policy, advance, by_rows


@dataclass
class Prompt:
    """A prefilled prompt: its tokens [n], the model's cache after them, and logits (1, V) after the last one."""

    tokens: list[int]
    cache: Cache
    logits: torch.Tensor


@dataclass
class Read:
    """A sequence of tokens and the model's cache after them."""

    tokens: list[int]
    cache: Cache


class GeneralDecoder:
    """`Decoder` of rollout/decoding.py. Each completion has its own copy of its prompt's cache.

    Where the model's cache does not reproduce its own forward pass (`route.cached`), each step computes whole rows.
    """

    divisible = False  # a cache may be a state of all tokens read

    def __init__(self, policy: Policy, slots: int) -> None:
        self.policy, self.slots = policy, slots
        self.sequences: list[Read | None] = [None] * slots

    def prepare(self, sequences: int, longest_prompt: int, max_tokens: int, pieces: int = 0) -> None:
        """Releases the sequences of the last call."""
        self.sequences = [None] * self.slots

    def prefill(self, prompts: Sequence[np.ndarray]) -> list[Prompt]:
        """Prefills prompts one at a time."""
        done: list[Prompt] = []
        for prompt in prompts:
            tokens = prompt.astype(np.int64).tolist()
            logits, cache = self._next(tokens, tokens, {})
            done.append(Prompt(tokens, cache, logits))
        return done

    def start(self, slot: int, prompt: Prompt, kept: Read | None = None, tokens: int = 0) -> None:
        """Copies a prefilled prompt's cache, or all that was kept of a longer sequence, into a slot."""
        begun = kept or prompt
        self.sequences[slot] = Read(list(begun.tokens), copy.deepcopy(begun.cache))

    def kept(self, slot: int, tokens: int) -> Read:
        """The whole sequence of a slot: its cache cannot be cut."""
        sequence = self.sequences[slot]
        assert sequence is not None, "call `start` first"
        return sequence

    def extended(self, prompt: Prompt, kept: Read, logits: torch.Tensor) -> Prompt:
        """See `Decoder.extended`."""
        return Prompt(kept.tokens, kept.cache, logits)

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a sequence to another slot."""
        self.sequences[target], self.sequences[source] = self.sequences[source], None

    def step(self, newest: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One decode step for slots 0 … R−1: newest tokens (R,) at positions (R,) → next logits (R, V)."""
        rows: list[torch.Tensor] = []
        for slot, token in enumerate(newest.tolist()):
            sequence = self.sequences[slot]
            assert sequence is not None, "call `start` first"
            sequence.tokens.append(token)
            logits, sequence.cache = self._next([token], sequence.tokens, sequence.cache)
            rows.append(logits)
        return torch.cat(rows)

    def _next(self, new: list[int], whole: list[int], cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Logits (1, V) after a sequence of which `new` are the tokens not in the cache, and the cache after them."""
        device = self.policy.device
        if self.policy.route.cached:
            hidden, cache = advance(self.policy, torch.tensor(new, device=device), cache)
        else:
            hidden = by_rows(self.policy, torch.tensor(whole, device=device), torch.tensor([len(whole)]))
        return self.policy.logits(hidden[-1:]), cache
