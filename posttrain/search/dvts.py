"""Diverse verifier tree search: independent subtrees, in each of which the best next step is taken.

Introduced by Hugging Face's search-and-learn. Subtrees can't crowd each other out, which keeps large budgets diverse.
"""

from __future__ import annotations

from posttrain.config.search import SearchConfig, rounds
from posttrain.search.beam import best
from posttrain.search.tree import Asks, Node, Tree


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Rounds of `width` / `expansions` subtrees with `expansions` steps each."""
    for width in rounds(cfg):
        sizes = [len(range(first, min(first + cfg.expansions, width))) for first in range(0, width, cfg.expansions)]
        steps = yield from tree.grow([tree.root] * width)
        subtrees: list[list[Node]] = []
        for size in sizes:
            subtrees.append(steps[:size])
            steps = steps[size:]
        yield from descend(tree, subtrees)


def descend(tree: Tree, subtrees: list[list[Node]]) -> Asks[None]:
    """Takes the best step of each subtree and samples as many next steps from it as it has room for."""
    while subtrees := [live for steps in subtrees if (live := [node for node in steps if not node.ended])]:
        if any(len(live) > 1 for live in subtrees):
            yield from tree.score([node for live in subtrees for node in live])
        kept = [(best(live, 1)[0], len(live)) for live in subtrees]
        grown = yield from tree.grow([node for node, room in kept for _ in range(room)])
        subtrees = []
        for _, room in kept:
            subtrees.append(grown[:room])
            grown = grown[room:]
