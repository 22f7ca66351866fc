"""Settings of algos/raft.py."""

from __future__ import annotations

import math
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
class RaftConfig:
    preset: str = ""
    """Settings of a paper, as a start: `raft`, `rejection-sampling`, `expert-iteration`, `star` or `rest-em`."""
    prompts: int = 64
    """Tasks per round."""
    group_size: int = 8
    """Answers sampled to each task of a round."""
    select: Literal["best", "passed", "threshold"] = "best"
    """What is kept of a task's answers: the highest rewards, those that passed, or rewards of at least `threshold`."""
    threshold: float = 1.0
    """Lowest reward that `select = "threshold"` keeps."""
    max_per_task: int = 1
    """Most answers kept of one task in a round, all different; ties and surplus are settled by a seeded draw."""
    epochs: int = 1
    """Passes over the selected answers in each round."""
    batch_rows: int = 32
    """Answers per optimizer step; the last one of a pass takes what is left."""
    restart: bool = False
    """Start each round's training from the starting model (STaR, ReST-EM) instead of the current one (RAFT)."""
    pool: Literal["round", "all"] = "round"
    """Train on what this round selected, or on all different answers selected so far."""
    max_empty: int = 5
    """Stop after this many rounds in a row in which nothing was selected."""


@dataclass(frozen=True)
class RaftRecipe:
    """Learning from the model's own best answers: sample, select, fine-tune, repeat.

    Rejection sampling, RAFT, expert iteration, STaR and ReST-EM are settings of it. A step is one round.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: RaftConfig = field(default_factory=RaftConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=10))
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(checkpoint_every=1))

    def __post_init__(self) -> None:
        algo = self.algo
        require_positive(algo, "prompts", "group_size", "max_per_task", "epochs", "batch_rows", "max_empty")
        require_positive(self.train, "steps")
        if algo.max_per_task > algo.group_size:
            raise ConfigError(
                f"algo.max_per_task={algo.max_per_task} is more than the algo.group_size={algo.group_size} answers "
                "sampled to a task."
            )
        if algo.select == "best" and algo.max_per_task == algo.group_size:
            raise ConfigError(
                f"the best {algo.max_per_task} of {algo.group_size} answers are all of them, so nothing would be "
                "selected. Raise algo.group_size or lower algo.max_per_task."
            )
        if not math.isfinite(algo.threshold):
            raise ConfigError(f"algo.threshold={algo.threshold} is not a finite reward.")
        if not algo.restart and self.train.schedule != "constant":
            raise ConfigError(
                f"train.schedule={self.train.schedule!r} needs the number of updates, which depends on how many "
                "answers are selected. Use 'constant', or algo.restart = true, where each round has its own schedule."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all answers to a task equal. Set it above 0, usually 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        check_shared(self)
