"""Fused CPU decoder for Llama-like models in float32: packed weights, fused kernels and a shared prompt KV cache.

A second copy of the weights is packed for decoding (see products.py), with fused QKV and gate/up projections and LoRA
merged in. The keys and values of a prompt are computed once and read in place by all of its completions; a slot holds
only the generated tokens. Every sum in a step has a fixed order, so the results of a sequence are bit-exact at any
batch size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from posttrain.models import decoder, kernels
from posttrain.models.load import Policy
from posttrain.models.packing import Packed
from posttrain.rollout.decoding import weights_seen
from posttrain.rollout.products import Product, product_of, times

LANES = 16  # tokens per block of keys; row lengths of values are padded to a multiple of it
BLOCK = 64  # cache capacity per sequence is a multiple of this many tokens
PREFILL = 4096  # prompt tokens per prefill pass


@dataclass(frozen=True)
class Part:
    """Tokens that sequences share: keys (layers, Hkv, blocks, D, 16) and values (layers, Hkv, blocks, 16, room)."""

    length: int
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Prompt:
    """A prefilled prompt, and the pieces that extend it; logits (1, V) after the last token."""

    parts: tuple[Part, ...]
    logits: torch.Tensor

    @cached_property
    def table(self) -> np.ndarray:
        """`Part` of attention.c for each part: (parts, 3) int64."""
        return np.array([(p.length, p.keys.data_ptr(), p.values.data_ptr()) for p in self.parts], np.int64)


class _Shape(ctypes.Structure):
    """`Shape` of attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "heads kv_heads width room blocks threads scratch".split()),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    ]


class _Prompts(Packed):
    """Packed layout for prefill; keeps every layer's keys and values (Hkv, M, D)."""

    def __init__(self, lengths: torch.Tensor) -> None:
        super().__init__(lengths)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.kept.append((key[0].contiguous(), value[0].contiguous()))  # a view would keep the whole product
        return super().attend(layer, query, key, value, scale)


@dataclass(frozen=True)
class _Layer:
    """The matrix products of one layer."""

    qkv: Product
    out: Product
    gates: Product
    down: Product

    @staticmethod
    def of(layer: Any, dtype: torch.dtype) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            product_of(dtype, attention.q_proj, attention.k_proj, attention.v_proj),
            product_of(dtype, attention.o_proj),
            product_of(dtype, mlp.gate_proj, mlp.up_proj),
            product_of(dtype, mlp.down_proj),
        )

    def linears(self, config: Any, parts: Sequence[int]) -> decoder.Linears:
        """The products as functions of rows; `parts` are the widths of query, key and value."""
        width, unit = config.hidden_size, config.intermediate_size
        return decoder.Linears(
            lambda rows: times(self.qkv, rows, sum(parts)).split(list(parts), 1),
            lambda rows: times(self.out, rows, width),
            lambda rows: times(self.gates, rows, 2 * unit).chunk(2, 1),
            lambda rows: times(self.down, rows, width),
        )


