"""Self-consistency: sample completions and vote (Wang et al., arXiv 2203.11171).

With a scorer and `choose = "weighted"`, votes count by score: by self-certainty (arXiv 2502.18581), token confidence
(arXiv 2508.15260) or a reward model.
"""

from __future__ import annotations

from posttrain.config.search import SearchConfig
from posttrain.search.tree import Asks, Tree


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Samples the whole budget at once."""
    yield from tree.grow([tree.root] * cfg.budget, whole=True)
