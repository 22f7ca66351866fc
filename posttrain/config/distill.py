"""Settings of algos/distill.py."""

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
class DistillConfig:
    teacher: str = ""
    """Folder, hub id, `abacus`, or finished run folder of the model to learn from; same tokenizer as the student's."""
    prompts: int = 32
    """Tasks per step."""
    group_size: int = 4
    """Answers the student writes to each task; one is enough, since no answer is compared with another."""
    estimator: Literal["full", "sampled"] = "full"
    """`full` sums over the vocabulary at each sampled position; `sampled` is the policy gradient of the drawn token."""
    divergence: Literal["reverse-kl", "forward-kl", "jsd"] = "reverse-kl"
    """What `full` minimises: KL(student ‖ teacher), KL(teacher ‖ student), or GKD's generalised Jensen–Shannon."""
    beta: float = 0.5
    """The teacher's weight in the mixture of `jsd`, between 0 and 1."""
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    """How tokens are weighted over the optimizer batch (see grpo's setting)."""
    max_mismatch: float = 0.5
    """Stop when sampler and learner differ by more than this in one token's log-probability."""


@dataclass(frozen=True)
class DistillRecipe:
    """On-policy distillation from a teacher.

    The student answers, and at each token it wrote it is moved towards what the teacher would have said there. The
    reward only measures.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        algo = self.algo
        if algo.estimator == "sampled" and algo.divergence != "reverse-kl":
            raise ConfigError(
                f"algo.estimator='sampled' estimates the reverse KL only, not {algo.divergence!r}. "
                "Set algo.estimator = 'full', or algo.divergence = 'reverse-kl'."
            )
        if not 0 < algo.beta < 1:
            raise ConfigError(
                f"algo.beta={algo.beta} is not between 0 and 1; use forward-kl or reverse-kl at the ends."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 leaves no distribution to compare. Set it above 0, usually 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        if algo.max_mismatch < 0:
            raise ConfigError(f"algo.max_mismatch={algo.max_mismatch} cannot be negative.")
        require_positive(algo, "prompts", "group_size")
        require_positive(self.train, "steps")
        check_shared(self)
