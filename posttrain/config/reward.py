"""Settings of algos/reward.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain.config.facts import Facts, names_tasks
from posttrain.config.pairs import PairsConfig, check_pairs
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


@dataclass(frozen=True)
class RewardModelConfig:
    batch_pairs: int = 32
    """Pairs per optimizer step."""
    heads: int = 1
    """Number of scalar heads; 2 or more form an ensemble on a shared body, each trained on its own bootstrap sample."""
    centre_coef: float = 0.0
    """Weight of the penalty (chosen + rejected)², which keeps scores centred around 0; 0 turns it off."""
    margin: bool = False
    """Subtract each pair's margin from its score difference (Llama 2)."""
    normalise: bool = True
    """After training, shift the bias of each head so that its scores on the training answers have mean 0."""


@dataclass(frozen=True)
class RewardModelRecipe:
    """Reward model trained on preference pairs (Bradley–Terry).

    Gives one score per completion. Trains on a file of pairs, or on the model's own completions, paired by the rewards
    of a verifier.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: RewardModelConfig = field(default_factory=RewardModelConfig)
    train: EpochTrainConfig = field(default_factory=EpochTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        return Facts(
            data="pairs",
            trains="scorer",
            samples="before training" if names_tasks(self.data.tasks) else "never",
            batch_rows=self.algo.batch_pairs * 2,
            shared_prompt=2,
            paired=True,
            held_out_pass=True,
            max_tokens=self.pairs.max_tokens,
        )

    def __post_init__(self) -> None:
        require_positive(self.algo, "batch_pairs", "heads")
        if self.algo.centre_coef < 0:
            raise ConfigError(f"algo.centre_coef={self.algo.centre_coef} cannot be negative. Use 0 to turn it off.")
        check_pairs(self)
        check_shared(self)