class FusedDecoder:
    """`Decoder` of rollout/decoding.py. Moving a sequence to another slot swaps indices and copies no tensors.

    `dtype` applies to the layers' matrix products; everything else, including the output layer, is in float32.
    """

    divisible = True

    def __init__(self, policy: Policy, slots: int, dtype: torch.dtype = torch.float32) -> None:
        self.policy, self.slots = policy, slots
        body: Any = policy.body
        self.body, self.config, self.width = body, policy.config, decoder.head_width(policy.config)
        self.layers = [_Layer.of(layer, dtype) for layer in body.layers]
        self.head = product_of(torch.float32, policy.head)
        heads, kv = self.config.num_attention_heads, self.config.num_key_value_heads
        parts = [n * self.width for n in (heads, kv, kv)]
        self.linears = [layer.linears(self.config, parts) for layer in self.layers]
        self._seen: list[tuple[int, int]] = []
        self._room = (0, 0, 0, 0)
        self._threads = 0

    def prepare(self, sequences: int, longest_prompt: int, max_tokens: int, pieces: int = 0) -> None:
        """Allocates the cache for this many sequences of this length and repacks weights that have changed."""
        used, threads = min(self.slots, sequences), torch.get_num_threads()
        longest = longest_prompt + max_tokens
        wanted = (used, *(-(-n // BLOCK) * BLOCK for n in (max_tokens, longest, longest + (pieces + 2) * LANES)))
        room = tuple(max(pair) for pair in zip(wanted, self._room, strict=True))
        bound = (room, threads) == (self._room, self._threads)
        if room[:2] != self._room[:2]:
            self._allocate(*room[:2])
        if not bound:
            self._room, self._threads = room, threads
            self._reach(*room[1:])
        self.prompt[:] = [None] * len(self.prompt)  # release the prompts of the last call
        seen = weights_seen(self.policy)
        if seen != self._seen:
            for layer in self.layers:
                for product in (layer.qkv, layer.out, layer.gates, layer.down):
                    product.refresh()
            self.head.refresh()
        if seen != self._seen or not bound:
            self.plan, self._seen = self._plan(), seen

    def prefill(self, prompts: Sequence[np.ndarray]) -> list[Prompt]:
        """Prefills prompts, about PREFILL tokens per pass."""
        done: list[Prompt] = []
        while len(done) < len(prompts):
            remaining = prompts[len(done) :]
            fit = int(np.searchsorted(np.cumsum([len(p) for p in remaining]), PREFILL, side="right"))
            done += self._prefill(remaining[: max(1, fit)])
        return done

    def start(self, slot: int, prompt: Prompt, kept: Part | None = None, tokens: int = 0) -> None:
        """Assigns a prefilled prompt to a slot; see `Decoder.start`."""
        place = self.place[slot]
        self.prompt[place] = prompt  # keeps it alive while its address is in use
        table = prompt.table
        self.shared[:, place] = (table[:, 0].sum(), len(table), table.ctypes.data)
        if kept is not None:
            blocks = -(-tokens // LANES)
            self.keys[:, place, :, :blocks] = kept.keys[:, :, :blocks]
            self.values[:, place, :, : blocks * LANES] = kept.values[:, :, :blocks].flatten(2, 3)

    def kept(self, slot: int, tokens: int) -> Part:
        """A copy of the keys and values of the slot's own first tokens."""
        place, blocks = self.place[slot], -(-tokens // LANES)
        keys = self.keys[:, place, :, :blocks].clone(memory_format=torch.contiguous_format)
        values = self.values[:, place, :, : blocks * LANES].clone(memory_format=torch.contiguous_format)
        return Part(tokens, keys, values.unflatten(2, (-1, LANES)))

    def extended(self, prompt: Prompt, kept: Part, logits: torch.Tensor) -> Prompt:
        """See `Decoder.extended`; nothing is copied."""
        return Prompt((*prompt.parts, kept), logits)

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a sequence to another slot by swapping the two slots."""
        self.place[source], self.place[target] = self.place[target], self.place[source]

    def step(self, newest: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One decode step for slots 0 … R−1: newest tokens (R,) at positions (R,) → next logits (R, V).

        The logits are valid until the next step.
        """
        count = self.count.value = len(newest)
        places = self.place[:count]
        self.at[0, :count], self.at[1, :count] = torch.from_numpy(places), positions
        self.at[2:, :count] = torch.from_numpy(self.shared[:, places])
        torch.index_select(self.body.embed_tokens.weight, 0, newest, out=self.x[:count])
        for operation in self.plan:
            operation()
        return self.logits[:count]

    def _allocate(self, slots: int, own: int) -> None:
        """Allocates the cache and the buffers for `slots` sequences, each of `own` tokens after its prompt."""
        config, like = self.config, self.policy.head.weight
        kv, room = config.num_key_value_heads, -(-self.width // LANES) * LANES
        wide = (config.num_attention_heads + 2 * kv) * self.width
        self.keys = like.new_zeros(config.num_hidden_layers, slots, kv, own // LANES, self.width, LANES)
        self.values = like.new_zeros(config.num_hidden_layers, slots, kv, own, room)
        self.place = np.arange(slots)  # slot → cache index
        self.prompt: list[Prompt | None] = [None] * slots
        self.shared = np.zeros((3, slots), np.int64)  # prompt length, its parts and the address of their table
        self.at = torch.zeros(
            5, slots, dtype=torch.int64
        )  # per row: cache index, position, and the three rows of `shared`
        self.count = ctypes.c_int64(0)
        self.x, self.y = like.new_zeros(slots, config.hidden_size), like.new_zeros(slots, config.hidden_size)
        self.delta = torch.zeros_like(self.x)
        self.qkv = like.new_zeros(slots, wide)
        self.attended = like.new_zeros(slots, config.num_attention_heads * self.width)
        self.gates = like.new_zeros(slots, 2 * config.intermediate_size)
        self.gated = like.new_zeros(slots, config.intermediate_size)
        self.logits = like.new_zeros(slots, self.policy.vocab)

    def _reach(self, own: int, longest: int, padded: int) -> None:
        """Prepares for sequences of at most `longest` tokens, of which `own` come after the prompt; `padded`: with all
        parts rounded up to whole blocks."""
        config = self.config
        heads, kv, room = config.num_attention_heads, config.num_key_value_heads, -(-self.width // LANES) * LANES
        self.angles = decoder.angles(self.body, torch.arange(longest))
        self.scratch = self.x.new_zeros(self._threads, padded)
        self.shape = _Shape(
            heads, kv, self.width, room, own // LANES, self._threads, padded, self.body.layers[0].self_attn.scaling,
            config.rms_norm_eps,
        )  # fmt: skip

    def _plan(self) -> list[Callable[[], Any]]:
        """All calls of a decode step with bound arguments, in order; `count` holds the number of rows."""
        x, y, delta, count, width = self.x, self.y, self.delta, self.count, self.config.hidden_size
        unit = self.config.intermediate_size

        def norm(module: Any, added: torch.Tensor | None) -> Callable[[], Any]:
            eps = float(module.variance_epsilon)
            return kernels.bound("rms_norm", x, added, module.weight, x, y, None, count, width, eps)

        half = self.gates[:, unit:]
        plan: list[Callable[[], Any]] = []
        for i, (layer, products) in enumerate(zip(self.body.layers, self.layers, strict=True)):
            plan += [
                norm(layer.input_layernorm, delta if i else None),
                products.qkv.into(y, self.qkv, count),
                self._attend(layer, i),
                products.out.into(self.attended, delta, count),
                norm(layer.post_attention_layernorm, delta),
                products.gates.into(y, self.gates, count),
                kernels.bound("swiglu", self.gates, half, self.gated, count, unit, 2 * unit),
                products.down.into(self.gated, delta, count),
            ]
        return [*plan, norm(self.body.norm, delta), self.head.into(y, self.logits, count)]

    def _attend(self, layer: Any, index: int) -> Callable[[], Any]:
        norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        tensors = [self.qkv, *(n and n.weight for n in norms), *self.angles, *self.at]
        rest = [self.keys[index], self.values[index], self.attended, self.scratch]
        return kernels.bound("decode_attention", *tensors, index, *rest, self.count, ctypes.byref(self.shape))

    def _prefill(self, prompts: Sequence[np.ndarray]) -> list[Prompt]:
        """Prefills concatenated prompts in one pass."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.from_numpy(np.concatenate(prompts).astype(np.int64)).unsqueeze(0)
        layout = _Prompts(lengths)
        hidden = decoder.forward(self.body, tokens, layout.positions, layout, self.linears)[0]
        ends = lengths.cumsum(0)
        logits = times(self.head, hidden[ends - 1], self.policy.vocab)
        out: list[Prompt] = []
        for row, (n, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
            own = [torch.stack([layer[i][:, end - n : end] for layer in layout.kept]) for i in (0, 1)]
            keys = F.pad(own[0], (0, 0, 0, -n % LANES)).unflatten(2, (-1, LANES)).transpose(3, 4).contiguous()
            values = F.pad(own[1], (0, -self.width % LANES, 0, -n % LANES)).unflatten(2, (-1, LANES))
            out.append(Prompt((Part(n, keys, values),), logits[row : row + 1].clone()))
        return out
