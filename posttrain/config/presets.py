"""Presets: named settings that reproduce the choices of a paper or implementation. `posttrain presets` lists them.

Settings that a preset does not name keep the algorithm's default; recipes and flags override presets. Presets do not
set sizes (prompts, steps), nor learning rates, because these depend on the size of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.types import JsonView


@dataclass(frozen=True)
class Preset:
    """Settings by section, their source, and how the original differs from them."""

    source: str
    settings: Mapping[str, JsonView]
    differs: str = ""


def _grpo(source: str, differs: str = "", **algo: Any) -> Preset:
    return Preset(source, {"algo": algo}, differs)


def _raft(source: str, differs: str = "", **algo: Any) -> Preset:
    return Preset(source, {"algo": algo}, differs)


def _dpo(source: str, differs: str = "", **algo: Any) -> Preset:
    return Preset(source, {"algo": algo}, differs)


PRESETS: dict[str, dict[str, Preset]] = {
    "grpo": {
        "reinforce": _grpo(
            "Williams, 1992: reward minus a running mean, one completion per task, sum over tokens",
            group_size=1,
            baseline="ema",
            policy_loss="reinforce",
            aggregate="seq-mean-token-sum",
        ),
        "rloo": _grpo(
            "Ahmadian et al., arXiv 2402.14740: leave-one-out baseline, KL in the reward",
            group_size=4,
            baseline="leave-one-out",
            policy_loss="reinforce",
            aggregate="seq-mean-token-sum",
            kl_coef=0.03,
            kl_estimator="k1",
            kl_place="reward",
        ),
        "reinforce++": _grpo(
            "Hu et al., arXiv 2501.03262: KL-to-go in each token's advantage, whitened over the batch",
            group_size=1,
            baseline="none",
            whiten="population",
            kl_coef=0.01,
            kl_estimator="k1",
            kl_place="reward-to-go",
        ),
        "reinforce++-baseline": _grpo(
            "the same authors' variant for groups: group mean, whitened over the batch, k2 KL in the loss",
            whiten="population",
            kl_coef=1e-5,
            kl_estimator="k2",
        ),
        "remax": _grpo(
            "Li et al., arXiv 2310.10505: the reward of the greedy completion is the baseline",
            group_size=1,
            baseline="greedy",
            policy_loss="reinforce",
            aggregate="seq-mean-token-sum",
        ),
        "grpo": _grpo(
            "DeepSeekMath, arXiv 2402.03300: group standard deviation, mean over completions of token means, k3",
            group_size=64,
            std="sample",
            aggregate="seq-mean-token-mean",
            kl_coef=0.04,
            kl_estimator="k3",
        ),
        "dr-grpo": _grpo(
            "Liu et al., arXiv 2503.20783: no standard deviation, token sum divided by a constant, no KL",
            aggregate="constant",
        ),
        "dapo": _grpo(
            "Yu et al., arXiv 2503.14476: clip-higher, token mean, dynamic sampling, overlong shaping and filtering",
            group_size=16,
            std="sample",
            clip_high=0.28,
            max_resamples=10,
            overlong_share=0.2,
            mask_truncated=True,
            minibatches=16,
        ),
        "gspo": _grpo(
            "Zheng et al., arXiv 2507.18071: one length-normalised ratio per completion, tight clip range",
            std="sample",
            policy_loss="gspo",
            clip_low=3e-4,
            clip_high=4e-4,
            aggregate="seq-mean-token-mean",
            minibatches=4,
        ),
        "cispo": _grpo(
            "MiniMax-M1, arXiv 2506.13585: clipped and detached ratio as a weight, so no token loses its gradient",
            std="sample",
            policy_loss="cispo",
            clip_low=1.0,
            clip_high=4.0,
            minibatches=2,
        ),
        "nanochat": _grpo(
            "nanochat's scripts/chat_rl.py: REINFORCE with the group mean as baseline, token means over 8 rows",
            "nanochat samples with top-k 50 and does not train the stop token",
            group_size=16,
            policy_loss="reinforce",
            aggregate="chunk-mean",
        ),
        "grpo-trl": _grpo(
            "TRL 1.16 GRPOTrainer, defaults",
            "with a KL and several updates per batch, TRL multiplies the KL by the ratio",
            std="sample",
            std_eps=1e-4,
            kl_estimator="k3+",
        ),
        "grpo-verl": _grpo(
            "verl 0.9.1, GRPO example",
            "verl clamps the KL to ±10",
            group_size=5,
            std="sample",
            std_eps=1e-6,
            policy_loss="dual-clip",
            kl_coef=1e-3,
            kl_estimator="k3",
            minibatches=4,
        ),
        "grpo-openrlhf": _grpo(
            "OpenRLHF 0.11.2, group-norm example",
            "OpenRLHF clips normalised rewards and the KL to ±10",
            std="sample",
            std_eps=1e-9,
            clip_high=0.27,
            kl_coef=1e-3,
            kl_estimator="k3",
            is_cap=5.0,
            is_floor=0.5,
            is_mode="token-truncate",
            minibatches=8,
        ),
    },
    "dpo": {
        "dpo": _dpo("Rafailov et al., arXiv 2305.18290", loss="sigmoid", beta=0.1),
        "cdpo": _dpo(
            "Mitchell, A note on DPO with noisy preferences, 2023", loss="sigmoid", beta=0.1, label_smoothing=0.1
        ),
        "robust": _dpo("Chowdhury et al., arXiv 2403.00409", loss="robust", beta=0.1, label_smoothing=0.1),
        "ipo": _dpo("Azar et al., arXiv 2310.12036, with sums of log-probabilities", loss="ipo", beta=0.1),
        "slic": _dpo(
            "Zhao et al., arXiv 2305.10425: calibration loss with margin 1",
            "the paper adds a likelihood term; set algo.nll_coef for it",
            loss="hinge",
            beta=1.0,
            reference_free=True,
        ),
        "simpo": _dpo(
            "Meng et al., arXiv 2405.14734, values of its Llama 3 base model", loss="simpo", beta=2.0, margin=1.0
        ),
        "orpo": _dpo("Hong et al., arXiv 2403.07691: beta is its λ", loss="orpo", beta=0.1),
        "cpo": _dpo("Xu et al., arXiv 2401.08417", loss="cpo", beta=0.1),
        "kto": _dpo("Ethayarajh et al., arXiv 2402.01306", loss="kto", beta=0.1),
    },
    "raft": {
        "raft": _raft(
            "Dong et al., arXiv 2304.06767: best completion of each task, continuing from the current weights",
            select="best",
            max_per_task=1,
        ),
        "rejection-sampling": _raft(
            "Llama 2, arXiv 2307.09288, section 3.2.3: best completions of all rounds, continuing",
            "Llama 2 selects again among a task's completions of all rounds; here the best of each round are kept",
            select="best",
            max_per_task=1,
            pool="all",
        ),
        "expert-iteration": _raft(
            "Anthony et al., arXiv 1705.08439, as in Havrilla et al., arXiv 2403.04642: all correct completions so "
            "far, from the starting model",
            select="passed",
            max_per_task=4,
            restart=True,
            pool="all",
        ),
        "star": _raft(
            "Zelikman et al., arXiv 2203.14465: one completion per task, kept if correct, from the starting model",
            "STaR samples greedily, and retries failed tasks with the answer as a hint",
            group_size=1,
            select="passed",
            max_per_task=1,
            restart=True,
        ),
        "rest-em": _raft(
            "Singh et al., arXiv 2312.06585: up to 10 correct completions of 32, from the starting model",
            group_size=32,
            select="passed",
            max_per_task=10,
            restart=True,
        ),
    },
}
"""Algorithm → preset name → preset."""
