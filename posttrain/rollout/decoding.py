"""What computes the steps of the embedded generator: the `Decoder` protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from posttrain.models.policy import Policy


class Decoder(Protocol):
    """Computes logits for the slots in use, which are always 0 … R−1.

    A sequence is a prompt that other sequences may share, and the tokens of its own slot. What a slot holds of its own
    tokens can be kept: it is the same for the same prompt and tokens, whatever else was computed.
    """

    policy: Policy
    divisible: bool
    """Whether the first tokens of what was kept can be used without the rest."""

    def prepare(self, sequences: int, longest_prompt: int, max_tokens: int, pieces: int = 0) -> None:
        """Makes room for this many sequences. A prompt may be extended by `pieces` pieces of `max_tokens` tokens."""
        ...

    def prefill(self, prompts: Sequence[np.ndarray]) -> Sequence[Any]:
        """Prefills prompts; the attribute `logits` of each are those (1, V) after its last token."""
        ...

    def start(self, slot: int, prompt: Any, kept: Any = None, tokens: int = 0) -> None:
        """Assigns a prompt to a slot, and to the slot's own tokens the first `tokens` tokens that were kept."""
        ...

    def kept(self, slot: int, tokens: int) -> Any:
        """What the slot, which is not used afterwards, holds of its own first `tokens` tokens."""
        ...

    def extended(self, prompt: Any, kept: Any, logits: torch.Tensor) -> Any:
        """A prompt followed by the tokens that were kept; `logits` (1, V) are those after them."""
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a sequence of `length` tokens to another slot."""
        ...

    def step(self, newest: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One decode step for slots 0 … R−1: newest tokens (R,) at positions (R,) → next logits (R, V)."""
        ...


def weights_seen(policy: Policy) -> list[tuple[int, int]]:
    """Changes when weights do: in-place updates increment a tensor's version, a replaced tensor has another address."""
    return [(p._version, p.data_ptr()) for p in policy.model.parameters()]
