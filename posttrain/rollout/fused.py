"""Decoding for Llama-like models in float32 on a CPU: packed weights, one kernel between products, prompts in place.

Weights are kept a second time as decoding reads them: transposed, with query, key and value and both halves of the
gated unit in one product each, LoRA merged in. At the few rows of a decode step such a product is several times as fast
as the one torch makes with the learner's layout (see docs/performance.md). A prompt's keys and values are computed
once and read where they are by every completion that continues it; a slot holds only its own tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from posttrain import kernels
from posttrain.kernels import address
from posttrain.kernels.build import library
from posttrain.models import decoder
from posttrain.models.attention import causal
from posttrain.models.invariance import ROW_COUNTS, TILE, calls, equal_row_counts
from posttrain.models.load import Policy
from posttrain.rollout.plain import by_padded_length, padded_tokens, prefill_calls

LANES = 16  # keys lie in blocks of this many tokens, values in rows of a multiple of this many numbers
BLOCK = 64  # room per sequence is a multiple of this many tokens
WIDEST_PRODUCT = 8192  # wider ones are stored and multiplied in parts


@dataclass
class Prompt:
    """A computed prompt: keys (layers, Hkv, blocks, D, 16), values (layers, Hkv, blocks, 16, room), logits (1, V)."""

    length: int
    keys: torch.Tensor
    values: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Product:
    """Linear layers whose outputs lie side by side, as one product with a transposed copy of their weights."""

    modules: tuple[Any, ...]
    weight: torch.Tensor  # (in, out)
    bias: torch.Tensor | None

    @staticmethod
    def of(dtype: torch.dtype, *modules: Any) -> Product:
        out, inner = sum(m.weight.shape[0] for m in modules), modules[0].weight.shape[1]
        bias = None if modules[0].bias is None else torch.empty(out, dtype=dtype)
        return Product(modules, torch.empty(inner, out, dtype=dtype), bias)

    def refresh(self) -> None:
        """Copies the weights as they are now, adapters merged in."""
        first = 0
        for module in self.modules:
            weight = module.weight
            if isinstance(module, LoraLayer) and not module.disable_adapters:
                for name in module.active_adapters:
                    weight = weight + module.get_delta_weight(name)  # type: ignore[operator]
            end = first + weight.shape[0]
            self.weight[:, first:end].copy_(weight.t())
            if self.bias is not None:
                self.bias[first:end].copy_(module.bias)
            first = end

    def into(self, rows: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
        """The call that multiplies rows (R, in) into out (R, out)."""
        if self.weight.dtype != rows.dtype:
            return partial(self._narrow, rows, out)
        if self.bias is None:
            return partial(torch.mm, rows, self.weight, out=out)
        return partial(torch.addmm, self.bias, rows, self.weight, out=out)

    def _narrow(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """The same with operands and result rounded to the weight's dtype."""
        narrow = rows.to(self.weight.dtype)
        made = narrow @ self.weight if self.bias is None else torch.addmm(self.bias, narrow, self.weight)
        out.copy_(made)


