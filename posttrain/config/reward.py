"""Settings of algos/reward.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain.config.pairs import PairsConfig, check_pairs
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
class RewardModelConfig:
    batch_pairs: int = 32
    """Pairs per optimizer step."""
    heads: int = 1
    """Scalar heads on the shared body; 2 or more make an ensemble, each head trained on its own bootstrap."""
    centre_coef: float = 0.0
    """Weight of (chosen + rejected)², which keeps the scores of a pair around 0; 0 leaves their zero free."""
    margin: bool = False
    """Subtract each pair's own margin from its score difference (Llama 2); off is the plain loss."""
    normalise: bool = True
    """After training, shift each head's bias so that its scores of the training answers have mean 0."""


@dataclass(frozen=True)
class RewardModelRecipe:
    """A reward model from preferences: a score for whole answers, the better one higher (Bradley–Terry).

    Learns from a file of pairs, or from the model's own answers to tasks, paired by what a program says of them.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: RewardModelConfig = field(default_factory=RewardModelConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require_positive(self.algo, "batch_pairs", "heads")
        if self.algo.centre_coef < 0:
            raise ConfigError(f"algo.centre_coef={self.algo.centre_coef} cannot be negative; 0 does not centre.")
        check_pairs(self)
        check_shared(self)
