"""Forward pass of Llama-like models with fused operations between the matrix products, for float32 on a CPU.

The transformers modules keep the weights, adapters and rotary angles and compute every matrix product. The operations
in between (norms, residual sums, rotary embeddings, gated units) are one kernel each instead of a chain of torch
operations. `models/check.py:check_forward` compares the result with transformers' own forward pass before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from posttrain.models import kernels
from posttrain.models.attention import Layout

FAMILY = ("llama", "mistral", "qwen2", "qwen3")  # norm, rotary attention, norm, silu-gated unit, nothing else
WIDEST_HEAD = 1024  # size of a stack buffer in kernels.c


@dataclass(frozen=True)
class Linears:
    """The matrix products of one layer, rows (N, in) → rows (N, out); `qkv` returns three results, `gates` two."""

    qkv: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    out: Callable[[torch.Tensor], torch.Tensor]
    gates: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    down: Callable[[torch.Tensor], torch.Tensor]


def fits(body: nn.Module) -> bool:
    """Whether `forward` supports this decoder: a model of FAMILY with full attention in float32 on a CPU, and compiled
    kernels.

    A weight of every layer is looked at: in a sharded pass the embedding is whole and the layers are not.
    """
    config: Any = body.config
    return (
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attention_dropout", 0.0)
        and not changes_with_length(config)
        and head_width(config) <= WIDEST_HEAD
        and head_width(config) % 2 == 0
        and kernels.takes(body.embed_tokens.weight)  # type: ignore[union-attr]
        and all(kernels.takes(layer.input_layernorm.weight) for layer in body.layers)  # type: ignore[union-attr]
    )


def changes_with_length(config: Any) -> bool:
    """Whether rotary frequencies depend on the longest position of a call."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") in ("longrope", "dynamic")


def head_width(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def angles(body: nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (N, D / 2) of the rotary angles at positions (N,), from the model's own module."""
    dummy = torch.zeros(1, device=positions.device)  # only its dtype and device are read
    cosine, sine = body.rotary_emb(dummy, positions.unsqueeze(0))  # type: ignore[operator]
    half = cosine.shape[-1] // 2  # both halves of a head use the same angles
    return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()


def forward(
    body: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    layout: Layout,
    linears: Sequence[Linears] | None = None,
) -> torch.Tensor:
    """tokens and positions (b, t) int64 → last hidden states (b, t, width), like the decoder's own forward pass.

    `linears`, one per layer, replace the matrix products of the layers' own modules.
    """
    b, t = tokens.shape
    turns = angles(body, positions.reshape(-1))
    x, delta = body.embed_tokens(tokens).reshape(b * t, -1), None
    for index, layer in enumerate(body.layers):
        given = (layer, linears[index] if linears else _modules(layer), index, x, delta, turns, (b, t), layout)
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            x, delta = checkpoint(_layer, *given, use_reentrant=False)  # type: ignore[misc]
        else:
            x, delta = _layer(*given)
    return norm(body.norm, x, delta)[1].view(b, t, -1)


def _modules(layer: Any) -> Linears:
    attention, mlp = layer.self_attn, layer.mlp
    return Linears(
        lambda y: (attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)),
        attention.o_proj,
        lambda y: (mlp.gate_proj(y), mlp.up_proj(y)),
        mlp.down_proj,
    )


def _layer(
    layer: Any,
    linears: Linears,
    index: int,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    turns: tuple[torch.Tensor, torch.Tensor],
    shape: tuple[int, int],
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer: (residual stream x (N, W), delta not yet added to it) before the layer → the same after it."""
    attention = layer.self_attn
    x, y = norm(layer.input_layernorm, x, delta)
    query, key, value = (part.reshape(len(y), -1, attention.head_dim) for part in linears.qkv(y))
    query, key = turned(attention, query, key, turns)
    rows = [part.view(*shape, -1, attention.head_dim).transpose(1, 2) for part in (query, key, value)]
    attended = layout.attend(index, rows[0], rows[1], rows[2], attention.scaling)
    x, y = norm(layer.post_attention_layernorm, x, linears.out(attended.reshape(len(y), -1)))
    return x, linears.down(kernels.swiglu(*linears.gates(y)))


def norm(module: Any, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta (N, W) and its RMS norm with the module's weight."""
    return kernels.add_norm(x, delta, module.weight, module.variance_epsilon)


def turned(
    attention: Any, query: torch.Tensor, key: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies rotary embeddings to query (N, Hq, D) and key (N, Hkv, D); Qwen 3 first norms each head."""
    if hasattr(attention, "q_norm"):
        width = attention.head_dim
        query = norm(attention.q_norm, query.reshape(-1, width), None)[1].view(query.shape)
        key = norm(attention.k_norm, key.reshape(-1, width), None)[1].view(key.shape)
    return kernels.rotary(query, *turns), kernels.rotary(key, *turns)
