"""Settings of algos/ppo.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from posttrain.config.choices import KeysOf
from posttrain.config.facts import Facts, Saving
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
class PPOConfig:
    prompts: int = 256
    """Tasks per step."""
    group_size: int = 1
    """Completions per task; the critic is the baseline, so a group is not needed."""
    epochs: int = 1
    """Passes over a step's rollouts."""
    minibatches: int = 2
    """Optimizer steps per epoch; must divide the number of completions in a step."""
    clip_low: float = 0.2
    """Lower clip: ratio ≥ 1 − clip_low."""
    clip_high: float = 0.2
    """Upper clip: ratio ≤ 1 + clip_high."""
    target_kl: float = 0.0
    """Stop a step's updates early once the KL to the sampling policy exceeds this, in nats per token; 0: never."""
    gamma: float = 1.0
    """Discount factor γ per trained token."""
    lam: float = 0.95
    """λ of GAE: 1 gives return − value, 0 gives the TD error."""
    kl_coef: float = 0.02
    """Weight of the per-token KL penalty to the starting model in the reward; 0 loads no reference model."""
    kl_estimator: Annotated[str, KeysOf("objectives/tokens.py", "KL_ESTIMATORS", without=("k3+",))] = "k1"
    """Per-token KL estimator."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` adjusts kl_coef to keep the KL at kl_target."""
    kl_target: float = 6.0
    """KL target of the adaptive controller, in nats per completion."""
    kl_horizon: float = 10000.0
    """Number of completions over which the adaptive controller changes kl_coef by at most 20 %."""
    whiten_rewards: bool = False
    """Divide the step's token rewards by their standard deviation without shifting their mean."""
    whiten_advantages: bool = True
    """Normalise the step's advantages to mean 0 and variance 1."""
    whiten_returns: bool = False
    """Train the critic on returns normalised by their running mean and standard deviation (PopArt)."""
    entropy_coef: float = 0.0
    """Weight of the per-token entropy bonus."""
    critic: Literal["separate", "shared"] = "separate"
    """`separate` is a second model with a value head; `shared` puts the head on the policy itself."""
    critic_init: str = ""
    """Reward model (run or model folder) to initialise the critic; empty: the policy, with values starting at 0."""
    critic_lr: float = 3e-4
    """Peak learning rate of a separate critic."""
    critic_warmup: int = 0
    """Initial steps that train only the critic."""
    vf_coef: float = 0.1
    """Weight of the value loss of a shared critic."""
    value_clip: float = 0.2
    """Clip range of values around those at sampling time; 0 turns clipping off."""
    truncated: Literal["score", "replace", "penalise"] = "score"
    """Completions truncated at max_tokens: keep the score, replace it by truncated_value, or add truncated_value."""
    truncated_value: float = -1.0
    """Value for `truncated`: the score to use with `replace`, or the amount to add with `penalise`."""
    ptx_coef: float = 0.0
    """Weight of a supervised loss on ptx_data in every policy update (PPO-ptx); 0 turns it off."""
    ptx_data: str = ""
    """Data of the ptx term: a file or hub dataset of texts or conversations, or a built-in task."""
    ptx_rows: int = 32
    """Rows of ptx_data per optimizer step."""
    ptx_max_tokens: int = 1024
    """Maximum length of ptx_data rows; longer rows are truncated and counted."""
    max_mismatch: float = 0.5
    """Stop if the log-probabilities of sampler and learner differ by more than this on any token."""
    max_flat_steps: int = 20
    """End after this many steps in a row in which all scores were equal: as solved if all passed, else as an error."""


