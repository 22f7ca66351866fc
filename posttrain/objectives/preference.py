"""Preference losses: pure functions of (N,) tensors that return one loss per row (no reduction).

All pair losses share one signature, so a recipe selects them by name and the property tests cover them all:
`loss(chosen, rejected, ref_chosen, ref_rejected, beta, label, margin) -> loss (N,)`, every tensor (N,). `chosen` and
`rejected` are log-probabilities of whole completions under the policy (sums over tokens; means for LENGTH_NORMALISED),
`ref_*` the same under the reference model, which the losses in REFERENCE_FREE ignore.

`label` in [0, 1] is the probability that `chosen` is the better completion: 1 is certain, 0.5 a tie, 1 − ε is label
smoothing by ε. `margin` is the amount by which the better completion should win, in units of reward (β times nats).
Every loss handles soft labels the same way: it is the expected loss over which of the two is better (`either_way`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

Loss = Callable[[torch.Tensor], torch.Tensor]
CLOSEST_TO_CERTAIN = -1e-7  # a mean log-probability closer to 0 is fp32 rounding, and its odds are noise


def sequence_logp(logp: torch.Tensor, mask: torch.Tensor, mean: bool = False) -> torch.Tensor:
    """Log-probability (B,) of each row's completion: logp (B, T) summed (or averaged if `mean`) where `mask` is True.

    A row with an empty mask gives 0, not NaN. Entries outside the mask may hold anything.
    """
    total = torch.where(mask, logp, 0).sum(1)
    return total / mask.sum(1).clamp_min(1) if mean else total


def implicit_rewards(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """β log π / π_ref of both completions (N,), detached: the policy's implicit reward (arXiv 2305.18290, eq. 5).

    For a loss without a reference, pass zeros: the reward is then β log π, as SimPO and CPO define it.
    """
    return beta * (chosen - ref_chosen).detach(), beta * (rejected - ref_rejected).detach()


def log_ratio_gap(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor
) -> torch.Tensor:
    """h = log π/π_ref of `chosen` minus that of `rejected` (N,); exactly 0 where policy and reference are equal."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def either_way(loss: Loss, gap: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Expected loss (N,): with probability `label` the first completion is better, by `gap`; otherwise the second."""
    return label * loss(gap) + (1 - label) * loss(-gap)


def sigmoid(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label: torch.Tensor,
    margin: torch.Tensor,
) -> torch.Tensor:
    """DPO: −log σ(β h − margin) (arXiv 2305.18290, eq. 7); with a margin, ODPO (arXiv 2402.10571).

    With a soft label it is cDPO (Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    gap = beta * log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected)
    return either_way(lambda x: -logsigmoid(x - margin), gap, label)


def robust(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label: torch.Tensor,
    margin: torch.Tensor,
) -> torch.Tensor:
    """rDPO (arXiv 2403.00409): unbiased for the clean DPO loss when labels are flipped with probability ε.

    `label` is 1 − ε. With ℓ(x) = −log σ(x − margin) the loss is ((1 − ε) ℓ(βh) − ε ℓ(−βh)) / (1 − 2ε), which can be
    negative. Raises ValueError for a label of 0.5, where the labels are pure noise and no unbiased estimate exists.
    """
    if bool((label == 0.5).any()):
        raise ValueError("the robust loss got a label of 0.5, but divides by 2 label − 1; drop ties or use sigmoid.")
    gap = beta * log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected)
    return (label * -logsigmoid(gap - margin) - (1 - label) * -logsigmoid(-gap - margin)) / (2 * label - 1)


def ipo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label: torch.Tensor,
    margin: torch.Tensor,
) -> torch.Tensor:
    """IPO: (h − (½ + margin) / β)² (arXiv 2310.12036, eq. 17, where β is τ). Regresses the gap to a finite target.

    The paper's log-probabilities are sums. With a soft label and no margin, the optimal gap is (2 label − 1) / (2β).
    """
    gap = log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected)
    return either_way(lambda x: (x - (0.5 + margin) / beta).square(), gap, label)


def hinge(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label: torch.Tensor,
    margin: torch.Tensor,
) -> torch.Tensor:
    """Hinge loss: max(0, 1 + margin − β h) (RSO, arXiv 2309.06657).

    With zeros as the reference it is the calibration loss of SLiC (arXiv 2305.10425) divided by its margin δ = 1 / β.
    """
    gap = beta * log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected)
    return either_way(lambda x: (1 + margin - x).relu(), gap, label)


def simpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label: torch.Tensor,
    margin: torch.Tensor,
) -> torch.Tensor:
    """SimPO: −log σ(β (c − r) − γ), mean per-token log-probabilities c, r; γ is `margin` (arXiv 2405.14734, eq. 6)."""
    return either_way(lambda x: -logsigmoid(x - margin), beta * (chosen - rejected), label)


def orpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label: torch.Tensor,
    margin: torch.Tensor,
) -> torch.Tensor:
    """ORPO: −β log σ(log odds(chosen) − log odds(rejected) − margin), mean log-probabilities (arXiv 2403.07691, eq. 7).

    β is the paper's λ, the weight of this term relative to the negative log-likelihood of `chosen`, which the caller
    adds.
    """
    return beta * either_way(lambda x: -logsigmoid(x - margin), log_odds(chosen) - log_odds(rejected), label)


def cpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label: torch.Tensor,
    margin: torch.Tensor,
) -> torch.Tensor:
    """CPO: −log σ(β (c − r) − margin), summed log-probabilities: DPO with a uniform reference (arXiv 2401.08417).

    The caller adds the negative log-likelihood of `chosen`.
    """
    return either_way(lambda x: -logsigmoid(x - margin), beta * (chosen - rejected), label)


def log_odds(logp: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)) from log p, which is clamped to at most −1e-7 and has no gradient above that."""
    logp = logp.clamp(max=CLOSEST_TO_CERTAIN)
    return logp - (-torch.expm1(logp)).log()


PAIR_LOSSES = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
}
REFERENCE_FREE = frozenset({"simpo", "orpo", "cpo"})  # ignore `ref_*`; pass zeros
LENGTH_NORMALISED = frozenset({"simpo", "orpo"})  # defined on mean, not summed, log-probabilities
WITH_NLL = frozenset({"orpo", "cpo"})  # the paper adds the negative log-likelihood of `chosen`; the caller does so here


def kto_baseline(kl_logp: torch.Tensor, kl_ref_logp: torch.Tensor) -> torch.Tensor:
    """KTO's baseline z₀, a scalar: the mean of log π/π_ref over completions (M,) of other prompts, detached.

    It estimates KL(π ‖ π_ref) and can be negative: average it over the optimizer batch first; `kto` clamps it last.
    Raises ValueError if there are no completions.
    """
    if not kl_logp.numel():
        raise ValueError("KTO's baseline got no mismatched completions; expected at least 1. Use batches of 2 or more.")
    return (kl_logp - kl_ref_logp).detach().mean()


def kto(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    desirable: torch.Tensor,
    kl_baseline: torch.Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """KTO for unpaired completions (arXiv 2402.01306): λ_D σ(−β(r − z₀)) if desirable, else λ_U σ(β(r − z₀)).

    r = log π/π_ref of summed log-probabilities (N,), `desirable` (N,) bool, `kl_baseline` is z₀ from `kto_baseline`:
    detached here, and a negative estimate counts as 0. The loss (N,) is λ_y minus the paper's value, so 0 is best.
    """
    gain = beta * (logp - ref_logp - kl_baseline.detach().clamp_min(0))
    return torch.where(desirable, desirable_weight * (-gain).sigmoid(), undesirable_weight * gain.sigmoid())
