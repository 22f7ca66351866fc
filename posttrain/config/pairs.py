"""Settings of posttrain/rollout/sample_pairs.py, for every algorithm that learns from preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain.config.sections import require_positive
from posttrain.types import ConfigError


@dataclass(frozen=True)
class PairsConfig:
    samples: int = 8
    """Answers sampled from the starting model per task, where data.tasks names tasks rather than preferences."""
    opening: str = ""
    """Text that every sampled answer begins with and the model continues, e.g. `<think>`."""
    per_task: int = 2
    """Most pairs kept of one task's sampled answers."""
    held_out: int = 128
    """Most held-out tasks whose sampled answers make held-out pairs; 0 makes none."""
    max_tokens: int = 1024
    """Longest row, prompt and answer; longer ones are cut at the end and counted, never silently."""


def check_pairs(recipe: Any) -> None:
    pairs = recipe.pairs
    require_positive(pairs, "per_task", "max_tokens")
    if pairs.held_out < 0:
        raise ConfigError(f"pairs.held_out={pairs.held_out} is negative; 0 makes no held-out pairs.")
    if pairs.samples < 2:
        raise ConfigError(f"pairs.samples={pairs.samples} makes no pair of answers; set it to 2 or more.")
    if recipe.rollout.temperature <= 0:
        raise ConfigError("rollout.temperature=0 makes all answers of a task equal. Set it above 0, usually 1.")
