"""Matrix products of a decode step, bound once to buffers that every step reuses.

float32 products use this package's kernel (kernels/products.c), which sums in a fixed order, so the result for a row is
bit-exact at any batch size. Weights are packed into a second copy, except for a wide output layer, which is read in
place.
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

WIDEST_COPY = 8192  # an output layer with a larger vocabulary is read in place


class Product(Protocol):
    """One or more linear layers with concatenated outputs, as one product."""

    def refresh(self) -> None:
        """Repacks the current weights, with adapters merged."""
        ...

    def into(self, rows: torch.Tensor, out: torch.Tensor, count: ctypes.c_int64) -> Callable[[], Any]:
        """Returns a call that multiplies the first `count` of rows (R, in) and writes to out (R, out)."""
        ...


@dataclass(frozen=True)
class Packed:
    """float32 product for any batch size, from packed weights or, for a single wide module, in place."""

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
    """Product in another dtype with torch, from a transposed copy, at batch sizes verified to be bit-exact."""

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
            result = part @ self.copy if self.bias is None else torch.addmm(self.bias, part, self.copy)
            out[first:end] = result[: end - first]


def product_of(dtype: torch.dtype, *modules: Any) -> Product:
    """Makes one product in a dtype for linear layers with the same input."""
    return Packed.of(*modules) if dtype == torch.float32 else Narrow.of(dtype, *modules)


def times(product: Product, rows: torch.Tensor, outer: int) -> torch.Tensor:
    """Computes rows (R, in) → (R, out) immediately."""
    rows = rows.contiguous()
    out = rows.new_empty(len(rows), outer)
    product.into(rows, out, ctypes.c_int64(len(rows)))()
    return out
