"""Fused float32 CPU kernels: each replaces a chain of torch operations that reads memory many times.

The C files implement them and `build.py` compiles them. The functions here do little checking, because all callers are
in this package: `models/decoder.py`, `models/packing.py` and `rollout/fused.py` decide when to use them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from posttrain.models.kernels.build import library

_F = ctypes.c_float
PANEL = 64  # of products.c


def takes(tensor: torch.Tensor) -> bool:
    """Whether the kernels support this tensor: float32 on a CPU, with the kernels compiled.

    Only plain tensors and parameters: a subclass (DTensor, a fake or quantised tensor) may have no data at its address.
    """
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and tensor.dtype == torch.float32 and tensor.device.type == "cpu" and library() is not None


def bound(name: str, *arguments: Any) -> Callable[[], Any]:
    """Binds arguments to a C function, for calling it many times.

    Tensors are passed as addresses, ints as int64 and floats as float. A ctypes object is passed with the value it has
    when the function is called.
    """
    call = partial(_function(name), *[_argument(a) for a in arguments])
    call.tensors = arguments  # type: ignore[attr-defined]  # keeps them alive as long as their addresses are used
    return call


def _call(name: str, *arguments: Any) -> None:
    _function(name)(*[_argument(a) for a in arguments])


def _function(name: str) -> Callable[..., Any]:
    made = library()
    assert made is not None, "posttrain.models.kernels was used where library() is None"
    return getattr(made.functions, name)


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's data; a null pointer for None."""
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return address(value)
    if isinstance(value, float):
        return _F(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value  # None is a null pointer


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add and RMS norm: x and delta (N, W), weight (W,) → (x + delta, RMSNorm(x + delta)); differentiable."""
    return _AddNorm.apply(x, delta, weight, eps)  # type: ignore[return-value]


def rotary(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: rotates x (N, H, D) by angles with cosine and sine (N, D / 2); differentiable in x."""
    return _Rotary.apply(x, cosine, sine)  # type: ignore[return-value]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up elementwise, both (N, F); differentiable."""
    return _SwiGLU.apply(gate, up)  # type: ignore[return-value]


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Any:
        x = x.contiguous()
        delta = None if delta is None else delta.contiguous()
        rows, width = x.shape
        total = x if delta is None else torch.empty_like(x)
        y, rstd = torch.empty_like(x), x.new_empty(rows)
        _call("rms_norm", x, delta, weight, total, y, rstd, rows, width, float(eps))
        ctx.save_for_backward(total, weight, rstd)
        ctx.added = delta is not None
        ctx.set_materialize_grads(False)
        if delta is None:
            return x.view_as(x), y
        return total, y

    @staticmethod
    def backward(ctx: Any, dtotal: torch.Tensor | None, dy: torch.Tensor | None) -> Any:  # type: ignore[override]
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal if ctx.added else None, None, None
        dy, dtotal = dy.contiguous(), None if dtotal is None else dtotal.contiguous()
        parts = torch.get_num_threads()
        dx, dweight = torch.empty_like(total), total.new_zeros(parts, len(weight))
        _call("rms_norm_grad", total, weight, rstd, dy, dtotal, dx, dweight, *total.shape, parts)
        return dx, dx if ctx.added else None, dweight.sum(0), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        return _rotate(grad, cosine, sine, -1.0), None, None


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sign: float) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("rotary", x, out, cosine, sine, *x.shape, sign)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        rows, width = gate.shape
        _call("swiglu", gate, up, out, rows, width, width)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _call("swiglu_grad", gate, up, grad.contiguous(), dgate, dup, gate.numel())
        return dgate, dup


class Rows(ctypes.Structure):
    """The struct `Rows` of attention.c."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in "heads kv_heads width room runs threads scratch keys".split()),
        ("scale", ctypes.c_float),
    ]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, runs: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention over packed rows: query (M, Hq, D), key and value (M, Hkv, D) → (M, Hq, D); differentiable.

    rows (n, 2) int64: each row's first token and one past its last. runs (k + 1,) int64: the first row of each run. In
    a run of several rows, the first row is a shared prefix, and all other rows attend to all of it.
    """
    return _Attention.apply(query, key, value, rows, runs, scale)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor,
        runs: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        shape = _rows_shape(query, key, rows, runs, scale)
        out, norms = torch.empty_like(query), query.new_empty(query.shape[:2])
        scratch = query.new_empty(shape.threads, shape.scratch)
        _call("attention", query, key, value, out, norms, rows, runs, scratch, ctypes.byref(shape))
        ctx.save_for_backward(query, key, value, out, norms, rows, runs)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        query, key, value, out, norms, rows, runs = ctx.saved_tensors
        shape = _rows_shape(query, key, rows, runs, ctx.scale)
        grads = [torch.empty_like(x) for x in (query, key, value)]
        scratch = query.new_empty(shape.threads, shape.scratch)
        given = (query, key, value, out, norms, grad.contiguous())
        _call("attention_grad", *given, *grads, rows, runs, scratch, ctypes.byref(shape))
        return *grads, None, None, None


def _rows_shape(query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, runs: torch.Tensor, scale: float) -> Rows:
    heads, width, kv = query.shape[1], query.shape[2], key.shape[1]
    room, tile = -(-width // 16) * 16, 16
    padded = -(-(rows[:, 1] - rows[:, 0]) // 16) * 16
    beginnings = padded[runs[:-1]]
    keys = int(2 * padded.max() if int(runs.diff().max()) > 1 else beginnings.max())
    scratch = keys * (2 * width + 3 * room + 2 * tile) + 3 * tile * room
    return Rows(heads, kv, width, room, len(runs) - 1, torch.get_num_threads(), scratch, keys, scale)


def pack_weight(weight: torch.Tensor, panels: torch.Tensor) -> None:
    """Copies weight (out, in) into panels (out / PANEL rounded up, in, PANEL), the layout `packed_product` reads."""
    _call("pack_weight", weight.contiguous(), panels, *weight.shape, torch.get_num_threads())


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples tokens (R,) int64 with their logp (R,) from logits (R, V), like `rollout.generator.draw` without
    truncation."""
    rows, vocab = logits.shape
    tokens, logp = torch.empty(rows, dtype=torch.int64), logits.new_empty(rows)
    _call("draw", logits.contiguous(), uniforms, float(temperature), tokens, logp, rows, vocab)
    return tokens, logp


def select_logp(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits (K, V), targets (K,) int64 → logp of the targets, entropy, and log Σ exp(logits / T), each (K,)."""
    rows, vocab = logits.shape
    logp, entropy, norm = (logits.new_empty(rows) for _ in range(3))
    _call("select_logp", logits, targets, float(temperature), logp, entropy, norm, rows, vocab)
    return logp, entropy, norm


def select_logp_grad_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    kept: Sequence[torch.Tensor],
    dlogp: torch.Tensor,
    dentropy: torch.Tensor | None,
) -> None:
    """Overwrites logits (K, V) with their gradient, given (entropy, norm) from `select_logp` and gradients (K,)."""
    entropy, norm = kept
    _call("select_logp_grad", logits, targets, float(temperature), norm, entropy, dlogp, dentropy, *logits.shape)
