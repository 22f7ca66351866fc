"""The order in which an update's gradient is added, written down so that it does not depend on who computes what.

Floating-point sums depend on their order. Here micro-batch i of a `forward_backward` call belongs to lane i mod L; a
lane starts from zeros and adds its micro-batches one after the other; lanes are added as a balanced binary tree over
their numbers, e.g. ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)); and calls are added in order. A process that owns a whole
subtree of lanes can add it alone, so the float32 bits are a function of the micro-batches and L, not of the number of
processes.

Trainable tensors are laid out in one flat float32 vector, matrices first, because only they decay. The vector is cut
into 2L equal chunks of a multiple of 64 elements each: the units of the norm and of the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

ALIGNED = 64  # elements; a chunk has no incomplete vector register, so its bits do not depend on its neighbours


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the flat vector."""

    start: int
    shape: torch.Size

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor's part of a flat vector [elements], in its shape; shares memory."""
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


class Layout:
    """The flat vector of named tensors for L lanes: `matrices` elements that decay, then the others."""

    def __init__(self, shapes: Mapping[str, torch.Size], lanes: int) -> None:
        """Raises ValueError unless `lanes` is a power of two."""
        if lanes < 1 or lanes & (lanes - 1):
            raise ValueError(f"lanes={lanes} is not a power of two.")
        self.lanes, self.chunks = lanes, 2 * lanes
        self.places: dict[str, Place] = {}
        self.matrices = self._lay({name: shape for name, shape in shapes.items() if len(shape) >= 2}, 0)
        self.size = self._lay({name: shape for name, shape in shapes.items() if len(shape) < 2}, self.matrices)

    def _lay(self, shapes: Mapping[str, torch.Size], start: int) -> int:
        """Lays out tensors from `start`; returns the end, after padding of zeros to equal chunks."""
        end = start
        for name, shape in shapes.items():
            self.places[name] = Place(end, shape)
            end += shape.numel()
        unit = self.chunks * ALIGNED
        return start + -(-(end - start) // unit) * unit

    def flat(self, tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> torch.Tensor:
        """The flat float32 vector of these tensors; zeros where a name is missing and in the padding."""
        out = torch.zeros(self.size, device=device)
        for name, tensor in tensors.items():
            self.places[name].view(out).copy_(tensor)
        return out

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The named tensors in a flat vector; they share its memory."""
        return {name: place.view(flat) for name, place in self.places.items()}

    @property
    def regions(self) -> list[tuple[int, int]]:
        """(start, end) of the matrices, which decay, and of the other tensors; either may be empty."""
        return [(0, self.matrices), (self.matrices, self.size)]

    def chunk_of(self, region: int) -> int:
        """Elements of a chunk of a region."""
        start, end = self.regions[region]
        return (end - start) // self.chunks


def order(count: int, lanes: int) -> list[list[int]]:
    """The micro-batches (of `count`) of each lane, in the order in which the lane adds them."""
    return [list(range(lane, count, lanes)) for lane in range(lanes)]


class Tree:
    """Adds equal-shaped tensors as a balanced binary tree over their numbers, one at a time; changes the tensors.

    It holds at most 1 + log₂ of their number.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, torch.Tensor]] = []  # (leaves, sum), as the digits of a binary counter

    def add(self, part: torch.Tensor) -> None:
        """Adds the next leaf."""
        leaves, total = 1, part
        while self._waiting and self._waiting[-1][0] == leaves:
            leaves, total = 2 * leaves, self._waiting.pop()[1].add_(total)
        self._waiting.append((leaves, total))

    def sum(self) -> torch.Tensor | None:
        """The sum of all leaves; None without any. Nothing can be added afterwards."""
        total = self._waiting.pop()[1] if self._waiting else None
        while self._waiting and total is not None:
            total = self._waiting.pop()[1].add_(total)
        return total
