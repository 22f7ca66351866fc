"""Settings of algos/raft.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.facts import Facts
from posttrain.config.sections import (
    ClusterConfig,
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
class RaftConfig:
    preset: str = ""
    """Method whose settings to use as defaults: `raft`, `rejection-sampling`, `expert-iteration`, `star`, `rest-em`."""
    prompts: int = 64
    """Tasks per round."""
    group_size: int = 8
    """Completions per task."""
    select: Literal["best", "passed", "threshold"] = "best"
    """Which completions of a task to keep: the best by reward, those that passed, or those with reward ≥ threshold."""
    threshold: float = 1.0
    """Minimum reward with `select = "threshold"`."""
    max_per_task: int = 1
    """Maximum number of distinct completions kept per task and round; ties and excess are resolved at random."""
    epochs: int = 1
    """Passes over the selected completions in each round."""
    batch_rows: int = 32
    """Completions per optimizer step; the last step of a pass may have fewer."""
    restart: bool = False
    """Start each round's training from the starting model (STaR, ReST-EM) instead of the current one (RAFT)."""
    pool: Literal["round", "all"] = "round"
    """Train on the completions selected in this round, or on all distinct ones selected so far."""
    max_empty: int = 5
    """Stop after this many consecutive rounds in which nothing was selected."""


@dataclass(frozen=True)
class RaftRecipe:
    """Iterated fine-tuning on the model's own best completions.

    Each round samples, selects and trains; a step is one round. Covers rejection sampling, RAFT, expert iteration, STaR
    and ReST-EM, by settings.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: RaftConfig = field(default_factory=RaftConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=10))
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(checkpoint_every=1))
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        return Facts(
            starting_weights=self.algo.restart,
            prompts=self.algo.prompts,
            group_size=self.algo.group_size,
            batch_rows=self.algo.batch_rows,
            epochs=self.algo.epochs,
        )

    def __post_init__(self) -> None:
        algo = self.algo
        require_positive(algo, "prompts", "group_size", "max_per_task", "epochs", "batch_rows", "max_empty")
        require_positive(self.train, "steps")
        if algo.max_per_task > algo.group_size:
            raise ConfigError(
                f"algo.max_per_task={algo.max_per_task} is more than the algo.group_size={algo.group_size} completions "
                "sampled per task."
            )
        if algo.select == "best" and algo.max_per_task == algo.group_size:
            raise ConfigError(
                f"the best {algo.max_per_task} of {algo.group_size} completions are all of them, so there is no "
                "selection. Raise algo.group_size or lower algo.max_per_task."
            )
        if not math.isfinite(algo.threshold):
            raise ConfigError(f"algo.threshold={algo.threshold} is not a finite reward.")
        if not algo.restart and self.train.schedule != "constant":
            raise ConfigError(
                f"train.schedule={self.train.schedule!r} needs the number of updates, which depends on how many "
                "completions are selected. Use 'constant', or algo.restart = true, with a schedule for each round."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all completions of a task equal. Set it above 0, e.g. 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        check_shared(self)
