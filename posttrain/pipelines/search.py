"""Data stage `search`: training data from a test-time search of a policy (expert iteration with search)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain import api, config
from posttrain.config.sections import require_positive
from posttrain.data.preferences import write_preferences, write_solutions
from posttrain.pipelines.rows import DATA, share, write_rows
from posttrain.rollout.journal import FOLDER
from posttrain.search.export import all_demonstrations, all_pairs, all_solutions
from posttrain.store import durable
from posttrain.types import ConfigError, DataError, Json, SamplingParams

KEPT = "search"
"""Folder of the search in the stage's folder, with results and trees."""


@dataclass(frozen=True)
class Search:
    model: str = "abacus"
    """Model that is sampled."""
    tasks: str = "arithmetic"
    """Training tasks, as in `data.tasks`; the task's own verifier decides what is kept."""
    count: int = 256
    """Number of tasks."""
    rows: Literal["demonstrations", "pairs", "solutions"] = "demonstrations"
    """Rows for `sft` (right completions), for `dpo` (pairs that share a prefix) or for `prm` (labelled steps)."""
    strategy: str = "best-of-n"
    """How the budget is spent, as in `search.strategy`."""
    budget: int = 16
    """Completions per task, as in `search.budget`."""
    scorer: str = ""
    """What steers the search, as in `search.scorer`."""
    separator: str = ""
    """Text that ends a step, as in `search.separator`."""
    expansions: int = 4
    """Next steps of each step that is kept, as in `search.expansions`; for strategies that read it."""
    max_tokens: int = 96
    """Maximum tokens per completion, stop token included."""
    temperature: float = 1.0
    """Sampling temperature."""
    slots: int = 128
    """Sequences decoded at once."""
    seed: int = 0
    """Seed for tasks and completions."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "budget", "slots")
        SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)
        self.recipe()

    def recipe(self) -> config.EvalRecipe:
        """The recipe of the search. Raises ConfigError if it is not possible."""
        if not self.strategy:
            raise ConfigError("strategy is empty; name a search strategy such as best-of-n.")
        steered = {f"search.{name}": getattr(self, name) for name in ("strategy", "budget", "scorer", "separator")}
        if self.expansions != type(self).expansions:
            steered["search.expansions"] = self.expansions
        settings = {
            "data.tasks": self.tasks,
            "data.count": self.count,
            "eval.problems": self.count,
            "eval.temperature": self.temperature,
            "rollout.max_tokens": self.max_tokens,
            "rollout.slots": self.slots,
            "run.seed": self.seed,
        }
        return config.resolve_as(config.EvalRecipe, {}, {**settings, **steered})


def make(cfg: Search, folder: Path) -> Json:
    """Writes the rows, and the search's results and trees to `folder/search`.

    Returns the search's accuracy and coverage on these training tasks, its tokens per task, and the rows. Raises
    DataError if nothing was found.
    """
    found = api.search_recipe(cfg.model, cfg.recipe(), folder / KEPT, split="train")
    path = folder / DATA
    if cfg.rows == "demonstrations":
        rows = all_demonstrations(found)
        write_rows(path, rows)
    else:
        pairs, solutions = (all_pairs(found), []) if cfg.rows == "pairs" else ([], all_solutions(found))
        rows = pairs or solutions
        if not rows:
            raise DataError(f"the search found no {cfg.rows} in {len(found.tasks)} tasks. Use more tasks or budget.")
        if pairs:
            write_preferences(path, pairs)
        else:
            write_solutions(path, solutions)
    shutil.rmtree(folder / KEPT / FOLDER, ignore_errors=True)
    durable.sync_file(path)
    report = found.report
    return {
        "tasks": report.tasks,
        "accuracy": round(report.accuracy.value, 4),
        "coverage": round(report.coverage.value, 4),
        "generated": round(report.generated.value, 1),
        "scored": round(report.scored.value, 1),
        "rows": len(rows),
        "kept": share(len(rows), report.tasks),
    }
