"""Settings of algos/online_dpo.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from posttrain.config.choices import KeysOf
from posttrain.config.dpo import NO_REFERENCE
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
class OnlineDPOConfig:
    prompts: int = 32
    """Tasks per step; each gives at most one pair."""
    group_size: int = 4
    """Completions per task; the best and the worst of them form the pair."""
    loss: Annotated[str, KeysOf("objectives/preference.py", "PAIR_LOSSES", without=NO_REFERENCE)] = "sigmoid"
    """Pair loss: `sigmoid` (DPO), `robust` DPO, `ipo`, or `hinge` (SLiC)."""
    beta: float = 0.1
    """Scale of the implicit reward, β times the log-ratio; τ in IPO."""
    label_smoothing: float = 0.0
    """Probability that the judge is wrong, in [0, 0.5)."""
    length_normalise: bool = False
    """Use the mean instead of the sum of a completion's token log-probabilities."""
    margin_coef: float = 0.0
    """Margin of the loss, as a multiple of the pair's reward difference; 0 uses no margin."""
    max_mismatch: float = 0.5
    """Stop if the log-probabilities of sampler and learner differ by more than this on any token."""
    max_flat_steps: int = 20
    """End after this many steps in a row without any pair: as solved if all completions passed, else as an error."""


@dataclass(frozen=True)
class OnlineDPORecipe:
    """DPO on pairs sampled from the current policy.

    A pair is the best and the worst completion of a task, by reward. The reference model is the starting model (Guo et
    al., OAIF, arXiv 2402.04792).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: OnlineDPOConfig = field(default_factory=OnlineDPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        return Facts(
            reference="frozen",
            prompts=self.algo.prompts,
            group_size=self.algo.group_size,
            batch_rows=2 * self.algo.prompts,
            shared_prompt=2,
            paired=True,
            scoring_passes=1,
        )

    def __post_init__(self) -> None:
        algo = self.algo
        if algo.group_size < 2:
            raise ConfigError(
                f"group_size={algo.group_size} gives no pair to compare. Set algo.group_size to 2 or more."
            )
        if not 0 < algo.beta < math.inf:
            raise ConfigError(f"algo.beta={algo.beta} must be positive and finite; 0.1 is common.")
        if not 0 <= algo.label_smoothing < 0.5:
            raise ConfigError(
                f"algo.label_smoothing={algo.label_smoothing} is not in [0, 0.5): at 0.5 rewards carry no information, "
                "and above it the worse completion would be preferred."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all completions of a group equal. Set it above 0, e.g. 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        for name in ("margin_coef", "max_mismatch"):
            if getattr(algo, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(algo, name)} cannot be negative.")
        require_positive(algo, "prompts", "max_flat_steps")
        require_positive(self.train, "steps")
        check_shared(self)
