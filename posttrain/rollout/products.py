"""The matrix products of a decode step, each made ready once for buffers that every step uses.

A product in float32 is this package's own (kernels/products.c): each number of its result is summed in one order, so a
row's bits are the same alone and among others. Weights are kept a second time as it reads them, but for a wide output
layer, which it reads where the learner keeps it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer

from posttrain.models import kernels
from posttrain.models.invariance import ROW_COUNTS, calls, equal_row_counts
from posttrain.models.lora import merged_weight

WIDEST_COPY = 8192  # an output layer with more words than this is read where it is


class Product(Protocol):
    """Linear layers whose outputs lie side by side, as one product."""

    def refresh(self) -> None:
        """Takes over the weights as they are now, adapters merged in."""
        ...

    def into(self, rows: torch.Tensor, out: torch.Tensor, count: ctypes.c_int64) -> Callable[[], Any]:
        """The call that multiplies the first `count` of rows (R, in) into those of out (R, out)."""
        ...


@dataclass(frozen=True)
class Packed:
    """In float32, for any number of rows, from a packed copy of the weights or else from the only module's own."""

    modules: tuple[Any, ...]
    copy: torch.Tensor | None  # (out / PANEL rounded up, in, PANEL)
    bias: torch.Tensor | None

    @staticmethod
    def of(*modules: Any) -> Packed:
        outer, inner = sum(m.weight.shape[0] for m in modules), modules[0].weight.shape[1]
        bias = None if modules[0].bias is None else torch.empty(outer)
        if len(modules) == 1 and outer > WIDEST_COPY and not isinstance(modules[0], LoraLayer):
            return Packed(modules, None, bias)
        return Packed(modules, torch.empty(-(-outer // kernels.PANEL), inner, kernels.PANEL), bias)

    def refresh(self) -> None:
        if self.copy is not None:
            weights = [merged_weight(module) for module in self.modules]
            kernels.pack_weight(weights[0] if len(weights) == 1 else torch.cat(weights), self.copy)
        if self.bias is not None:
            torch.cat([module.bias.detach() for module in self.modules], out=self.bias)

    def into(self, rows: torch.Tensor, out: torch.Tensor, count: ctypes.c_int64) -> Callable[[], Any]:
        sizes = (count, rows.shape[1], out.shape[1], torch.get_num_threads())
        if self.copy is not None:
            return kernels.bound("packed_product", rows, self.copy, self.bias, out, *sizes)
        scratch = rows.new_empty(-(-len(rows) // kernels.PANEL), rows.shape[1], kernels.PANEL)
        return kernels.bound("product", rows, self.modules[0].weight, self.bias, out, scratch, *sizes)


@dataclass(frozen=True)
class Narrow:
    """In another dtype, through torch, from a transposed copy: at row counts that were found to give equal bits."""

    modules: tuple[Any, ...]
    copy: torch.Tensor  # (in, out)
    bias: torch.Tensor | None
    counts: tuple[int, ...]

    @staticmethod
    def of(dtype: torch.dtype, *modules: Any) -> Narrow:
        outer, inner = sum(m.weight.shape[0] for m in modules), modules[0].weight.shape[1]
        copy = torch.empty(inner, outer, dtype=dtype)
        counts = equal_row_counts([(outer, inner)], ROW_COUNTS, copy, "columns")
        return Narrow(modules, copy, None if modules[0].bias is None else torch.empty(outer, dtype=dtype), counts)

    def refresh(self) -> None:
        first = 0
        for module in self.modules:
            end = first + module.weight.shape[0]
            self.copy[:, first:end].copy_(merged_weight(module).t())
            if self.bias is not None:
                self.bias[first:end].copy_(module.bias)
            first = end

    def into(self, rows: torch.Tensor, out: torch.Tensor, count: ctypes.c_int64) -> Callable[[], Any]:
        return partial(self._times, rows, out, count)

    def _times(self, rows: torch.Tensor, out: torch.Tensor, count: ctypes.c_int64) -> None:
        for first, size in calls(count.value, self.counts, count.value):
            end = min(first + size, count.value)
            part = rows.new_zeros(size, rows.shape[1], dtype=self.copy.dtype)
            part[: end - first] = rows[first:end]
            made = part @ self.copy if self.bias is None else torch.addmm(self.bias, part, self.copy)
            out[first:end] = made[: end - first]


def product_of(dtype: torch.dtype, *modules: Any) -> Product:
    """One product in a dtype, for linear layers that read the same rows."""
    return Packed.of(*modules) if dtype == torch.float32 else Narrow.of(dtype, *modules)


def times(product: Product, rows: torch.Tensor, outer: int) -> torch.Tensor:
    """rows (R, in) → (R, out), at once."""
    rows = rows.contiguous()
    out = rows.new_empty(len(rows), outer)
    product.into(rows, out, ctypes.c_int64(len(rows)))()
    return out
