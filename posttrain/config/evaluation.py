"""Settings of an evaluation: the sections used by `posttrain eval`, `best-of-n` and `search`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from posttrain.config.search import SearchConfig, rounds
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
    search: SearchConfig = field(default_factory=SearchConfig)
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
        self._check_search()

    def _check_search(self) -> None:
        """Rejects a search that could not use a setting, or whose completions would all be the same."""
        cfg = self.search
        if not cfg.strategy:
            if cfg != SearchConfig():
                given = next(f.name for f in fields(cfg) if getattr(cfg, f.name) != f.default)
                raise ConfigError(f"search.{given}={getattr(cfg, given)!r} has no effect without search.strategy.")
            return
        if self.env.name:
            raise ConfigError(
                f"search.strategy={cfg.strategy!r} needs tasks that one completion answers, but env.name="
                f"{self.env.name!r} has several turns. Leave one of them out."
            )
        if self.eval.samples > 1:
            raise ConfigError(
                f"eval.samples={self.eval.samples}, but a search has one result per task. Give search.budget instead."
            )
        if self.eval.temperature == 0 and cfg.budget > 1 and not (cfg.strategy == "revise" and len(rounds(cfg)) == 1):
            raise ConfigError(
                f"eval.temperature=0 is greedy, so the {cfg.budget} completions of search.strategy={cfg.strategy!r} "
                "would all be the same. Raise eval.temperature, or set search.budget to 1."
            )
