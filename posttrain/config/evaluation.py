"""Settings of an evaluation: the sections used by `posttrain eval`, `best-of-n` and `sample`."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain.config.sections import (
    ClusterConfig,
    DataConfig,
    EnvConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    check_shared,
)
from posttrain.types import ConfigError


@dataclass(frozen=True)
class EvalRecipe:
    """Samples a model on held-out tasks; of `train`, only `threads` and `device` apply, of `cluster` not `learners`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        if self.cluster.learners > 1:
            raise ConfigError(
                f"cluster.learners={self.cluster.learners}, but an evaluation computes no gradients. Give "
                "cluster.samplers instead."
            )
        check_shared(self)
