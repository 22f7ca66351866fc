"""A loaded model with its tokenizer, and its forward pass over rows: packed into one call, or one row at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.models import decoder, lora
from posttrain.models.attention import NAME, Layout, Unsupported
from posttrain.models.packing import Packed

Cache = dict[str, Any]
"""What a model keeps of the tokens it has read, as keyword arguments of its next call."""
_guard = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # one for each decoder
CACHES = ("cache", "past_key_values", "cache_params")  # what versions of transformers call a model's cache


@dataclass(frozen=True)
class LogitRule:
    """What a model does to the output layer's product x: cap · tanh(scale · x / cap), or scale · x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """Product of the output layer (…, V) → the model's logits (…, V)."""
        scaled = product if self.scale == 1.0 else product * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


@dataclass(frozen=True)
class Route:
    """How a model is computed; found by the load check (models/check.py).

    Rows of at most `reach` tokens are packed; longer ones are computed one at a time by transformers' own attention
    (`own`). `cached`: whether the model's own cache gives the same results as whole rows. A sequence may not grow past
    `turn` tokens while it is sampled, because the rotary angles of all its tokens change there; 0: no such length.
    """

    reach: float = math.inf
    own: str = "sdpa"
    cached: bool = True
    turn: int = 0
    rule: LogitRule = field(default_factory=LogitRule)


@dataclass
class Policy:
    """A model with its tokenizer and stop tokens, and optionally a scalar head."""

    model: Any  # PreTrainedModel or PeftModel
    tokenizer: Any
    source: str
    stop_ids: tuple[int, ...]
    scalar: nn.Linear | None = None  # width → scores or values, for reward models and critics (models/heads.py)
    route: Route = field(default_factory=Route)
    notes: list[str] = field(default_factory=list[str])  # for the user, on how the model is computed

    @property
    def body(self) -> nn.Module:
        """The decoder without its output layer."""
        inner = lora.unwrap(self.model)
        found = inner.get_decoder()
        return inner.model if found is inner else found  # Llama 4 returns itself

    @property
    def head(self) -> nn.Linear:
        """The output layer; its product becomes logits by `route.rule`."""
        return lora.unwrap(self.model).get_output_embeddings()

    @property
    def config(self) -> Any:
        """The configuration of the language model; that of a model with eyes or ears has other parts too."""
        return lora.unwrap(self.model).config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def notes_as(self, role: str) -> list[str]:
        """The notes on a model that a run loads beside the one it trains, each with its role."""
        return [f"{role}: {note}" for note in self.notes]

    @property
    def vocab(self) -> int:
        return self.head.weight.shape[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states (…, width) → the model's logits (…, V)."""
        return self.route.rule.apply(self.head(hidden))


def states(
    policy: Policy,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    shared: Sequence[tuple[int, int]],
    where: torch.Tensor,
) -> torch.Tensor:
    """Last hidden states (K, width) at `where` (K,) among the N tokens of rows with `lengths` (B,), row after row.

    Prefixes that rows share (see `Packed`) are computed once in a packed pass. If any row is longer than the model's
    `route.reach`, all rows are computed one at a time, and nothing is shared.
    """
    if int(lengths.max()) > policy.route.reach:
        return by_rows(policy, tokens, lengths).index_select(0, where)
    layout = Packed(lengths, shared)
    hidden = hidden_states(policy, tokens[layout.kept].unsqueeze(0), layout.positions, layout)[0]
    return hidden.index_select(0, layout.index[where])


def hidden_states(policy: Policy, tokens: torch.Tensor, positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Packed forward pass: tokens and positions (b, t) int64 → last hidden states (b, t, width)."""
    body = policy.body
    if decoder.fits(body):
        return decoder.forward(body, tokens, positions, layout)
    with attention(body, NAME):
        return body(input_ids=tokens, position_ids=positions, use_cache=False, layout=layout).last_hidden_state


def by_rows(policy: Policy, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Last hidden states (N, width) of rows with N tokens in total, each row by its own call of the unchanged model."""
    body = policy.body
    rows: list[torch.Tensor] = []
    for row in tokens.split([int(n) for n in lengths.tolist()]):
        with attention(body, policy.route.own):
            forget_lengths(body)
            rows.append(body(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0])
    return torch.cat(rows)


def advance(policy: Policy, tokens: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
    """Feeds tokens (n,) of one sequence after those in `cache` → last hidden states (n, width) and the new cache.

    The cache is the model's own, under the name that its forward pass gives it; an empty one starts a sequence.
    """
    body = policy.body
    with attention(body, policy.route.own):
        out = body(input_ids=tokens.unsqueeze(0), use_cache=True, **cache)
    name = next((name for name in CACHES if out.get(name) is not None), "")
    return out.last_hidden_state[0], {name: out[name]} if name else {}


@contextmanager
def attention(body: nn.Module, name: str) -> Iterator[None]:
    """Within the block, the decoder uses an attention function by its transformers name.

    The name is part of the model, so other threads that compute with the same model wait.
    """
    with _guard:
        lock = _locks.setdefault(body, threading.RLock())
    with lock:
        use_attention(body, name)
        yield


def use_attention(body: Any, name: str) -> None:
    """Switches the decoder to an attention function by its transformers name. Raises Unsupported if it has only one."""
    if body.config._attn_implementation != name:
        body.set_attn_implementation(name)
        if body.config._attn_implementation != name:
            raise Unsupported("its layers do not use transformers' attention interface")


def forget_lengths(body: nn.Module) -> None:
    """Resets rotary embeddings whose frequencies grow with the longest sequence seen (dynamic NTK scaling)."""
    for module in body.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            start = torch.zeros(1, 1, dtype=torch.int64, device=module.inv_freq.device)  # type: ignore[union-attr]
            module(torch.zeros(1, device=start.device), start)


def learner_mode(policy: Policy) -> None:
    """Prepares the model for a differentiable pass: without dropout or other noise, so that it is the model sampled.

    Only the layers' flag that switches gradient checkpointing on is that of training; see `checkpoint_layers`.
    """
    policy.model.eval()
    for layer in policy.body.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = True


def checkpoint_layers(policy: Policy) -> None:
    """Turns on gradient checkpointing; a checkpointed layer computes as in evaluation, without dropout."""
    inner = lora.unwrap(policy.model)
    inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    inner.enable_input_require_grads()
    for layer in policy.body.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer._gradient_checkpointing_func = _Quiet(layer, layer._gradient_checkpointing_func)  # type: ignore[assignment]


@dataclass(frozen=True)
class _Quiet:
    """A checkpointing function that clears the layer's training flag while the layer is computed."""

    layer: nn.Module
    checkpoint: Any

    def __call__(self, function: Any, *args: Any) -> Any:
        def quiet(*inner: Any) -> Any:
            before, self.layer.training = self.layer.training, False
            try:
                return function(*inner)
            finally:
                self.layer.training = before

        return self.checkpoint(quiet, *args)
