"""Settings of algos/grpo.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from posttrain.config.choices import KeysOf
from posttrain.config.facts import Facts, Saving
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
    require_positive,
)
from posttrain.types import ConfigError

COMPARE_IN_GROUP = ("group-mean", "leave-one-out")
"""Baselines computed within a group, which give a group of one completion no learning signal."""


@dataclass(frozen=True)
class GRPOConfig:
    preset: str = ""
    """Paper or implementation whose settings to use as defaults (`posttrain presets` lists them)."""
    prompts: int = 32
    """Tasks per step."""
    group_size: int = 8
    """Completions per task."""
    minibatches: int = 1
    """Optimizer steps per epoch; with 1 minibatch and 1 epoch, training is strictly on-policy."""
    epochs: int = 1
    """Passes over a step's completions."""
    baseline: Literal["group-mean", "leave-one-out", "batch-mean", "greedy", "ema", "none"] = "group-mean"
    """Baseline: mean reward of the group, of its other completions or of the batch; greedy reward; running mean."""
    ema_decay: float = 0.9
    """Decay of the running mean with `baseline = "ema"`."""
    std: Literal["none", "sample", "population", "batch", "mean"] = "none"
    """Divisor of advantages: none, group std with n − 1 (`sample`, GRPO) or n (`population`), batch std, group mean."""
    std_eps: float = 0.0
    """Added to the standard deviation: 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF."""
    whiten: Literal["none", "sample", "population"] = "none"
    """Normalise the advantages of all tokens in a step to mean 0 and variance 1 (REINFORCE++)."""
    policy_loss: Annotated[str, KeysOf("objectives/policy.py", "POLICY_LOSSES", or_file=True)] = "clip"
    """`clip` is PPO's clipped ratio, `reinforce` the plain policy gradient, or your own; see docs/guides/grpo.md."""
    clip_low: float = 0.2
    """Lower clip: ratio ≥ 1 − clip_low."""
    clip_high: float = 0.2
    """Upper clip: ratio ≤ 1 + clip_high (0.28 in DAPO's clip-higher)."""
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant", "chunk-mean"] = (
        "token-mean"
    )
    """Loss aggregation over the optimizer batch: as in DAPO, GRPO, a sum per sequence, Dr. GRPO or nanochat."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the starting model; 0 loads no reference model."""
    kl_estimator: Annotated[str, KeysOf("objectives/tokens.py", "KL_ESTIMATORS")] = "k3+"
    """Per-token KL estimator; `k3+` has the value of k3 and, in the loss, the unbiased gradient of k2."""
    kl_place: Literal["loss", "reward", "reward-to-go"] = "loss"
    """Where the KL goes: the loss, each completion's reward (summed), or each token's advantage (sum from there on)."""
    entropy_coef: float = 0.0
    """Weight of the per-token entropy bonus."""
    credit: Literal["episode", "turn"] = "episode"
    """With env: all turns share the episode's advantage, or each turn's advantage uses the rewards from it onwards."""
    is_cap: float = 0.0
    """Upper limit of the importance weight that corrects for sampler–learner mismatch; 0 turns the correction off."""
    is_mode: Literal[
        "token-truncate",
        "token-mask",
        "sequence-truncate",
        "sequence-mask",
        "sequence-sum-truncate",
        "sequence-sum-mask",
    ] = "token-truncate"
    """One weight per token or sequence; beyond the limits the weight is clipped, or the token or sequence is masked."""
    is_floor: float = 0.0
    """Lower limit of the importance weight, handled like is_cap."""
    max_lag: int = 0
    """Maximum number of steps by which the sampler's weights lag the learner's; 0 always samples with the newest."""
    ahead: int = 0
    """Number of steps that sampling is ahead of training, and so the lag of every completion; 0 samples in turn."""
    max_resamples: int = 0
    """Rounds per step that replace groups of equal rewards by new tasks (DAPO's dynamic sampling); 0: none."""
    curriculum: Literal["none", "pass-rate"] = "none"
    """`none` uses all tasks in turn; `pass-rate` prefers tasks that are solved sometimes (running pass rate)."""
    overlong_share: float = 0.0
    """Final share of max_tokens over which a length penalty grows from 0 to 1 (0.2 in DAPO); 0 turns it off."""
    mask_truncated: bool = False
    """Exclude completions truncated at max_tokens from the loss (DAPO's overlong filtering)."""
    old_logp: Literal["learner", "sampler"] = "learner"
    """Old log-probabilities: `learner` computes them in an extra pass; `sampler` reuses the sampler's, skipping it."""
    max_mismatch: float = 0.5
    """Stop if the log-probabilities of sampler and learner differ by more than this on any token."""
    max_flat_steps: int = 20
    """End after this many steps in a row with equal rewards per group: as solved if all passed, else as an error."""


