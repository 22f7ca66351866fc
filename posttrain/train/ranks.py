"""How the processes of a learner share its lanes and chunks: alone, or as ranks of a torch.distributed group.

Rank r of R owns the lanes rL/R … (r+1)L/R − 1, a whole subtree of the sum (train/lanes.py), and 1/R of the flat vector.
The upper levels of the tree are a reduce-scatter by recursive halving with partners at distance 1, 2, 4, …: each pair
halves what it still holds and adds the partner's half, so every element is added in the tree's order, and a rank sends
(R − 1)/R of the vector, the least possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from posttrain.train.lanes import Layout


class Group(Protocol):
    """The processes that compute a learner's gradient together. Every process calls every method."""

    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...

    def reduce(self, layout: Layout, total: torch.Tensor) -> list[torch.Tensor]:
        """The rank's share of each region of the vector, added over all ranks; may change `total`."""
        ...

    def gather(self, layout: Layout, shares: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole vector [elements] of the ranks' shares."""
        ...

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of vectors of which each element is 0 on all ranks but one."""
        ...


@dataclass(frozen=True)
class Alone:
    """A learner in a single process."""

    rank: int = 0
    ranks: int = 1

    def reduce(self, layout: Layout, total: torch.Tensor) -> list[torch.Tensor]:
        return [total[start:end] for start, end in shares(layout, 0, 1)]

    def gather(self, layout: Layout, shares: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = shares[0]._base  # the shares of a single process are views of the vector
        return torch.cat(list(shares)) if whole is None or len(whole) != layout.size else whole

    def join(self, values: torch.Tensor) -> torch.Tensor:
        return values


@dataclass(frozen=True)
class Ranks:
    """A learner on the ranks of the initialised default process group of torch.distributed."""

    rank: int
    ranks: int

    def reduce(self, layout: Layout, total: torch.Tensor) -> list[torch.Tensor]:
        held = [(start, end) for start, end in layout.regions]
        distance = 1
        while distance < self.ranks:
            partner, upper = self.rank ^ distance, bool(self.rank & distance)
            kept, sent = [], []
            for start, end in held:
                middle = (start + end) // 2
                low, high = (start, middle), (middle, end)
                kept.append(high if upper else low)
                sent.append(low if upper else high)
            received = [torch.empty(end - start, dtype=total.dtype, device=total.device) for start, end in kept]
            calls = [dist.P2POp(dist.isend, total[start:end], partner) for start, end in sent if end > start]
            calls += [dist.P2POp(dist.irecv, part, partner) for part in received if len(part)]
            for work in dist.batch_isend_irecv(calls) if calls else []:
                work.wait()
            for (start, end), part in zip(kept, received, strict=True):
                total[start:end] += part  # a + b has the bits of b + a
            held, distance = kept, 2 * distance
        assert held == shares(layout, self.rank, self.ranks)
        return [total[start:end].clone() for start, end in held]

    def gather(self, layout: Layout, shares: Sequence[torch.Tensor]) -> torch.Tensor:
        out = torch.empty(layout.size, dtype=shares[0].dtype, device=shares[0].device)
        order = [placed(rank, self.ranks) for rank in range(self.ranks)]
        for (start, end), own in zip(layout.regions, shares, strict=True):
            if end > start:
                parts = out[start:end].chunk(self.ranks)
                dist.all_gather([parts[place] for place in order], own.contiguous())
        return out

    def join(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values


def placed(rank: int, ranks: int) -> int:
    """Which of R equal parts of a region a rank owns: its number with the bits reversed, as halving leaves it."""
    place = 0
    while ranks > 1:
        place, rank, ranks = 2 * place + (rank & 1), rank >> 1, ranks >> 1
    return place


def shares(layout: Layout, rank: int, ranks: int) -> list[tuple[int, int]]:
    """(start, end) in the flat vector of a rank's share of each region: of the matrices, and of the other tensors."""
    out: list[tuple[int, int]] = []
    for start, end in layout.regions:
        size = (end - start) // ranks
        first = start + placed(rank, ranks) * size
        out.append((first, first + size))
    return out