class _Shape(ctypes.Structure):
    """`Shape` of kernels.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "heads kv_heads width room blocks threads scratch".split()),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    ]


class FusedDecoder:
    """`Decoder` of rollout/engine.py. Moving a sequence to another slot renames slots and copies nothing.

    `dtype` is that of the packed weights and of the products with them; everything between them stays in float32.
    """

    def __init__(self, policy: Policy, slots: int, dtype: torch.dtype = torch.float32) -> None:
        self.policy, self.slots = policy, slots
        body: Any = policy.body
        self.body, self.config, self.width = body, policy.config, decoder.head_width(policy.config)
        self.layers = [_layer_products(layer, dtype) for layer in body.layers]
        self.head = _head_products(policy.head, dtype)
        products = [p for layer in self.layers for p in layer]
        like = policy.head.weight.new_empty(0, dtype=dtype)
        shapes = [tuple(p.weight.t().shape) for p in products]
        self.rows = equal_row_counts(shapes, max(ROW_COUNTS), like, "columns")  # type: ignore[arg-type]
        head_shapes = [tuple(p.weight.t().shape) for p in self.head]
        self.step_rows = equal_row_counts([*shapes, *head_shapes], slots, like, "columns")  # type: ignore[arg-type]
        self._seen: tuple[int, ...] = ()
        self._room = (0, 0, 0)
        self._threads = 0

    def prepare(self, sequences: int, longest_prompt: int, max_tokens: int) -> None:
        """Makes room for so many sequences of this length and takes over weights that have changed."""
        used = min(self.slots, -(-sequences // TILE) * TILE)
        wanted = (used, *(-(-n // BLOCK) * BLOCK for n in (max_tokens, longest_prompt + max_tokens)))
        room = tuple(max(pair) for pair in zip(wanted, self._room, strict=True))
        if room != self._room or torch.get_num_threads() != self._threads:
            self._room, self._threads = room, torch.get_num_threads()
            self._allocate(*room)
        seen = tuple(p._version for p in self.policy.model.parameters())  # every change in place counts it up
        if seen != self._seen:
            for product in (*(p for layer in self.layers for p in layer), *self.head):
                product.refresh()
            self._seen = seen

    def prefill(self, prompts: Sequence[np.ndarray]) -> list[Prompt]:
        """Computes prompts, several in one call where that cannot change their bits."""
        done: dict[int, Prompt] = {}
        for padded, members in by_padded_length(prompts).items():
            for part in prefill_calls(members, padded, self.rows):
                made = self._prefill([prompts[i] for i in part], padded)
                done.update(zip(part, made, strict=True))
        return [done[i] for i in range(len(prompts))]

    def start(self, slot: int, prompt: Prompt) -> None:
        """Lets a slot continue a prompt."""
        place = self.place[slot]
        self.prompt[place] = prompt  # keeps it alive while it is read
        self.shared[:, place] = (prompt.length, prompt.keys.data_ptr(), prompt.values.data_ptr())

    def move(self, source: int, target: int, length: int) -> None:
        """Continues a sequence in another slot; the two slots change places."""
        self.place[source], self.place[target] = self.place[target], self.place[source]

    def step(self, newest: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Feeds slots 0 … R−1 their newest tokens (R,) at positions (R,) and returns the next logits (R, V)."""
        out: list[torch.Tensor] = []
        for first, rows in calls(len(newest), self.step_rows, len(self.place)):
            real = min(rows, len(newest) - first)
            places = self.place[first : first + real]
            self.at[0, :real], self.at[1, :real] = torch.from_numpy(places), positions[first : first + real]
            self.at[2:, :real] = torch.from_numpy(self.shared[:, places])
            self.count.value = real
            torch.index_select(self.body.embed_tokens.weight, 0, newest[first : first + real], out=self.x[:real])
            plan = self.plans.get(rows) or self.plans.setdefault(rows, self._plan(rows))
            for operation in plan:
                operation()
            out.append(self.logits[:real])
        return out[0] if len(out) == 1 else torch.cat([part.clone() for part in out])

    def _allocate(self, slots: int, own: int, longest: int) -> None:
        config, like = self.config, self.policy.head.weight
        kv, room = config.num_key_value_heads, -(-self.width // LANES) * LANES
        most, wide = max(c for c in self.step_rows if c <= slots), (config.num_attention_heads + 2 * kv) * self.width
        self.keys = like.new_zeros(config.num_hidden_layers, slots, kv, own // LANES, self.width, LANES)
        self.values = like.new_zeros(config.num_hidden_layers, slots, kv, own, room)
        self.place = np.arange(slots)  # slot → where its keys lie
        self.prompt: list[Prompt | None] = [None] * slots
        self.shared = np.zeros((3, slots), np.int64)  # prompt length and the addresses of its keys and values
        self.at = torch.zeros(5, most, dtype=torch.int64)  # per row: place, position, and those three
        self.count = ctypes.c_int64(0)
        self.x, self.y = like.new_zeros(most, config.hidden_size), like.new_zeros(most, config.hidden_size)
        self.delta = torch.zeros_like(self.x)
        self.qkv = like.new_zeros(most, wide)
        self.attended = like.new_zeros(most, config.num_attention_heads * self.width)
        self.gates = like.new_zeros(most, 2 * config.intermediate_size)
        self.gated = like.new_zeros(most, config.intermediate_size)
        self.logits = like.new_zeros(most, self.policy.vocab)
        self.angles = decoder.angles(self.body, torch.arange(longest))
        self.scratch = like.new_zeros(self._threads, longest + 2 * LANES)
        self.shape = _Shape(
            config.num_attention_heads, kv, self.width, room, own // LANES, self._threads, self.scratch.shape[1],
            self.body.layers[0].self_attn.scaling, config.rms_norm_eps,
        )  # fmt: skip
        self.plans: dict[int, list[Callable[[], Any]]] = {}

    def _plan(self, rows: int) -> list[Callable[[], Any]]:
        """Every call of one decode step of so many rows, in order, with its arguments."""
        x, y, delta = self.x[:rows], self.y[:rows], self.delta[:rows]
        qkv, attended, gates, gated = self.qkv[:rows], self.attended[:rows], self.gates[:rows], self.gated[:rows]
        norm = kernels.norm_into
        plan: list[Callable[[], Any]] = []
        for i, (layer, (product, out, gate_up, down)) in enumerate(zip(self.body.layers, self.layers, strict=True)):
            first, second = layer.input_layernorm, layer.post_attention_layernorm
            plan += [
                partial(norm, x, delta if i else None, first.weight, first.variance_epsilon, x, y),
                product.into(y, qkv),
                self._attend(layer, i),
                out.into(attended, delta),
                partial(norm, x, delta, second.weight, second.variance_epsilon, x, y),
                gate_up.into(y, gates),
                partial(kernels.swiglu_halves, gates, gated),
                down.into(gated, delta),
            ]
        last = self.body.norm
        plan.append(partial(norm, x, delta, last.weight, last.variance_epsilon, x, y))
        parts = self.logits[:rows].split([p.weight.shape[1] for p in self.head], dim=1)
        return [*plan, *(p.into(y, part) for p, part in zip(self.head, parts, strict=True))]

    def _attend(self, layer: Any, index: int) -> Callable[[], Any]:
        made = library()
        assert made is not None
        norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        tensors = [self.qkv, *(n and n.weight for n in norms), *self.angles, *self.at]
        rest = [self.keys[index], self.values[index], self.attended, self.scratch]
        return partial(
            made.functions.decode_attention,
            *(address(t) for t in tensors), ctypes.c_int64(index), *(address(t) for t in rest),
            ctypes.byref(self.count), ctypes.byref(self.shape),
        )  # fmt: skip

    def _prefill(self, prompts: Sequence[np.ndarray], padded: int) -> list[Prompt]:
        """Prompts of one padded length in one pass."""
        config, n = self.config, len(prompts)
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        turns = decoder.angles(self.body, torch.arange(padded).repeat(n))
        x: torch.Tensor = self.body.embed_tokens(padded_tokens(prompts, padded)).view(n * padded, -1)
        delta: torch.Tensor | None = None
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer, (product, out, gate_up, down) in zip(self.body.layers, self.layers, strict=True):
            x, y = decoder.norm(layer.input_layernorm, x, delta)
            query, key, value = _times(product, y).view(n * padded, -1, self.width).split((heads, kv, kv), 1)
            query, key = decoder.turned(layer.self_attn, query, key, turns)
            rows = [part.unflatten(0, (n, padded)).transpose(1, 2) for part in (query, key, value)]
            kept.append((rows[1], rows[2]))
            attended = causal(rows[0], rows[1], rows[2], layer.self_attn.scaling).transpose(1, 2)
            delta = _times(out, attended.reshape(n * padded, -1))
            x, y = decoder.norm(layer.post_attention_layernorm, x, delta)
            gates = _times(gate_up, y)
            gated = gates.new_empty(len(y), config.intermediate_size)
            kernels.swiglu_halves(gates, gated)
            delta = _times(down, gated)
        last = torch.tensor([row * padded + len(prompt) - 1 for row, prompt in enumerate(prompts)])
        assert delta is not None
        logits = self._head_of(decoder.norm(self.body.norm, x[last], delta[last])[1])
        keys, values = (torch.stack([layer[i] for layer in kept], 1) for i in (0, 1))  # (n, layers, Hkv, padded, D)
        keys = keys.unflatten(3, (-1, LANES)).transpose(4, 5)
        values = torch.nn.functional.pad(values, (0, -self.width % LANES)).unflatten(3, (-1, LANES))
        return [
            Prompt(n, keys[i, :, :, :blocks].contiguous(), values[i, :, :, :blocks].contiguous(), logits[i : i + 1])
            for i, (n, blocks) in enumerate((len(p), -(-len(p) // LANES)) for p in prompts)
        ]

    def _head_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of normed hidden states (R, width), at proven row counts."""
        out: list[torch.Tensor] = []
        for first, rows in calls(len(hidden), self.step_rows, len(self.place)):
            part = hidden[first : first + rows]
            whole = torch.cat([part, part.new_zeros(rows - len(part), part.shape[1])])
            out.append(torch.cat([_times(p, whole) for p in self.head], 1)[: len(part)])
        return torch.cat(out)


def _times(product: Product, rows: torch.Tensor) -> torch.Tensor:
    out = rows.new_empty(len(rows), product.weight.shape[1])
    product.into(rows, out)()
    return out


def _layer_products(layer: Any, dtype: torch.dtype) -> tuple[Product, Product, Product, Product]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        Product.of(dtype, attention.q_proj, attention.k_proj, attention.v_proj),
        Product.of(dtype, attention.o_proj),
        Product.of(dtype, mlp.gate_proj, mlp.up_proj),
        Product.of(dtype, mlp.down_proj),
    )


class _Part:
    """Some rows of a weight, as a linear layer."""

    def __init__(self, module: Any, first: int) -> None:
        self._module, self._rows = module, slice(first, first + WIDEST_PRODUCT)

    @property
    def weight(self) -> torch.Tensor:
        return self._module.weight[self._rows]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self._module.bias is None else self._module.bias[self._rows]


def _head_products(head: Any, dtype: torch.dtype) -> list[Product]:
    return [Product.of(dtype, _Part(head, first)) for first in range(0, head.weight.shape[0], WIDEST_PRODUCT)]
