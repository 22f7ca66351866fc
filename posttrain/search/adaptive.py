"""Adaptive consistency: sample one completion after another until the vote is decided (arXiv 2305.11860)."""

from __future__ import annotations

import math
from collections import Counter

from posttrain.config.search import SearchConfig
from posttrain.search.choose import classes
from posttrain.search.tree import Asks, Tree


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Samples at most the budget; stops when the leader is the most common answer with probability `confidence`."""
    while len(tree.completions) < cfg.budget:
        yield from tree.grow([tree.root], whole=True)
        votes = [answer for answer in classes([node.text for node in tree.completions]) if answer >= 0]
        first, second = ([count for _, count in Counter(votes).most_common(2)] + [0, 0])[:2]
        if first and lead(first, second) >= cfg.confidence:
            return


def lead(first: int, second: int) -> float:
    """Probability that the leading answer is more common than the second one, from their numbers of votes.

    With a uniform prior, the leader's share among the two has the posterior Beta(first + 1, second + 1), and this is
    the mass above 1/2: the chance of at most `first` heads in first + second + 1 throws of a coin.
    """
    throws = first + second + 1
    return sum(math.comb(throws, heads) for heads in range(first + 1)) / 2**throws
