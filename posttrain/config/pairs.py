"""Settings of posttrain/rollout/sample_pairs.py, for every algorithm that learns from preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from posttrain.config.sections import RolloutConfig, require_positive
from posttrain.types import ConfigError


@dataclass(frozen=True)
class PairsConfig:
    samples: int = 8
    """Completions to sample from the starting model per task, if data.tasks has tasks instead of preferences."""
    opening: str = ""
    """Prefix of every sampled completion, e.g. `<think>`."""
    per_task: int = 2
    """Maximum number of pairs from one task's sampled completions."""
    held_out: int = 128
    """Maximum number of held-out tasks to sample held-out pairs from; 0 for none."""
    max_tokens: int = 1024
    """Maximum row length, prompt included; longer rows are truncated at the end and counted."""


class PairSections(Protocol):
    """The sections that `check_pairs` reads."""

    @property
    def pairs(self) -> PairsConfig: ...
    @property
    def rollout(self) -> RolloutConfig: ...


def check_pairs(recipe: PairSections) -> None:
    pairs = recipe.pairs
    require_positive(pairs, "per_task", "max_tokens")
    if pairs.held_out < 0:
        raise ConfigError(f"pairs.held_out={pairs.held_out} is negative. Use 0 for no held-out pairs.")
    if pairs.samples < 2:
        raise ConfigError(f"pairs.samples={pairs.samples} is too few for a pair. Set it to 2 or more.")
    if recipe.rollout.temperature <= 0:
        raise ConfigError("rollout.temperature=0 makes all completions of a task equal. Set it above 0, e.g. 1.")
