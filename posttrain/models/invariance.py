"""Which row counts give the same bits: the fact that makes a sample independent of its batch-mates.

A matrix product may add its terms in another order when it has more rows, because libraries pick another kernel. The
sampler therefore runs torch's linear layers at row counts whose results were found equal, bit for bit, to tiles of
`TILE` rows on this machine with this thread count. Nothing is assumed about the library; it is measured at start.
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
"""How the weight of a product lies in memory: as torch keeps it, (out, in), or transposed, (in, out)."""


def linear_shapes(module: nn.Module) -> list[Shape]:
    """The distinct (out, in) of every matrix the module multiplies by."""
    found = {tuple(p.shape) for m in module.modules() for p in m.parameters(recurse=False) if p.dim() == 2}
    return sorted((int(o), int(i)) for o, i in found)


def equal_row_counts(
    shapes: Iterable[Shape], counts: Sequence[int], like: torch.Tensor, stored: Stored = "rows"
) -> tuple[int, ...]:
    """Those of `counts`, and always TILE, at which every shape repeats the tiled result exactly.

    `like` gives dtype and device.
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
    """Of `counts` those that agree with tiles, for one shape; measured once a process."""
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
    """Splits `count` rows into (first, rows) calls of allowed sizes that stay within `room` rows."""
    out: list[tuple[int, int]] = []
    first = 0
    while first < count:
        sizes = [c for c in allowed if first + c <= max(room, count)] or [TILE]
        rows = min((c for c in sizes if c >= count - first), default=max(sizes))
        out.append((first, rows))
        first += rows
    return out
