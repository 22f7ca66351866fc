"""Batch-invariant row counts: matrix products whose results are bit-exact whatever else is in the batch.

A matrix product with more rows may sum its terms in another order, because libraries choose another kernel. The sampler
therefore runs torch's linear layers only at row counts whose results were measured to be bit-exact with tiles of `TILE`
rows on this machine with this thread count. Nothing is assumed about the library: the row counts are tested at start.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

TILE = 32
ROW_COUNTS = (*range(4, 32, 4), *range(32, 64, 8), *range(64, 128, 16), *range(128, 256, 32), 256, 384, 512, 768, 1024)

Shape = tuple[int, int]  # (out, in) of a weight
Stored = Literal["rows", "columns"]
"""Memory layout of a weight: (out, in) as in torch, or transposed, (in, out)."""


def linear_shapes(module: nn.Module) -> list[Shape]:
    """The distinct (out, in) shapes of the module's matrices."""
    found = {tuple(p.shape) for m in module.modules() for p in m.parameters(recurse=False) if p.dim() == 2}
    return sorted((int(o), int(i)) for o, i in found)


def equal_row_counts(
    shapes: Iterable[Shape], counts: Sequence[int], like: torch.Tensor, stored: Stored = "rows"
) -> tuple[int, ...]:
    """The row counts of `counts`, plus TILE, at which the product with every shape is bit-exact with the tiled one.

    `like` gives the dtype and device.
    """
    left = tuple(sorted({*counts, TILE}))
    for shape in sorted(set(shapes)):
        left = _equal(shape, left, like.dtype, str(like.device), stored, torch.get_num_threads())
    return left


@functools.cache
@torch.no_grad()
def _equal(
    shape: Shape, counts: tuple[int, ...], dtype: torch.dtype, device: str, stored: Stored, threads: int
) -> tuple[int, ...]:
    """The counts that agree with tiles for one shape; measured once per process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    rows = torch.randn(-(-max(counts) // TILE) * TILE, shape[1], generator=generator).to(device, dtype)
    if stored == "columns":
        weight = weight.t().contiguous()

    def product(part: torch.Tensor) -> torch.Tensor:
        return F.linear(part, weight) if stored == "rows" else torch.mm(part, weight)

    tiled = torch.cat([product(part) for part in rows.split(TILE)])
    return tuple(c for c in counts if c == TILE or torch.equal(product(rows[:c]), tiled[:c]))


def calls(count: int, allowed: tuple[int, ...], room: int) -> list[tuple[int, int]]:
    """Splits `count` rows into calls (first, rows) of allowed sizes that stay within `room` rows."""
    out: list[tuple[int, int]] = []
    first = 0
    while first < count:
        sizes = [c for c in allowed if first + c <= max(room, count)] or [TILE]
        rows = min((c for c in sizes if c >= count - first), default=max(sizes))
        out.append((first, rows))
        first += rows
    return out
