"""The comparisons of `bench/parity.py`: TRL's settings, ours, and where the results are expected to differ and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from bench.parity_ours import LONGEST, World, dpo, grpo, reward, rloo_of_answers, sft, with_cross_entropy
from posttrain.config.presets import PRESETS

Quantity = Literal["loss", "gradient"]
BOTH: tuple[Quantity, ...] = ("loss", "gradient")


@dataclass(frozen=True)
class Row:
    """One comparison. `differs` names the quantities expected to differ; `reason` says why."""

    name: str
    trainer: str
    ours: Callable[[World], float]
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    differs: tuple[Quantity, ...] = ()
    reason: str = ""

    def for_peer(self) -> dict[str, Any]:
        """The row as `parity_peer.py` reads it."""
        return {"name": self.name, "trainer": self.trainer, "config": self.config, **self.options}


def _reward(name: str, config: dict[str, Any], **ours: Any) -> Row:
    return Row(f"reward: {name}", "reward", partial(reward, **ours), config, {"margin": ours.get("margin", False)})


def _dpo(
    name: str,
    config: dict[str, Any],
    differs: tuple[Quantity, ...] = (),
    reason: str = "",
    one_by_one: bool = False,
    **ours: Any,
) -> Row:
    """A DPO row: TRL's config, then settings of `posttrain dpo` as keyword arguments. β is the same on both sides."""
    options = {"one_by_one": one_by_one, "data": ours.get("data", "pairs")}
    return Row(f"DPO: {name}", "dpo", partial(dpo, beta=config["beta"], **ours), config, options, differs, reason)


def _free(
    trainer: str,
    name: str,
    config: dict[str, Any],
    ours: Callable[[World], float],
    differs: tuple[Quantity, ...] = (),
    reason: str = "",
) -> Row:
    """A row for a reference-free loss, which has its own trainer in TRL."""
    return Row(name, trainer, ours, config, {}, differs, reason)


def _online(
    trainer: str,
    name: str,
    config: dict[str, Any],
    ours: Callable[..., float],
    settings: dict[str, Any],
    differs: tuple[Quantity, ...],
    reason: str,
    micro_batches: int = 1,
) -> Row:
    options = {
        "data": settings.get("data", "attempts"),
        "micro_batches": micro_batches,
        "updates": settings.get("updates", 1),
        "off_policy": settings.get("off_policy", True),
        "tools": settings.get("tools", False),
        "sampler": "is_cap" in settings,
    }
    config = {"num_generations": 4, "max_completion_length": LONGEST, **config}
    return Row(f"{trainer.upper()}: {name}", trainer, partial(ours, **settings), config, options, differs, reason)


def _grpo(
    name: str,
    config: dict[str, Any],
    differs: tuple[Quantity, ...] = (),
    reason: str = "",
    micro_batches: int = 1,
    **ours: Any,
) -> Row:
    """A GRPO row: TRL's config, then settings of `posttrain grpo`, with TRL's standard deviation as the default."""
    settings = {"std": "sample", "std_eps": 1e-4, **ours}
    return _online("grpo", name, config, grpo, settings, differs, reason, micro_batches)


def _rloo(
    name: str,
    config: dict[str, Any],
    ours: Callable[..., float],
    differs: tuple[Quantity, ...] = (),
    reason: str = "",
    **settings: Any,
) -> Row:
    return _online("rloo", name, {"beta": 0.0, **config}, ours, settings, differs, reason)


SUPERVISED = [
    Row("SFT", "sft", sft),
    _reward("Bradley–Terry", {}),
    _reward("with margins", {}, margin=True),
    _reward("centred, 0.01", {"center_rewards_coefficient": 0.01}, centre_coef=0.01),
]

SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}
PAIRS = [
    _dpo("sigmoid", {"loss_type": ["sigmoid"], "beta": 0.1}),
    _dpo("sigmoid per token", {"loss_type": ["sigmoid_norm"], "beta": 2.0}, length_normalise="yes"),
    _dpo(
        "cDPO, ε = 0.1",
        {"loss_type": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.1},
        BOTH,
        "TRL's sigmoid loss ignores label_smoothing",
        label_smoothing=0.1,
    ),
    _dpo(
        "cDPO, ε = 0.1, against TRL's AOT on single pairs",
        {"loss_type": ["aot"], "beta": 0.1, "label_smoothing": 0.1},
        one_by_one=True,
        label_smoothing=0.1,
    ),
    _dpo(
        "robust, ε = 0.1",
        {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1},
        loss="robust",
        label_smoothing=0.1,
    ),
    _dpo("hinge", {"loss_type": ["hinge"], "beta": 0.1}, loss="hinge"),
    _dpo("IPO per token", {"loss_type": ["ipo"], "beta": 0.1}, loss="ipo", length_normalise="yes"),
    _dpo(
        "IPO",
        {"loss_type": ["ipo"], "beta": 0.1},
        BOTH,
        "TRL divides each completion's log-ratio by its length; the paper's eq. 17 uses sums",
        loss="ipo",
    ),
    _dpo(
        "IPO per token, prompts truncated",
        {"loss_type": ["ipo"], "beta": 0.1},
        BOTH,
        "TRL divides by the unshifted mask, so it counts the row's first token, which has no prediction (trl #6879)",
        loss="ipo",
        length_normalise="yes",
        data="cut_pairs",
    ),
    _free(
        "cpo",
        "CPO, ε = 0.1, without cross-entropy",
        {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0, "label_smoothing": 0.1},
        partial(dpo, loss="cpo", beta=0.1, nll_coef=0.0, label_smoothing=0.1),
    ),
    _free(
        "cpo",
        "CPO",
        {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
        partial(dpo, loss="cpo", beta=0.1),
        BOTH,
        "TRL averages the cross-entropy over all chosen tokens; the paper sums it over each chosen completion",
    ),
    _free(
        "cpo",
        "CPO, with TRL's cross-entropy",
        {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
        partial(with_cross_entropy, loss="cpo", mean=False, prompts=False),
    ),
    _free("cpo", "SimPO, γ = 0.5", SIMPO, partial(dpo, loss="simpo", beta=2.0, margin=0.5)),
    _free(
        "cpo",
        "SimPO, γ = 0.5, ε = 0.1",
        {**SIMPO, "label_smoothing": 0.1},
        partial(dpo, loss="simpo", beta=2.0, margin=0.5, label_smoothing=0.1),
        BOTH,
        "if the other completion is better, ours requires it to win by γ; TRL lets it lose by up to γ",
    ),
    _free(
        "cpo",
        "SLiC (hinge without reference)",
        {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 0.0},
        partial(dpo, loss="hinge", beta=0.1, reference_free=True),
    ),
    _free(
        "orpo",
        "ORPO, λ = 0.1",
        {"beta": 0.1},
        partial(dpo, loss="orpo", beta=0.1),
        BOTH,
        "TRL averages the cross-entropy over the batch, prompts included; the paper's eq. 3 over each completion",
    ),
    _free(
        "orpo",
        "ORPO, λ = 0.1, with TRL's cross-entropy",
        {"beta": 0.1},
        partial(with_cross_entropy, loss="orpo", mean=True, prompts=True),
    ),
    Row("KTO", "kto", partial(dpo, loss="kto", beta=0.1), {"beta": 0.1}, {"swap": False}),
    Row(
        "KTO, policy and reference swapped, weights 1 and 1.5",
        "kto",
        partial(dpo, loss="kto", beta=0.1, undesirable_weight=1.5, swap=True),
        {"beta": 0.1, "undesirable_weight": 1.5},
        {"swap": True},
    ),
]

SEQ = "seq-mean-token-mean"
RATIO_PER_ANSWER = "TRL's loss has one term per completion, ours one per token; on-policy the gradients are the same"
RLOO = {"off_policy": False, "baseline": "leave-one-out", "aggregate": "seq-mean-token-sum"}
GRPO_TRL = PRESETS["grpo"]["grpo-trl"].settings["algo"]
ONLINE = [
    _grpo("preset grpo-trl and TRL's defaults, on-policy", {}, off_policy=False, **GRPO_TRL),
    _grpo("dapo", {"loss_type": "dapo"}),
    _grpo("dapo, two micro-batches", {"loss_type": "dapo"}, micro_batches=2),
    _grpo(
        "dapo, the first of two updates per rollout",
        {"loss_type": "dapo"},
        BOTH,
        "TRL divides by the rollout's average tokens per update, ours by the tokens of this update",
        updates=2,
    ),
    _grpo("dapo, clip-higher", {"loss_type": "dapo", "epsilon_high": 0.28}, clip_high=0.28),
    _grpo("dapo, two-sided clip, δ = 3", {"delta": 3.0}, policy_loss="dual-clip"),
    _grpo("dapo, tool tokens masked", {"loss_type": "dapo"}, tools=True),
    _grpo(
        "dapo, one completion without a reward",
        {"loss_type": "dapo"},
        BOTH,
        "TRL's divisor counts the tokens of a completion without a reward; ours leaves them out",
        data="unscored_attempts",
    ),
    _grpo("dapo, truncated completions masked", {"mask_truncated_completions": True}, mask_truncated=True),
    _grpo("grpo", {"loss_type": "grpo"}, aggregate=SEQ),
    _grpo(
        "grpo, truncated completions masked",
        {"loss_type": "grpo", "mask_truncated_completions": True},
        BOTH,
        "TRL's mean over rows counts the masked rows; ours only rows with trained tokens",
        aggregate=SEQ,
        mask_truncated=True,
    ),
    _grpo("bnpo", {"loss_type": "bnpo"}),
    _grpo(
        "bnpo, two micro-batches",
        {"loss_type": "bnpo"},
        BOTH,
        "TRL averages within each micro-batch; ours averages over the optimizer batch, however it is split",
        micro_batches=2,
    ),
    _grpo("dr_grpo, no std", {"loss_type": "dr_grpo", "scale_rewards": "none"}, aggregate="constant", std="none"),
    _grpo("batch std", {"scale_rewards": "batch"}, std="batch"),
    _grpo(
        "GSPO",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
        policy_loss="gspo",
        aggregate=SEQ,
        clip_low=0.05,
        clip_high=0.05,
    ),
    _grpo("CISPO, weights at most 1.2", {"loss_type": "cispo", "epsilon_high": 1.2}, policy_loss="cispo", clip_low=1.0),
    _grpo(
        "CISPO, ε = 0.2 on both sides",
        {"loss_type": "cispo"},
        BOTH,
        "TRL's bound is epsilon_high itself, 0.2 by default, with no lower bound; the paper's is 1 ± ε",
        policy_loss="cispo",
    ),
    _grpo("SAPO", {"loss_type": "sapo"}, policy_loss="sapo", aggregate=SEQ),
    _grpo("KL k3, 0.04", {"beta": 0.04, "use_bias_correction_kl": False}, kl_coef=0.04, kl_estimator="k3"),
    _grpo("KL with TRL's default, 0.04, on-policy", {"beta": 0.04}, kl_coef=0.04, kl_estimator="k3+", off_policy=False),
    _grpo(
        "KL with TRL's default, 0.04",
        {"beta": 0.04},
        BOTH,
        "TRL multiplies the KL by the ratio to the older policy; ours has k3's value and k2's gradient",
        kl_coef=0.04,
        kl_estimator="k3+",
    ),
    _grpo(
        "vLLM correction, sequence_mask above 2",
        {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 2.0},
        is_mode="sequence-sum-mask",
        is_cap=2.0,
        off_policy=False,
    ),
    _grpo(
        "vLLM correction, token_truncate at 1.2",
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.2},
        is_mode="token-truncate",
        is_cap=1.2,
        off_policy=False,
    ),
    _rloo("on-policy", {}, grpo, ("loss",), RATIO_PER_ANSWER, **RLOO),
    _rloo("on-policy, as REINFORCE", {}, grpo, ("loss",), RATIO_PER_ANSWER, policy_loss="reinforce", **RLOO),
    _rloo(
        "on-policy, KL 0.05 in the reward",
        {"beta": 0.05},
        grpo,
        ("loss",),
        RATIO_PER_ANSWER,
        kl_coef=0.05,
        kl_estimator="k1",
        kl_place="reward",
        **RLOO,
    ),
    _rloo("one ratio per completion", {}, rloo_of_answers),
    _rloo("one ratio per completion, KL 0.05 in the reward", {"beta": 0.05}, rloo_of_answers, kl_coef=0.05),
    _rloo("one ratio per completion, whitened", {"normalize_advantages": True}, rloo_of_answers, whiten=True),
]

ROWS = [*SUPERVISED, *PAIRS, *ONLINE]
