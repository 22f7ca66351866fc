"""Settings of algos/prm.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.facts import Facts, names_tasks
from posttrain.config.sections import (
    ClusterConfig,
    DataConfig,
    EpochTrainConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    check_shared,
    require_positive,
)
from posttrain.types import ConfigError

Labels = Literal["soft", "hard", "first-mistake", "program"]
"""How sampled steps are labelled."""


@dataclass(frozen=True)
class PRMConfig:
    level: Literal["step", "outcome"] = "step"
    """`step` scores every step of a solution (process reward model), `outcome` scores the whole solution at its end."""
    separator: str = "\n"
    """Text between two steps of a solution."""
    aggregate: Literal["min", "product", "last", "mean"] = "min"
    """How the probabilities of the steps are combined into one score for the solution."""
    after_mistake: Literal["drop", "wrong"] = "drop"
    """What to do with the unlabelled steps after the first mistake: leave them out, or label them wrong."""
    batch_rows: int = 32
    """Solutions per optimizer step."""
    lm_coef: float = 0.0
    """Weight of a language modelling loss on prompts and solutions, which keeps what the model needs to check steps."""
    max_tokens: int = 1024
    """Maximum row length, prompt included; longer rows are dropped and counted."""
    solutions: int = 4
    """Solutions to sample from the starting model per task, if data.tasks has tasks instead of labelled solutions."""
    completions: int = 8
    """Completions to sample after each step of a sampled solution; the share of correct ones labels the step."""
    labels: Labels = "soft"
    """`soft`: share of right completions; `hard`: any right; `first-mistake`: binary search; `program`: exact check."""
    held_out_labels: Literal["", "soft", "hard", "first-mistake", "program"] = ""
    """Labels of the held-out solutions that are sampled, to measure against better labels; empty uses `labels`."""
    opening: str = ""
    """Prefix of every sampled solution, e.g. `<think>`."""


@dataclass(frozen=True)
class PRMRecipe:
    """Process or outcome reward model.

    Predicts whether each step of a solution, or the whole solution, is correct. Trains on labelled solutions, or on
    sampled solutions whose steps are labelled by rollouts (Math-Shepherd).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: PRMConfig = field(default_factory=PRMConfig)
    train: EpochTrainConfig = field(default_factory=EpochTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        return Facts(
            data="solutions",
            trains="scorer",
            samples="before training" if names_tasks(self.data.tasks) else "never",
            batch_rows=self.algo.batch_rows,
            held_out_pass=True,
            max_tokens=self.algo.max_tokens,
        )

    def __post_init__(self) -> None:
        require_positive(self.algo, "batch_rows", "max_tokens", "solutions", "completions")
        if not 0 <= self.algo.lm_coef < math.inf:
            raise ConfigError(f"algo.lm_coef={self.algo.lm_coef} is not a weight; set 0 or more.")
        if not self.algo.separator:
            raise ConfigError(
                "algo.separator is empty, so every solution would be one step. Set it to the text between steps."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all solutions of a task equal. Set it above 0, usually 1.")
        check_shared(self)
