"""Best of n as a stage: how much a reward model's choice among n answers is worth, by its own score and in truth."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.config.sections import require_positive
from posttrain.pipelines.over_kl import SEARCH
from posttrain.pipelines.rows import sampled
from posttrain.search.best_of_n import picks, summary
from posttrain.store import durable
from posttrain.types import ConfigError, SamplingParams


@dataclass(frozen=True)
class BestOfN:
    model: str = "abacus"
    """Whose answers are chosen among."""
    tasks: str = "arithmetic"
    """Held-out tasks of these, as `data.tasks` names them."""
    reward: str = "auto"
    """What chooses, as `reward.name`: usually `model:{STAGE}`. Whether an answer passes is the task's own affair."""
    n: int = 16
    """Answers to each task, 2 or more; smaller numbers are estimated from the same answers."""
    count: int = 256
    """Most tasks."""
    max_tokens: int = 96
    """Longest answer, stop token included."""
    temperature: float = 1.0
    """Sampling temperature."""
    slots: int = 128
    """Answers written at once."""
    seed: int = 0
    """Which answers are drawn."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "slots")
        if self.n < 2:
            raise ConfigError(f"n={self.n} leaves nothing to choose from; a search needs 2 answers or more.")
        SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)


def make(cfg: BestOfN, folder: Path) -> dict[str, Any]:
    """Writes `search.json` for the figure `overoptimisation`, and no data: the tasks are held out.

    It has the rows of `posttrain.search.best_of_n.measure`, and `proxy_by_task` and `gold_by_task`, (P, rows): what the
    best of n is expected to score, and how likely it passes. Raises RolloutError where more answers could not be scored
    than a run allows.
    """
    tasks, groups = sampled(cfg, cfg.n, cfg.reward, "held-out")
    best = picks(groups)
    found = summary(best, len(groups))
    _, scores, passing = best
    kept = {**found.as_dict(), "proxy_by_task": scores.tolist(), "gold_by_task": passing.tolist()}
    durable.publish_file(folder / SEARCH, json.dumps(kept, allow_nan=False) + "\n")
    by_n = {str(row.n): {"score": asdict(row.score), "accuracy": asdict(row.accuracy)} for row in found.rows}
    return {"tasks": found.tasks, "left_out": found.left_out, "answers": len(tasks) * cfg.n, "best_of": by_n}
