"""Settings of algos/grpo.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.sections import (
    DataConfig,
    EnvConfig,
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

COMPARE_IN_GROUP = ("group-mean", "leave-one-out")
"""Baselines that compare the answers to one task, so that a single answer learns nothing."""


@dataclass(frozen=True)
class GRPOConfig:
    preset: str = ""
    """Paper or implementation whose choices fill the settings not given here (`posttrain presets` lists them)."""
    prompts: int = 32
    """Tasks per step."""
    group_size: int = 8
    """Completions per task."""
    minibatches: int = 1
    """Optimizer steps per pass over a step's completions; 1 (and 1 epoch) is strictly on-policy."""
    epochs: int = 1
    """Passes over a step's completions."""
    baseline: Literal["group-mean", "leave-one-out", "batch-mean", "greedy", "ema", "none"] = "group-mean"
    """What rewards are compared with: the mean of group, others or batch, the greedy answer's, a running mean."""
    ema_decay: float = 0.9
    """How slowly the running mean of `baseline = "ema"` moves."""
    std: Literal["none", "sample", "population", "batch", "mean"] = "none"
    """Divide by nothing, the group's standard deviation with n − 1 (GRPO) or n, the batch's, or the group's mean."""
    std_eps: float = 0.0
    """Added to that standard deviation: 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF."""
    whiten: Literal["none", "sample", "population"] = "none"
    """Shift and scale the advantages of all tokens of a step to mean 0 and variance 1 (REINFORCE++)."""
    policy_loss: Literal["clip", "dual-clip", "gspo", "gspo-token", "cispo", "sapo", "importance", "reinforce"] = "clip"
    """`clip` is PPO's pessimistic ratio, `reinforce` the plain policy gradient; docs/guides/grpo.md has the formulas."""
    clip_low: float = 0.2
    """Ratios below 1 − clip_low earn nothing more."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high earn nothing more (DAPO's clip-higher uses 0.28)."""
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant", "chunk-mean"] = (
        "token-mean"
    )
    """How tokens are weighted over the optimizer batch: DAPO, GRPO, sequence sum, Dr. GRPO, nanochat."""
    kl_coef: float = 0.0
    """Weight of the KL penalty towards the starting model; 0 keeps no reference."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k3+"
    """Estimator of the KL per token; `k3+` has the value of k3 and, in the loss, the gradient that is right."""
    kl_place: Literal["loss", "reward", "reward-to-go"] = "loss"
    """Into the loss; summed, into the answer's reward before the baseline; or to go, into each token's advantage."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus per token."""
    credit: Literal["episode", "turn"] = "episode"
    """With env: all replies share the episode's advantage, or each is compared by what was earned from its turn on."""
    is_cap: float = 0.0
    """Cap of the importance weight that corrects sampler against learner; 0 does not correct."""
    is_mode: Literal[
        "token-truncate",
        "token-mask",
        "sequence-truncate",
        "sequence-mask",
        "sequence-sum-truncate",
        "sequence-sum-mask",
    ] = "token-truncate"
    """One weight per token or per answer; over the cap it is cut to the cap, or the token or answer is left out."""
    is_floor: float = 0.0
    """Smallest importance weight, treated like the cap."""
    max_lag: int = 0
    """Steps by which the sampler's weights may be older than the learner's; 0 samples from the newest."""
    overlap: bool = False
    """Write the next step's answers while this one's are learned from, with the weights before the update: lag 1."""
    max_refills: int = 0
    """Times flat groups are replaced by groups of fresh tasks within a step (DAPO's dynamic sampling); 0 keeps them."""
    curriculum: Literal["none", "pass-rate"] = "none"
    """Ask all tasks in turn, or those more often that are neither always solved nor never (a running pass rate)."""
    overlong_share: float = 0.0
    """Last share of max_tokens over which a penalty for length grows from 0 to 1 (DAPO: 0.2); 0 has none."""
    drop_truncated: bool = False
    """Leave answers that were cut by max_tokens out of the loss (DAPO's overlong filtering)."""
    old_logp: Literal["learner", "sampler"] = "learner"
    """Where the ratio of several updates starts: `learner` takes one more pass, `sampler` lets rounding into it."""
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
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: GRPOConfig = field(default_factory=GRPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        algo = self.algo
        require_positive(algo, "prompts", "group_size", "minibatches", "epochs", "max_flat_steps")
        require_positive(self.train, "steps")
        for name in ("clip_low", "clip_high", "kl_coef", "is_cap", "is_floor", "max_mismatch", "std_eps"):
            if getattr(algo, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(algo, name)} cannot be negative.")
        for name in ("max_lag", "max_refills"):
            if getattr(algo, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(algo, name)} cannot be negative; 0 switches it off.")
        if algo.prompts * algo.group_size % algo.minibatches:
            raise ConfigError(
                f"{algo.prompts} prompts × {algo.group_size} completions do not divide into "
                f"{algo.minibatches} minibatches. Choose algo.minibatches to divide {algo.prompts * algo.group_size}."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all answers of a group equal. Set it above 0, usually 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        check_credit(algo)
        check_shared(self)


def check_credit(algo: GRPOConfig) -> None:
    """Refuses combinations that would train nothing, or something else than they say."""
    if algo.group_size < 2 and (algo.baseline in COMPARE_IN_GROUP or algo.std in ("sample", "population", "mean")):
        raise ConfigError(
            f"group_size={algo.group_size} gives every answer advantage 0 and nothing would train. "
            'Set algo.group_size to 2 or more, or algo.baseline = "ema" with algo.std = "none".'
        )
    if algo.baseline != "group-mean" and algo.std not in ("none", "batch"):
        raise ConfigError(f'algo.std = "{algo.std}" needs algo.baseline = "group-mean", not "{algo.baseline}".')
    if algo.std == "batch" and algo.baseline not in ("group-mean", "batch-mean"):
        raise ConfigError(f'algo.std = "batch" does not go with algo.baseline = "{algo.baseline}"; use "none".')
    if not 0 <= algo.ema_decay < 1:
        raise ConfigError(f"algo.ema_decay={algo.ema_decay} is not in [0, 1).")
    if algo.credit == "turn" and (algo.overlong_share or (algo.kl_coef and algo.kl_place == "reward")):
        raise ConfigError(
            'algo.credit = "turn" compares what each turn earned; algo.overlong_share and algo.kl_place = "reward" '
            'change whole episodes only. Leave them off, or use algo.credit = "episode".'
        )
    if algo.overlap and algo.max_lag:
        raise ConfigError(f"algo.overlap has a lag of 1 by itself; leave algo.max_lag={algo.max_lag} at 0.")
    if algo.max_refills and algo.group_size < 2:
        raise ConfigError("algo.max_refills replaces groups without differing rewards; a group of 1 never differs.")
    if not 0 <= algo.overlong_share <= 1:
        raise ConfigError(f"algo.overlong_share={algo.overlong_share} is not in [0, 1].")
    if algo.old_logp == "sampler" and algo.is_cap:
        raise ConfigError('algo.is_cap corrects sampler against learner, so it needs algo.old_logp = "learner".')
    if algo.is_cap and algo.is_floor > algo.is_cap:
        raise ConfigError(f"algo.is_floor={algo.is_floor} is above algo.is_cap={algo.is_cap}.")
    if algo.policy_loss == "gspo" and (algo.kl_place == "reward-to-go" and algo.kl_coef):
        raise ConfigError('policy_loss = "gspo" needs equal advantages in a row; use "gspo-token" with reward-to-go.')
