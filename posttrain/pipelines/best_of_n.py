"""Data stage `best-of-n`: what a reward model's choice among n completions is worth, by its own and the true score."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.config.sections import require_positive
from posttrain.pipelines.over_kl import SEARCH
from posttrain.pipelines.rows import sampled
from posttrain.search.best_of_n import picks, summary
from posttrain.store import durable
from posttrain.types import ConfigError, Json, SamplingParams


@dataclass(frozen=True)
class BestOfN:
    model: str = "abacus"
    """Model that is sampled."""
    tasks: str = "arithmetic"
    """Tasks, as in `data.tasks`; their held-out part is used."""
    reward: str = "auto"
    """Scorer that chooses, as in `reward.name`, usually `model:{STAGE}`; passing is up to the task's own verifier."""
    n: int = 16
    """Completions per task, 2 or more; smaller n are estimated from the same completions."""
    count: int = 256
    """Maximum number of tasks."""
    max_tokens: int = 96
    """Maximum tokens per completion, stop token included."""
    temperature: float = 1.0
    """Sampling temperature."""
    slots: int = 128
    """Sequences decoded at once."""
    seed: int = 0
    """Seed for sampling."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "slots")
        if self.n < 2:
            raise ConfigError(f"n={self.n} leaves nothing to choose from; use 2 or more.")
        SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)


def make(cfg: BestOfN, folder: Path) -> Json:
    """Writes `search.json` for the figure `overoptimisation`, and no data, because the tasks are held out.

    It has the rows of `posttrain.search.best_of_n.measure`, and `proxy_by_task` and `gold_by_task`, (P, rows): the
    expected score and pass rate of the best of n. Raises RolloutError if more completions could not be scored than a
    run allows.
    """
    tasks, groups = sampled(cfg, cfg.n, cfg.reward, "held-out")
    best = picks(groups)
    found = summary(best, len(groups))
    _, scores, passing = best
    kept = {**found.as_dict(), "proxy_by_task": scores.tolist(), "gold_by_task": passing.tolist()}
    durable.publish_file(folder / SEARCH, json.dumps(kept, allow_nan=False) + "\n")
    by_n = {str(row.n): {"score": asdict(row.score), "accuracy": asdict(row.accuracy)} for row in found.rows}
    return {"tasks": found.tasks, "left_out": found.left_out, "answers": len(tasks) * cfg.n, "best_of": by_n}
