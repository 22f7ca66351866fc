"""Reward balanced search: next steps are shared out by the softmax of the scores (REBASE, arXiv 2408.00724)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.config.search import SearchConfig, rounds
from posttrain.search.beam import value
from posttrain.search.tree import Asks, Tree


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Rounds of `width` steps at a time; a completion that ends keeps its place."""
    for width in rounds(cfg):
        steps = yield from tree.grow([tree.root] * width)
        while live := [node for node in steps if not node.ended]:
            width -= len(steps) - len(live)
            yield from tree.score(live)
            counts = shares([value(node) for node in live], width, cfg.share_temperature)
            parents = [node for node, count in zip(live, counts, strict=True) for _ in range(count)]
            steps = yield from tree.grow(parents)


def shares(scores: Sequence[float], width: int, temperature: float) -> list[int]:
    """Numbers of next steps, `width` in all: width × softmax(score / T), rounded by the largest remainders.

    Ties go to the earlier one. An infinite temperature gives equal shares.
    """
    known = [score for score in scores if score > -math.inf]
    top = max(known, default=0.0)
    weights = [
        (1.0 if math.isinf(temperature) else math.exp((score - top) / temperature)) if score > -math.inf else 0.0
        for score in scores
    ] if known else [1.0] * len(scores)  # fmt: skip
    exact = [width * weight / sum(weights) for weight in weights]
    counts = [math.floor(share + 1e-9) for share in exact]
    order = sorted(range(len(scores)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: width - sum(counts)]:
        counts[i] += 1
    return counts