@dataclass(frozen=True)
class PPORecipe:
    """PPO with a critic, as in InstructGPT.

    A value head predicts the return at every token; tokens that lead to a better return than predicted become more
    likely.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: PPOConfig = field(default_factory=PPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        algo = self.algo
        shared = Saving("algo.critic", "shared", "the value loss also trains the policy's weights")
        return Facts(
            reference="frozen" if algo.kl_coef else "none",
            critic=algo.critic,
            prompts=algo.prompts,
            group_size=algo.group_size,
            batch_rows=algo.prompts * algo.group_size // algo.minibatches,
            minibatches=algo.minibatches,
            epochs=algo.epochs,
            shared_prompt=algo.group_size,
            scoring_passes=int(algo.kl_coef > 0) + 2,  # old log-probabilities and old values
            savings=(shared,) * (algo.critic == "separate"),
        )

    def __post_init__(self) -> None:
        algo = self.algo
        require_positive(algo, "prompts", "group_size", "epochs", "minibatches", "ptx_rows", "ptx_max_tokens")
        require_positive(algo, "max_flat_steps")
        require_positive(self.train, "steps")
        for name in ("clip_low", "clip_high", "target_kl", "kl_coef", "entropy_coef", "critic_lr", "critic_warmup"):
            _refuse_negative(algo, name)
        for name in ("vf_coef", "value_clip", "ptx_coef", "max_mismatch"):
            _refuse_negative(algo, name)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(algo, name) <= 1:
                raise ConfigError(f"algo.{name}={getattr(algo, name)} is not in [0, 1].")
        if algo.prompts * algo.group_size % algo.minibatches:
            raise ConfigError(
                f"{algo.prompts} prompts × {algo.group_size} completions do not divide into "
                f"{algo.minibatches} minibatches. Choose algo.minibatches to divide {algo.prompts * algo.group_size}."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 does not explore. Set it above 0, usually 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        check_terms(algo)
        check_critic(algo, self.train)
        check_shared(self)


def check_terms(algo: PPOConfig) -> None:
    """Rejects KL, ptx and truncation settings that contradict each other."""
    if algo.kl_controller == "adaptive":
        if algo.kl_coef <= 0:
            raise ConfigError(
                'algo.kl_controller = "adaptive" multiplies algo.kl_coef, which is 0 and would stay 0. Set a '
                'starting value above 0, or kl_controller = "fixed".'
            )
        if algo.kl_target <= 0 or algo.kl_horizon <= 0:
            raise ConfigError(
                f"algo.kl_target={algo.kl_target} (nats per completion) and kl_horizon={algo.kl_horizon} (completions) "
                "must both be above 0."
            )
    if algo.ptx_coef and not algo.ptx_data:
        raise ConfigError(
            f"algo.ptx_coef={algo.ptx_coef} adds a supervised loss, but algo.ptx_data is empty. Set it to a file of "
            "texts or conversations, or to a built-in task."
        )
    if algo.ptx_data and not algo.ptx_coef:
        raise ConfigError(f"algo.ptx_data={algo.ptx_data!r} is not used while algo.ptx_coef is 0. Set both or neither.")
    if algo.truncated == "penalise" and algo.truncated_value >= 0:
        raise ConfigError(
            f'algo.truncated = "penalise" adds truncated_value={algo.truncated_value} to the score of truncated '
            "completions, which is not a penalty. Set it below 0."
        )


def check_critic(algo: PPOConfig, train: TrainConfig) -> None:
    """Rejects a critic that could not learn, and a warmup that would change the policy."""
    if algo.critic_warmup and algo.critic_warmup >= train.steps:
        raise ConfigError(
            f"algo.critic_warmup={algo.critic_warmup} leaves none of the train.steps={train.steps} for the policy. "
            "Raise train.steps."
        )
    if algo.critic == "shared" and not algo.vf_coef:
        raise ConfigError("algo.vf_coef=0 would never train a shared critic. Set it above 0.")
    if algo.critic == "shared" and algo.critic_warmup and train.weight_decay:
        raise ConfigError(
            "algo.critic_warmup of a shared critic trains only its head, but train.weight_decay would still change the "
            "policy's weights. Set it to 0, or use a separate critic."
        )


def _refuse_negative(algo: PPOConfig, name: str) -> None:
    if getattr(algo, name) < 0:
        raise ConfigError(f"algo.{name}={getattr(algo, name)} cannot be negative.")
