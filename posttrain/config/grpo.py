"""Settings of algos/grpo.py."""

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
class GRPOConfig:
    prompts: int = 32
    """Tasks per step."""
    group_size: int = 8
    """Completions per task; their mean reward is the baseline."""
    minibatches: int = 1
    """Optimizer steps per batch of completions; 1 is strictly on-policy."""
    policy_loss: Literal["clip", "reinforce"] = "clip"
    """`clip` is PPO's pessimistic ratio; `reinforce` is the plain policy gradient."""
    clip_low: float = 0.2
    """Ratios below 1 − clip_low earn nothing more."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high earn nothing more (DAPO's clip-higher uses 0.28)."""
    normalise_std: bool = False
    """Divide advantages by the group's standard deviation (GRPO as published); off is Dr. GRPO's choice."""
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    """How tokens are weighted over the optimizer batch: DAPO, GRPO, sequence sum, Dr. GRPO."""
    kl_coef: float = 0.0
    """Weight of the k3 KL penalty towards the starting model; 0 keeps no reference."""
    is_cap: float = 0.0
    """Cap of the importance weight that corrects sampler against learner; 0 does not correct."""
    max_mismatch: float = 0.5
    """Stop when sampler and learner differ by more than this in one token's log-probability."""
    max_flat_steps: int = 20
    """Stop after this many steps in a row in which no group had differing rewards."""


@dataclass(frozen=True)
class GRPORecipe:
    """Reinforcement learning on a reward that a program computes.

    An answer's advantage is its reward minus the mean of the answers to the same question (GRPO and its family).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: GRPOConfig = field(default_factory=GRPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        algo = self.algo
        if algo.group_size < 2:
            raise ConfigError(
                f"group_size={algo.group_size} gives every answer advantage 0 and nothing would train. "
                "Set algo.group_size to 2 or more."
            )
        if algo.prompts * algo.group_size % algo.minibatches:
            raise ConfigError(
                f"{algo.prompts} prompts × {algo.group_size} completions do not divide into "
                f"{algo.minibatches} minibatches. Choose algo.minibatches to divide {algo.prompts * algo.group_size}."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all answers of a group equal. Set it above 0, usually 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        for name in ("clip_low", "clip_high", "kl_coef", "is_cap", "max_mismatch"):
            if getattr(algo, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(algo, name)} cannot be negative.")
        require_positive(algo, "prompts", "minibatches", "max_flat_steps")
        require_positive(self.train, "steps")
        check_shared(self)
