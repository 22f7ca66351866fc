"""The strategies of test-time search, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.config.search import SearchConfig
from posttrain.search import (
    adaptive,
    beam,
    best_of_n,
    budget_forcing,
    dvts,
    majority,
    mcts,
    particles,
    rebase,
    revise,
)
from posttrain.search.tree import Asks, Tree


@dataclass(frozen=True)
class Strategy:
    """A strategy: `run(tree, cfg)` spends the budget, then `choose` picks among the completions.

    `scores` says what scores it needs: of `steps`, i.e. of unfinished completions, of finished ones (`ends`), or none.
    `settings` are those of `[search]` that it reads besides the common ones.
    """

    run: Callable[[Tree, SearchConfig], Asks[None]]
    choose: str
    scores: str
    settings: tuple[str, ...] = ()


STRATEGIES: dict[str, Strategy] = {
    "majority": Strategy(majority.run, "vote", "none"),
    "adaptive": Strategy(adaptive.run, "vote", "none", ("confidence",)),
    "best-of-n": Strategy(best_of_n.run, "best", "ends", ("reject",)),
    "beam": Strategy(beam.run, "best", "steps", ("width", "expansions")),
    "dvts": Strategy(dvts.run, "best", "steps", ("width", "expansions")),
    "rebase": Strategy(rebase.run, "weighted", "steps", ("width", "share_temperature")),
    "mcts": Strategy(mcts.run, "best", "ends", ("width", "expansions", "exploration")),
    "particles": Strategy(particles.run, "best", "steps", ("width", "share_temperature", "resample_below")),
    "revise": Strategy(revise.run, "best", "ends", ("width",)),
    "budget-forcing": Strategy(budget_forcing.run, "vote", "none", ("least_thinking", "most_thinking", "wait")),
}
