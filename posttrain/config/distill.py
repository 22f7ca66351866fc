"""Settings of algos/distill.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from posttrain.config.choices import KeysOf
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
class DistillConfig:
    teacher: str = ""
    """Teacher model: a folder, hub id, `abacus` or finished run folder, with the same tokenizer as the student."""
    prompts: int = 32
    """Tasks per step."""
    group_size: int = 4
    """Completions the student samples per task; they are not compared with each other, so 1 is enough."""
    estimator: Literal["full", "sampled"] = "full"
    """`full` sums over the vocabulary at each sampled position; `sampled` is a policy gradient on sampled tokens."""
    divergence: Annotated[str, KeysOf("objectives/distill.py", "DIVERGENCES")] = "reverse-kl"
    """Divergence for `full`: KL(student ‖ teacher), KL(teacher ‖ student), or GKD's generalised Jensen–Shannon."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of `jsd`, between 0 and 1."""
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    """How token losses are averaged over the optimizer batch (see grpo's aggregate)."""
    max_mismatch: float = 0.5
    """Stop if the log-probabilities of sampler and learner differ by more than this on any token."""


@dataclass(frozen=True)
class DistillRecipe:
    """On-policy distillation from a teacher model.

    The student samples completions and is trained to match the teacher's distribution at each of its own tokens. The
    reward is only measured, not optimised.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        return Facts(
            teacher=True,
            prompts=self.algo.prompts,
            group_size=self.algo.group_size,
            batch_rows=self.algo.prompts * self.algo.group_size,
            shared_prompt=self.algo.group_size,
            scoring_passes=1,  # the teacher's
        )

    def __post_init__(self) -> None:
        algo = self.algo
        if algo.estimator == "sampled" and algo.divergence != "reverse-kl":
            raise ConfigError(
                f"algo.estimator='sampled' estimates the reverse KL only, not {algo.divergence!r}. "
                "Set algo.estimator = 'full', or algo.divergence = 'reverse-kl'."
            )
        if not 0 < algo.beta < 1:
            raise ConfigError(
                f"algo.beta={algo.beta} is not between 0 and 1. For 0 and 1, use forward-kl or reverse-kl instead."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 gives no distribution to compare. Set it above 0, usually 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        if algo.max_mismatch < 0:
            raise ConfigError(f"algo.max_mismatch={algo.max_mismatch} cannot be negative.")
        require_positive(algo, "prompts", "group_size")
        require_positive(self.train, "steps")
        check_shared(self)
