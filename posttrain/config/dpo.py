"""Settings of algos/dpo.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from posttrain.config.choices import KeysOf
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

_LOSSES = "objectives/preference.py"
NO_REFERENCE = KeysOf(_LOSSES, "REFERENCE_FREE").names()
"""Losses that use no reference model."""


@dataclass(frozen=True)
class DPOConfig:
    preset: str = ""
    """Paper whose settings to use as defaults (`posttrain presets` lists them)."""
    loss: Annotated[str, KeysOf(_LOSSES, "PAIR_LOSSES", more=("kto",))] = "sigmoid"
    """`sigmoid` is DPO (cDPO with label_smoothing), `hinge` is SLiC and RSO, `kto` uses unpaired judgements."""
    batch_pairs: int = 32
    """Pairs per optimizer step (judgements for kto)."""
    beta: float = 0.1
    """Scale of the implicit reward, β times the log-ratio; τ in IPO, λ in ORPO."""
    beta_end: float = 0.0
    """Beta at the last step, if beta_schedule is not constant."""
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule from beta to beta_end over the run."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5); turns sigmoid into cDPO, and is ε of robust."""
    margin: float = 0.0
    """Margin by which the better answer should win, in units of the implicit reward; γ in SimPO."""
    margin_coef: float = 0.0
    """Weight of the margins in the data, which are added to margin; 0 ignores them."""
    length_normalise: Literal["paper", "yes", "no"] = "paper"
    """Use the mean instead of the sum of an answer's token log-probabilities; `paper` does so for simpo and orpo."""
    nll_coef: float = -1.0
    """Weight of the better answer's negative log-likelihood; −1 uses the paper's: 1 for orpo and cpo, 0 for others."""
    reference: str = ""
    """Reference model, with the same vocabulary as the policy; empty uses the starting model."""
    reference_free: bool = False
    """Use no reference model (log-probabilities of 0); always the case for simpo, orpo and cpo."""
    desirable_weight: float = 1.0
    """λ_D of kto: weight of desirable answers."""
    undesirable_weight: float = 1.0
    """λ_U of kto: weight of undesirable answers."""

    @property
    def normalised(self) -> bool:
        """Whether an answer's log-probability is the mean over its tokens."""
        return (
            self.loss in KeysOf(_LOSSES, "LENGTH_NORMALISED").names()
            if self.length_normalise == "paper"
            else self.length_normalise == "yes"
        )

    @property
    def nll_weight(self) -> float:
        return float(self.loss in KeysOf(_LOSSES, "WITH_NLL").names()) if self.nll_coef < 0 else self.nll_coef

    @property
    def referenced(self) -> bool:
        """Whether the loss uses a reference model."""
        return not self.reference_free and self.loss not in NO_REFERENCE


@dataclass(frozen=True)
class DPORecipe:
    """Offline preference optimisation (DPO and its family).

    Trains on pairs of completions, or on single judged completions. `--loss` selects DPO (sigmoid), robust, ipo, hinge,
    simpo, orpo, cpo or kto; `--preset` selects a paper's settings.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: DPOConfig = field(default_factory=DPOConfig)
    train: EpochTrainConfig = field(default_factory=EpochTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        pairs = self.algo.loss != "kto"
        return Facts(
            data="pairs",
            reference="precomputed" if self.algo.referenced else "none",
            samples="before training" if names_tasks(self.data.tasks) else "never",
            batch_rows=self.algo.batch_pairs * (2 if pairs else 1),
            shared_prompt=2 if pairs else 1,
            paired=pairs,
            scoring_passes=int(not pairs),  # kto's baseline
            held_out_pass=True,
            max_tokens=self.pairs.max_tokens,
        )

    def __post_init__(self) -> None:
        algo = self.algo
        require_positive(algo, "batch_pairs")
        check_beta(algo)
        if algo.margin < 0 or algo.margin_coef < 0:
            raise ConfigError(f"algo.margin={algo.margin} and margin_coef={algo.margin_coef} cannot be negative.")
        if algo.reference and not algo.referenced:
            why = "algo.reference_free is set" if algo.reference_free else f"algo.loss={algo.loss} uses none"
            raise ConfigError(f"algo.reference={algo.reference!r} would not be used, because {why}. Unset one.")
        _check_kto(algo)
        check_pairs(self)
        check_shared(self)


def check_beta(algo: DPOConfig) -> None:
    """Checks beta, its schedule and label smoothing."""
    if not 0 < algo.beta < math.inf:
        raise ConfigError(f"algo.beta={algo.beta} must be positive and finite; 0.1 is common.")
    if algo.beta_schedule != "constant" and not algo.beta_end > 0:
        raise ConfigError(
            f"algo.beta_end={algo.beta_end} must be above 0 with a {algo.beta_schedule} algo.beta_schedule."
        )
    if algo.beta_schedule == "constant" and algo.beta_end:
        raise ConfigError(
            f"algo.beta_end={algo.beta_end} has no effect while algo.beta_schedule is constant. Set it to linear or "
            "cosine, or remove beta_end."
        )
    if not 0 <= algo.label_smoothing < 0.5:
        raise ConfigError(
            f"algo.label_smoothing={algo.label_smoothing} is not in [0, 0.5): at 0.5 labels carry no information, and "
            "above it the worse answer would be preferred."
        )


def _check_kto(algo: DPOConfig) -> None:
    weights = (algo.desirable_weight, algo.undesirable_weight)
    if algo.loss != "kto":
        if weights != (1.0, 1.0):
            raise ConfigError(
                f"algo.desirable_weight and undesirable_weight are for kto; algo.loss={algo.loss} does not use them."
            )
        return
    if min(weights) <= 0:
        raise ConfigError(f"algo.desirable_weight, undesirable_weight = {weights}; both must be above 0.")
    for name in ("label_smoothing", "margin", "margin_coef"):
        if getattr(algo, name):
            raise ConfigError(f"algo.{name}={getattr(algo, name)} is for pairs, but kto uses single answers. Unset it.")
    if algo.nll_coef > 0:
        raise ConfigError(f"algo.nll_coef={algo.nll_coef} is for pairs, but kto uses single answers. Unset it.")
    if algo.reference_free:
        raise ConfigError(
            "kto needs a reference model for its baseline. Unset algo.reference_free or choose another loss."
        )
