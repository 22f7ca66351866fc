"""Slot scheduler for continuous batching. Plain Python, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Scheduler:
    """Assigns `members[g]` sequences of each group g to slots 0 … slots−1, in order. A slot is refilled when its
    sequence ends, and slots in use stay at the front so that one model call covers them.

    >>> s = Scheduler(slots=2, members=[3])
    >>> s.admit()
    [(0, 0, 0), (1, 0, 1)]
    >>> s.finish(0), s.admit()
    (None, [(0, 0, 2)])
    """

    def __init__(self, slots: int, members: Sequence[int]) -> None:
        self.slots = slots
        self.waiting = deque((group, index) for group, count in enumerate(members) for index in range(count))
        self.running: list[tuple[int, int] | None] = []  # slot → (group, index)

    @property
    def active(self) -> int:
        """Slots in use; they are slots 0 … active−1 once `admit` and `compact` have run."""
        return len(self.running)

    def finish(self, slot: int) -> None:
        """Frees a slot."""
        self.running[slot] = None

    def admit(self) -> list[tuple[int, int, int]]:
        """Fills free slots with waiting sequences; returns (slot, group, index) of each."""
        started: list[tuple[int, int, int]] = []
        for slot in range(self.slots):
            if not self.waiting:
                break
            if slot < len(self.running) and self.running[slot] is not None:
                continue
            group, index = self.waiting.popleft()
            if slot < len(self.running):
                self.running[slot] = (group, index)
            else:
                self.running.append((group, index))
            started.append((slot, group, index))
        return started

    def compact(self) -> list[tuple[int, int]]:
        """Moves sequences from the end into free slots; returns (source, target) pairs for the KV cache, in order."""
        moves: list[tuple[int, int]] = []
        for slot in range(len(self.running)):
            while self.running and self.running[-1] is None:
                self.running.pop()
            if slot < len(self.running) and self.running[slot] is None:
                moves.append((len(self.running) - 1, slot))
                self.running[slot] = self.running.pop()
        return moves

    def last_of_group(self, group: int) -> bool:
        """Whether no sequence of the group is still waiting for a slot (its prompt's KV cache can be freed)."""
        return all(g != group for g, _ in self.waiting)
