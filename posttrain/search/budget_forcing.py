"""Budget forcing: thinking is not allowed to end before a minimum of tokens, and ended at a maximum (arXiv 2501.19393).

An early end of thinking is replaced by `wait`, after which the model thinks on. At the maximum, the closing tag is
written for it, and it answers.
"""

from __future__ import annotations

from posttrain.config.search import SearchConfig
from posttrain.data.thoughts import tags_of
from posttrain.search.tree import Asks, Tree


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Samples `budget` completions whose thinking is held between `least_thinking` and `most_thinking` tokens."""
    for _ in range(cfg.budget):
        yield from think(tree, cfg)


def think(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """One completion: its thinking in as many parts as it takes, then the answer."""
    node, closing = tree.root, tags_of("")[1]
    while True:
        left = cfg.most_thinking - len(node.prefix) if cfg.most_thinking else 0
        (node,) = yield from tree.grow([node], whole=True, stop=(closing,), limit=left)
        if node.ended:
            return
        closing = tags_of(node.text)[1]
        if not node.text.endswith(closing):
            node = yield from tree.force(node, closing)
            break
        if len(node.prefix) >= cfg.least_thinking:
            break
        node = yield from tree.force(node, cfg.wait, without=closing)
        if node.ended or 0 < cfg.most_thinking <= len(node.prefix):
            break
    if not node.ended:
        yield from tree.grow([node], whole=True)
