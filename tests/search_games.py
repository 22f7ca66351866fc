"""Enumerable search problems: an engine without a model, whose trees and values are known in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from posttrain.search.scorers import Scored
from posttrain.search.tree import Force, Node, Sample, Tree
from posttrain.types import Message, Task

TASK = Task("game", "game", (Message("user", "play"),), "")
Path = tuple[int, ...]


def moves(node: Node) -> Path:
    """The moves from the root to a node."""
    return tuple(node.prefix.tolist())


@dataclass
class Game:
    """An engine whose node `path` has the moves 0 … branches(path) − 1, which its children take in turn; a path without
    moves is over.

    Every move is one token, and a completion to the end takes move 0 at each node. `probability(path)` is the policy's.
    """

    branches: Callable[[Path], int]
    probability: Callable[[Path], float] = lambda path: 0.5
    generated: int = 0
    calls: int = 0
    order: list[Path] = field(default_factory=lambda: [])

    def sample(self, asked: Sequence[tuple[Tree, Sample]]) -> list[list[Node]]:
        self.calls += 1
        return [
            [self._child(tree, parent, seed, index, ask.whole)
             for parent, seed, index in zip(ask.parents, ask.seeds, ask.indices, strict=True)]
            for tree, ask in asked
        ]  # fmt: skip

    def force(self, tree: Tree, ask: Force) -> Node:
        raise AssertionError("these strategies force no text")

    def _child(self, tree: Tree, parent: Node, seed: int, index: int, whole: bool) -> Node:
        path = (*moves(parent), index % self.branches(moves(parent)) if self.branches(moves(parent)) else index)
        rows = [path]
        while whole and self.branches(rows[-1]):
            rows.append((*rows[-1], 0))
        logprobs = np.log([self.probability(row) for row in rows]).astype(np.float32)
        node = Node(0, parent, index, seed, np.array([row[-1] for row in rows], np.int32), logprobs, (len(rows),))
        node.text, node.end = " ".join(map(str, rows[-1])), "step" if self.branches(rows[-1]) else "stop"
        self.generated += len(rows)
        tree.generated += len(rows)
        self.order.append(path)
        return tree.add(node)


@dataclass
class Values:
    """A scorer that knows the value of every path; it reads the path's moves."""

    value: Callable[[Path], float]
    partial: bool = True
    separator: str = ""

    def __call__(self, nodes: Sequence[tuple[Task, Node]]) -> list[Scored]:
        return [Scored((self.value(tuple(map(int, node.text.split()))),), len(node.prefix)) for _, node in nodes]
