"""Which row counts give the same bits: the fact that makes a sample independent of its batch-mates.

A matrix product may add its terms in another order when it has more rows, because libraries pick another kernel. The
sampler therefore runs every linear layer at row counts whose results were found equal, bit for bit, to tiles of
`TILE` rows on this machine with this thread count. Nothing is assumed about the library; it is measured at start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

TILE = 32
ROW_COUNTS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def linear_shapes(module: nn.Module) -> list[tuple[int, int, torch.dtype]]:
    """The distinct (out, in, dtype) of every matrix the module multiplies by."""
    found = {(*p.shape, p.dtype) for m in module.modules() for p in m.parameters(recurse=False) if p.dim() == 2}
    return sorted(((int(o), int(i), d) for o, i, d in found), key=str)


@torch.no_grad()
def equal_row_counts(module: nn.Module, most: int, device: torch.device) -> tuple[int, ...]:
    """Row counts ≤ `most` (always including TILE) at which every linear shape repeats the tiled result exactly."""
    counts = [c for c in ROW_COUNTS if TILE < c <= most]
    generator = torch.Generator().manual_seed(0)
    for out, inner, dtype in linear_shapes(module):
        if not counts:
            break
        weight = torch.randn(out, inner, generator=generator).to(device, dtype)
        rows = torch.randn(max(counts), inner, generator=generator).to(device, dtype)
        tiled = torch.cat([F.linear(part, weight) for part in rows.split(TILE)])
        counts = [c for c in counts if torch.equal(F.linear(rows[:c], weight), tiled[:c])]
    return (TILE, *counts)
