"""Monte Carlo tree search with PUCT (AlphaZero, arXiv 1712.01815, on steps of text as in arXiv 2501.04519).

Priors are the policy's, values come from a scorer of unfinished completions or, if the scorer reads only finished ones,
from completing the step once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.config.search import SearchConfig, rounds
from posttrain.search.tree import Asks, Node, Tree

ROLLOUT = "rollout"
"""Note of a completion that was sampled for its value; it is not part of the tree that is searched."""


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Rounds of `width` simulations on one tree; after each round the most visited path is completed."""
    for simulations in rounds(cfg):
        for _ in range(simulations):
            yield from simulate(tree, cfg.exploration, cfg.expansions)
        yield from complete(tree, most_visited(tree.root))


def simulate(tree: Tree, exploration: float, expansions: int) -> Asks[None]:
    """Selects a leaf, samples its next steps if it was visited before, evaluates one, and averages along its path."""
    leaf = select(tree.root, exploration)
    if not leaf.ended and (leaf.visits or leaf is tree.root):
        children = yield from tree.grow([leaf] * expansions)
        if tree.partial:
            yield from tree.score(children)
        leaf = select(leaf, exploration)
    node = leaf if tree.partial or leaf.ended else (yield from complete(tree, leaf))
    yield from tree.score([node])
    backup(leaf, 0.0 if node.score is None else node.score)


def select(node: Node, exploration: float) -> Node:
    """The leaf that PUCT descends to, by the child with the largest Q + c · P · √N / (1 + n) at each node."""
    while children := steps(node):
        scores = puct(node, children, exploration)
        node = children[scores.index(max(scores))]
    return node


def puct(parent: Node, children: Sequence[Node], exploration: float) -> list[float]:
    """Q + c · P · √N / (1 + n) of each child, with visits N of the parent and n of the child.

    Q is the mean value of a child's visits, and before the first one its score, or 0 if unfinished completions can't be
    scored. P is the policy's share: the softmax of the mean log-probability of the child's tokens.
    """
    likely = [math.exp(float(child.logprobs.mean())) if len(child.logprobs) else 1.0 for child in children]
    root = math.sqrt(max(1, parent.visits))
    return [
        (child.value if child.visits else child.score or 0.0)
        + exploration * one / sum(likely) * root / (1 + child.visits)
        for child, one in zip(children, likely, strict=True)
    ]


def steps(node: Node) -> list[Node]:
    """The children that are part of the tree."""
    return [child for child in node.children if child.note != ROLLOUT]


def complete(tree: Tree, node: Node) -> Asks[Node]:
    """A completion from here; the node itself if it has ended."""
    if node.ended:
        return node
    (end,) = yield from tree.grow([node], whole=True)
    end.note = ROLLOUT
    return end


def most_visited(node: Node) -> Node:
    """The end of the path that takes the most visited child at each node; the higher mean value decides ties."""
    while children := steps(node):
        node = max(children, key=lambda child: (child.visits, child.value))
    return node


def backup(leaf: Node, value: float) -> None:
    """Counts a visit of the leaf and of all nodes above it, and updates their mean values."""
    node: Node | None = leaf
    while node:
        node.visits += 1
        node.value += (value - node.value) / node.visits
        node = node.parent
