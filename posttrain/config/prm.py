"""Settings of algos/prm.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.sections import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    check_shared,
    require_positive,
)
from posttrain.types import ConfigError


@dataclass(frozen=True)
class PRMConfig:
    level: Literal["step", "outcome"] = "step"
    """`step` judges every step of an answer (a process model), `outcome` the answer as a whole, at its end."""
    separator: str = "\n"
    """What stands between two steps of an answer."""
    aggregate: Literal["min", "product", "last", "mean"] = "min"
    """How the steps' probabilities become one score of the answer."""
    after_mistake: Literal["drop", "wrong"] = "drop"
    """Steps after a first mistake, which nobody labelled: left out, or labelled wrong."""
    batch_rows: int = 32
    """Solutions per optimizer step."""
    max_tokens: int = 1024
    """Longest row, prompt and answer; longer ones are left out and counted."""
    solutions: int = 4
    """Solutions sampled from the starting model per task, where data.tasks names tasks rather than solutions."""
    completions: int = 8
    """Completions sampled after each step of those; the share that ends right is the step's label."""
    labels: Literal["soft", "hard"] = "soft"
    """Labels of sampled steps: `soft` is that share, `hard` is 1 where any completion ends right."""
    opening: str = ""
    """Text that every sampled solution begins with, e.g. `<think>`."""


@dataclass(frozen=True)
class PRMRecipe:
    """A model of which steps of an answer are right, or whether the whole is (process and outcome verifiers).

    Learns from labelled solutions, or from the model's own with steps labelled by completing them (Math-Shepherd).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: PRMConfig = field(default_factory=PRMConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require_positive(self.algo, "batch_rows", "max_tokens", "solutions", "completions")
        if not self.algo.separator:
            raise ConfigError(
                "algo.separator is empty, so every answer would be one step. Give the text between steps."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all solutions of a task equal. Set it above 0, usually 1.")
        check_shared(self)
