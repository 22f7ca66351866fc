"""Settings of algos/dpo.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.pairs import PairsConfig, check_pairs
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

NO_REFERENCE = ("simpo", "orpo", "cpo")
"""Losses that never read a reference."""


@dataclass(frozen=True)
class DPOConfig:
    preset: str = ""
    """Paper whose choices fill the settings not given here."""
    loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "cpo", "kto"] = "sigmoid"
    """`sigmoid` is DPO (cDPO with label_smoothing), `hinge` SLiC and RSO, `kto` learns from unpaired judgements."""
    batch_pairs: int = 32
    """Pairs per optimizer step (judgements with kto)."""
    beta: float = 0.1
    """How strongly the implicit reward weighs a log-ratio; τ in IPO, λ in ORPO."""
    beta_end: float = 0.0
    """Beta of the last step, where beta_schedule is not constant."""
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How beta goes from beta to beta_end over the run."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5): makes sigmoid cDPO, and is ε of robust."""
    margin: float = 0.0
    """By how much the better answer should win, in units of reward; γ in SimPO."""
    margin_coef: float = 0.0
    """Weight of the data's own margins, added to margin; 0 ignores them."""
    length_normalise: Literal["paper", "yes", "no"] = "paper"
    """Mean instead of summed log-probabilities of an answer; `paper` does so for simpo and orpo."""
    nll_coef: float = -1.0
    """Weight of the better answer's negative log-likelihood; −1 is the paper's: 1 for orpo and cpo, 0 for others."""
    reference: str = ""
    """Model the policy is compared with, of the same vocabulary; empty is the starting model."""
    reference_free: bool = False
    """Compare with nothing: reference log-probabilities of 0. Always so for simpo, orpo and cpo."""
    desirable_weight: float = 1.0
    """Weight of a desirable answer (kto), λ_D."""
    undesirable_weight: float = 1.0
    """Weight of an undesirable answer (kto), λ_U."""

    @property
    def normalised(self) -> bool:
        """Whether an answer's log-probability is its mean per token."""
        return self.loss in ("simpo", "orpo") if self.length_normalise == "paper" else self.length_normalise == "yes"

    @property
    def nll_weight(self) -> float:
        return float(self.loss in ("orpo", "cpo")) if self.nll_coef < 0 else self.nll_coef

    @property
    def referenced(self) -> bool:
        """Whether the loss compares with a reference model."""
        return not self.reference_free and self.loss not in NO_REFERENCE


@dataclass(frozen=True)
class DPORecipe:
    """Offline preference optimisation: learn from pairs of answers, or from judged single ones.

    `--loss` chooses DPO (sigmoid), robust, ipo, hinge, simpo, orpo, cpo or kto; `--preset` a paper with its values.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: DPOConfig = field(default_factory=DPOConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        algo = self.algo
        require_positive(algo, "batch_pairs")
        check_beta(algo)
        if algo.margin < 0 or algo.margin_coef < 0:
            raise ConfigError(f"algo.margin={algo.margin} and margin_coef={algo.margin_coef} cannot be negative.")
        if algo.reference and not algo.referenced:
            why = "algo.reference_free is set" if algo.reference_free else f"algo.loss={algo.loss} has no reference"
            raise ConfigError(f"algo.reference={algo.reference!r} would not be used, because {why}. Unset one.")
        _check_kto(algo)
        check_pairs(self)
        check_shared(self)


def check_beta(algo: DPOConfig) -> None:
    """The checks of beta, its schedule and label smoothing."""
    if not 0 < algo.beta < math.inf:
        raise ConfigError(f"algo.beta={algo.beta} cannot weigh a pair; set it above 0, often to 0.1.")
    if algo.beta_schedule != "constant" and not algo.beta_end > 0:
        raise ConfigError(
            f"algo.beta_end={algo.beta_end} is where a {algo.beta_schedule} beta_schedule would end; set it above 0."
        )
    if algo.beta_schedule == "constant" and algo.beta_end:
        raise ConfigError(
            f"algo.beta_end={algo.beta_end} changes nothing while algo.beta_schedule is constant. Set it to linear or "
            "cosine, or leave beta_end out."
        )
    if not 0 <= algo.label_smoothing < 0.5:
        raise ConfigError(
            f"algo.label_smoothing={algo.label_smoothing} is not in [0, 0.5): at 0.5 labels say nothing, and above it "
            "the worse answer would be learned."
        )


def _check_kto(algo: DPOConfig) -> None:
    weights = (algo.desirable_weight, algo.undesirable_weight)
    if algo.loss != "kto":
        if weights != (1.0, 1.0):
            raise ConfigError(
                f"algo.desirable_weight and undesirable_weight are for kto; algo.loss={algo.loss} has none."
            )
        return
    if min(weights) <= 0:
        raise ConfigError(f"algo.desirable_weight, undesirable_weight = {weights}; both must be above 0.")
    for name in ("label_smoothing", "margin", "margin_coef"):
        if getattr(algo, name):
            raise ConfigError(f"algo.{name}={getattr(algo, name)} is for pairs; kto learns from single answers.")
    if algo.nll_coef > 0:
        raise ConfigError(f"algo.nll_coef={algo.nll_coef} is for pairs; kto learns from single answers.")
    if algo.reference_free:
        raise ConfigError(
            "kto compares with a reference to place its baseline; unset algo.reference_free or choose another loss."
        )
