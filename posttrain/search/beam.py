"""Beam search over steps, steered by a scorer of unfinished completions (arXiv 2408.03314, section 5.2)."""

from __future__ import annotations

from posttrain.config.search import SearchConfig, rounds
from posttrain.search.tree import Asks, Node, Tree


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Rounds of beam search, `width` steps at a time."""
    for width in rounds(cfg):
        yield from beam(tree, width, cfg.expansions)


def beam(tree: Tree, width: int, expansions: int) -> Asks[None]:
    """Samples `width` first steps. From then on, each of the best width / `expansions` gets `expansions` next steps.

    A completion that ends keeps its place, so fewer are expanded. With one expansion nothing is dropped, and the beams
    are independent samples.
    """
    steps = yield from tree.grow([tree.root] * width)
    while live := [node for node in steps if not node.ended]:
        width = width - (len(steps) - len(live))
        keep = -(-width // expansions)
        if len(live) > keep:
            yield from tree.score(live)
        kept = best(live, keep)
        steps = yield from tree.grow(shared_equally(kept, width))


def best(nodes: list[Node], count: int) -> list[Node]:
    """The `count` nodes with the highest scores, the earlier ones of ties, in the order in which they were sampled."""
    ranked = sorted(nodes, key=lambda node: (-value(node), node.number))[:count]
    return sorted(ranked, key=lambda node: node.number)


def value(node: Node) -> float:
    """A node's score; below all others if it could not be scored."""
    return float("-inf") if node.score is None else node.score


def shared_equally(nodes: list[Node], count: int) -> list[Node]:
    """Parents of `count` children: every node as often as the others, the first ones once more if that is uneven."""
    share, more = divmod(count, len(nodes))
    return [node for i, node in enumerate(nodes) for _ in range(share + (i < more))]
