"""One attention function for every Hugging Face causal LM: packed rows for the learner, KV-cache slots for the sampler.

transformers looks up attention by name and passes keyword arguments through the model, so a *layout* object passed as
`model(..., layout=…)` reaches each layer and decides what the tokens of the call attend to. The modelling code is
unmodified transformers code, and no padding token goes through a linear layer.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "posttrain"
KEY_BLOCK = 16  # keys are read in multiples of this; masked keys add exact zeros
QUERY_ROWS = 4  # minimum number of query rows: a single row would use another kernel, which rounds differently


class Unsupported(ValueError):
    """A layer asks for attention that the packed pass does not have."""


class Layout(Protocol):
    """What the tokens of one model call attend to."""

    longest: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query (b, Hq, t, D), key and value (b, Hkv, t, D) → (b, t, Hq, D)."""
        ...


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls in each layer. Raises Unsupported for options it does not have."""
    if layout is None:
        raise Unsupported("its attention was called without a packed layout (posttrain.models.policy.states has one)")
    if sliding_window is not None and layout.longest > sliding_window:
        raise Unsupported(f"a sequence of {layout.longest} tokens is longer than its window of {sliding_window}")
    if attention_mask is not None:
        raise Unsupported("its layers mask attention themselves")
    if softcap is not None:
        raise Unsupported("the packed pass has no attention soft-capping")
    if s_aux is not None:
        raise Unsupported("the packed pass has no attention sinks")
    if dropout:
        raise Unsupported("the packed pass has no attention dropout")
    if value.shape[-1] != query.shape[-1]:
        raise Unsupported("its keys and values have different widths")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return layout.attend(int(module.layer_idx), query, key, value, scale), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, attention)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention over whole rows: query (b, Hq, t, D), key and value (b, Hkv, t, D) → (b, Hq, t, D)."""
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)


class Prefill:
    """Layout for prefill: prompts padded to one length, of at most `longest` tokens without the padding.

    Keeps every layer's keys and values for the slots.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.keys: list[torch.Tensor] = []  # per layer (n, Hkv, padded length, D)
        self.values: list[torch.Tensor] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.keys.append(key)
        self.values.append(value)
        return causal(query, key, value, scale).transpose(1, 2)


class SlotCache:
    """KV cache of `slots` sequences with `capacity` tokens each, and the layout of one decode step.

    Keys are stored with the token dimension last, so that the product with a query reads memory in order.
    """

    def __init__(self, layers: int, slots: int, heads: int, capacity: int, width: int, like: torch.Tensor) -> None:
        self.keys = like.new_zeros(layers, slots, heads, width, capacity)
        self.values = like.new_zeros(layers, slots, heads, capacity, width)
        self.capacity = capacity
        self.longest = self.first = 0
        self.rows = self.positions = self.hidden = torch.empty(0)

    def step(self, positions: torch.Tensor, first: int = 0) -> SlotCache:
        """Prepares a decode step: slots first … first + R − 1 write their next token at positions (R,) int64."""
        self.longest, self.first = int(positions.max()) + 1, first
        keys = min(-(-self.longest // KEY_BLOCK) * KEY_BLOCK, self.capacity)
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device)
        self.hidden = torch.arange(keys, device=positions.device) > positions.view(-1, 1, 1, 1)
        return self

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        count, heads, _, width = query.shape
        slots = slice(self.first, self.first + count)
        keys, values = self.keys[layer, slots], self.values[layer, slots]
        keys[self.rows, :, :, self.positions] = key[:, :, 0]
        values[self.rows, :, self.positions] = value[:, :, 0]
        seen, groups = self.hidden.shape[-1], heads // keys.shape[1]
        grouped = (query * scale).view(count, keys.shape[1], groups, width)
        scores = torch.matmul(_rows(grouped), keys[..., :seen])[:, :, :groups].masked_fill(self.hidden, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        return torch.matmul(_rows(weights), values[:, :, :seen])[:, :, :groups].reshape(count, 1, heads, width)

    def fill(self, slot: int, keys: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Copies keys and values (layers, Hkv, n, D) to tokens first … first + n − 1 of a slot."""
        end = first + keys.shape[2]
        self.keys[:, slot, :, :, first:end] = keys.transpose(2, 3)
        self.values[:, slot, :, first:end] = values

    def part(self, slot: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the keys and values (layers, Hkv, count, D) of tokens first … first + count − 1 of a slot."""
        keys = self.keys[:, slot, :, :, first : first + count].transpose(2, 3)
        values = self.values[:, slot, :, first : first + count]
        return keys.clone(memory_format=torch.contiguous_format), values.clone(memory_format=torch.contiguous_format)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one slot over another."""
        self.keys[:, target, :, :, :length] = self.keys[:, source, :, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]


def _rows(part: torch.Tensor) -> torch.Tensor:
    """Repeats rows of (R, H, n, D) so that n is at least QUERY_ROWS."""
    n = part.shape[2]
    return part if n >= QUERY_ROWS else part.repeat(1, 1, -(-QUERY_ROWS // n), 1)