@dataclass(frozen=True)
class GRPORecipe:
    """Policy-gradient RL with group baselines (GRPO and its family).

    A completion's advantage is its reward minus the mean reward of the completions for the same prompt.
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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        algo = self.algo
        updates = algo.minibatches * algo.epochs
        old_logp = algo.old_logp == "learner" and (updates > 1 or bool(algo.is_cap and (algo.ahead or algo.max_lag)))
        return Facts(
            reference="frozen" if algo.kl_coef else "none",
            sampler_copies=algo.ahead + 1 if algo.ahead > 1 else int(bool(algo.max_lag or algo.ahead)),
            prompts=algo.prompts,
            group_size=algo.group_size,
            batch_rows=algo.prompts * algo.group_size // algo.minibatches,
            minibatches=algo.minibatches,
            epochs=algo.epochs,
            shared_prompt=algo.group_size,
            scoring_passes=int(algo.kl_coef > 0) + int(old_logp),
            savings=(Saving("algo.ahead", 0, "sampling no longer overlaps with training"),) * bool(algo.ahead),
        )

    def __post_init__(self) -> None:
        algo = self.algo
        require_positive(algo, "prompts", "group_size", "minibatches", "epochs", "max_flat_steps")
        if algo.curriculum != "none" and not self.data.shuffle:
            raise ConfigError(
                f"algo.curriculum={algo.curriculum!r} chooses tasks by their pass rate, which contradicts "
                "data.shuffle=false. Set one of them back."
            )
        require_positive(self.train, "steps")
        for name in ("clip_low", "clip_high", "kl_coef", "is_cap", "is_floor", "max_mismatch", "std_eps"):
            if getattr(algo, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(algo, name)} cannot be negative.")
        for name in ("max_lag", "ahead", "max_resamples"):
            if getattr(algo, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(algo, name)} cannot be negative. Use 0 to turn it off.")
        if algo.prompts * algo.group_size % algo.minibatches:
            raise ConfigError(
                f"{algo.prompts} prompts × {algo.group_size} completions do not divide into "
                f"{algo.minibatches} minibatches. Choose algo.minibatches to divide {algo.prompts * algo.group_size}."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all completions of a group equal. Set it above 0, e.g. 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        check_credit(algo)
        check_shared(self)


def check_credit(algo: GRPOConfig) -> None:
    """Rejects combinations that would train nothing or not do what they say."""
    if algo.group_size < 2 and (algo.baseline in COMPARE_IN_GROUP or algo.std in ("sample", "population", "mean")):
        raise ConfigError(
            f"group_size={algo.group_size} gives every completion an advantage of 0, so nothing would be trained. "
            'Set algo.group_size to 2 or more, or algo.baseline = "ema" with algo.std = "none".'
        )
    if algo.baseline != "group-mean" and algo.std not in ("none", "batch"):
        raise ConfigError(f'algo.std = "{algo.std}" needs algo.baseline = "group-mean", not "{algo.baseline}".')
    if algo.std == "batch" and algo.baseline not in ("group-mean", "batch-mean"):
        raise ConfigError(f'algo.std = "batch" cannot be used with algo.baseline = "{algo.baseline}". Use "none".')
    if not 0 <= algo.ema_decay < 1:
        raise ConfigError(f"algo.ema_decay={algo.ema_decay} is not in [0, 1).")
    if algo.credit == "turn" and (algo.overlong_share or (algo.kl_coef and algo.kl_place == "reward")):
        raise ConfigError(
            'algo.credit = "turn" compares the rewards of turns, but algo.overlong_share and algo.kl_place = "reward" '
            'only change those of whole episodes. Leave them off, or use algo.credit = "episode".'
        )
    if algo.ahead and algo.max_lag:
        raise ConfigError(
            f"algo.ahead={algo.ahead} already has a lag of {algo.ahead}, so algo.max_lag={algo.max_lag} must be 0."
        )
    if algo.max_resamples and algo.group_size < 2:
        raise ConfigError(
            "algo.max_resamples replaces groups of equal rewards, but a group of 1 is always one. Set it to 0."
        )
    if not 0 <= algo.overlong_share <= 1:
        raise ConfigError(f"algo.overlong_share={algo.overlong_share} is not in [0, 1].")
    if algo.old_logp == "sampler" and algo.is_cap:
        raise ConfigError('algo.is_cap corrects for sampler–learner mismatch, so it needs algo.old_logp = "learner".')
    if algo.is_cap and algo.is_floor > algo.is_cap:
        raise ConfigError(f"algo.is_floor={algo.is_floor} is above algo.is_cap={algo.is_cap}.")
    if algo.policy_loss == "gspo" and (algo.kl_place == "reward-to-go" and algo.kl_coef):
        raise ConfigError(
            'policy_loss = "gspo" needs the same advantage for all tokens of a completion. Use "gspo-token" with '
            'algo.kl_place = "reward-to-go".'
        )
