"""Worked examples of chapter 3 about preferences. Each one calls the library's training functions."""

from __future__ import annotations

import torch

from posttrain.lab.course.working import Example, Step, Worked, many, one, tensor
from posttrain.objectives.preference import PAIR_LOSSES, implicit_rewards, kto, kto_baseline, log_odds, log_ratio_gap


def signed(value: torch.Tensor | float, digits: int = 2) -> str:
    """A number to put after an operator: in brackets if it is negative."""
    text = one(value, digits)
    return f"({text})" if text.startswith("-") else text


CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = -12.0, -14.0, -13.0, -13.5  # summed log-probabilities


def pair_loss(name: str, *logps: float, beta: float, margin: float = 0.0) -> float:
    """The loss of one pair by its name in PAIR_LOSSES."""
    chosen, rejected, ref_chosen, ref_rejected = (tensor(value) for value in logps)
    loss = PAIR_LOSSES[name]
    return float(loss(chosen, rejected, ref_chosen, ref_rejected, beta, tensor(1.0), tensor(margin))[0])


def direct() -> Worked:
    """DPO's loss of one pair, step by step."""
    chosen, rejected, ref_chosen, ref_rejected = map(tensor, (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED))
    better, worse = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, 0.1)
    gap = log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected)[0]
    loss = pair_loss("sigmoid", CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=0.1)
    pull = 0.1 * float((-0.1 * gap).sigmoid())
    return Worked(
        title="DPO on one pair",
        given="Log-probabilities of whole answers: the policy gives the better answer −12.0 and the worse one −14.0, "
        "the reference −13.0 and −13.5. β = 0.1.",
        calls=("objectives.preference.implicit_rewards", "objectives.preference.sigmoid"),
        steps=(
            Step(
                r"\hat r_w = \beta \log \frac{\pi(y_w)}{\pi_{\text{ref}}(y_w)}", r"0.1\,(-12.0 + 13.0)", one(better[0])
            ),
            Step(
                r"\hat r_l = \beta \log \frac{\pi(y_l)}{\pi_{\text{ref}}(y_l)}", r"0.1\,(-14.0 + 13.5)", one(worse[0])
            ),
            Step(r"L = -\log \sigma(\hat r_w - \hat r_l)", rf"-\log \sigma({one(0.1 * gap)})", one(loss)),
            Step(
                r"\beta\,\sigma(\hat r_l - \hat r_w)",
                rf"0.1 \cdot \sigma({one(-0.1 * gap)})",
                one(pull, 4),
                "The weight with which its gradient raises the better answer and lowers the worse one:",
            ),
        ),
    )


def cancels() -> Worked:
    """The implicit reward of the optimal policy is the reward, up to one constant per prompt."""
    reference, rewards, beta = tensor(0.6, 0.3, 0.1), tensor(0.0, 1.0, 2.0), 0.5
    best = torch.log_softmax(reference.log() + rewards / beta, 0)
    implied, _ = implicit_rewards(best, best, reference.log(), reference.log(), beta)
    z = torch.logsumexp(reference.log() + rewards / beta, 0)
    rows = [(f"$y_{i + 1}$", *many((rewards[i], best[i].exp(), implied[i], implied[i] + beta * z))) for i in range(3)]
    return Worked(
        title="The partition function cancels",
        given="Rewards 0, 1, 2, reference probabilities 0.6, 0.3, 0.1, β = 0.5, and the optimal policy for them.",
        calls=("objectives.preference.implicit_rewards",),
        steps=(
            Step(r"\beta \log Z", "", one(beta * z)),
            Step(
                r"\hat r(y_3) - \hat r(y_2)",
                rf"{one(implied[2])} - {signed(implied[1], 3)}",
                one(implied[2] - implied[1]),
                "Differences of implicit rewards are differences of rewards:",
            ),
        ),
        head=("answer", "$r$", r"$\pi^*$", r"$\beta \log \pi^* / \pi_{\text{ref}}$", r"$+ \beta \log Z$"),
        rows=tuple(rows),
    )


def squared() -> Worked:
    """IPO compared with DPO: a target instead of an unbounded push."""
    rows = [
        (one(h, 0), *many((pair_loss("sigmoid", h, 0, 0, 0, beta=0.1), pair_loss("ipo", h, 0, 0, 0, beta=0.1)), 2))
        for h in (0.0, 2.0, 5.0, 8.0, 40.0)
    ]
    return Worked(
        title="IPO has a target to stop at",
        given="The gap h = log-ratio of the better answer minus that of the worse one, in nats; β = τ = 0.1.",
        calls=("objectives.preference.ipo", "objectives.preference.sigmoid"),
        steps=(Step(r"\Big(h - \frac{1}{2\tau}\Big)^2", r"\Big(2 - \frac{1}{0.2}\Big)^2", rows[1][2], "At h = 2:"),),
        head=("$h$", "DPO", "IPO"),
        rows=tuple(rows),
        after="DPO’s loss keeps falling. IPO’s is 0 at h = 5 and rises again beyond it.",
    )


def unpaired() -> Worked:
    """KTO: a reference point, then one answer at a time, good or bad."""
    base = kto_baseline(tensor(0.5, 1.5, -0.2, 0.6), tensor(0.0, 0.0, 0.0, 0.0))
    good = kto(tensor(-11.0), tensor(-13.0), torch.tensor([True]), base, 0.5, 1.0, 1.0)[0]
    bad = kto(tensor(-11.0), tensor(-13.0), torch.tensor([False]), base, 0.5, 1.0, 1.0)[0]
    return Worked(
        title="KTO on one answer",
        given="The policy gives an answer −11.0 nats, the reference −13.0. Four answers that belong to other prompts "
        "have log-ratios 0.5, 1.5, −0.2 and 0.6. β = 0.5, both weights 1.",
        calls=("objectives.preference.kto_baseline", "objectives.preference.kto"),
        steps=(
            Step(
                r"z_0 = \text{mean}\big(\log \tfrac{\pi}{\pi_{\text{ref}}}\big)",
                r"\tfrac14 (0.5 + 1.5 - 0.2 + 0.6)",
                one(base),
            ),
            Step(
                r"L_{\text{good}} = 1 - \sigma(\beta (r - z_0))",
                rf"1 - \sigma\big(0.5\,(2.0 - {one(base, 2)})\big)",
                one(good),
                "If the answer was rated good:",
            ),
            Step(
                r"L_{\text{bad}} = 1 - \sigma(\beta (z_0 - r))",
                rf"1 - \sigma\big(0.5\,({one(base, 2)} - 2.0)\big)",
                one(bad),
                "If it was rated bad:",
            ),
        ),
    )


def odds() -> Worked:
    """ORPO: likelihood and odds in one loss."""
    better, worse = tensor(-0.5), tensor(-0.9)
    gap = (log_odds(better) - log_odds(worse))[0]
    term = pair_loss("orpo", -0.5, -0.9, 0, 0, beta=0.25)
    return Worked(
        title="ORPO on one pair",
        given="Mean log-probability per token: the better answer −0.5, the worse one −0.9. λ = 0.25.",
        calls=("objectives.preference.log_odds", "objectives.preference.orpo"),
        steps=(
            Step(
                r"\log \text{odds}_w = \log \frac{p}{1 - p}",
                r"\log \frac{e^{-0.5}}{1 - e^{-0.5}}",
                one(log_odds(better)[0]),
            ),
            Step(r"\log \text{odds}_l", r"\log \frac{e^{-0.9}}{1 - e^{-0.9}}", one(log_odds(worse)[0])),
            Step(
                r"L_{\text{OR}} = -\lambda \log \sigma(\text{difference})", rf"-0.25 \log \sigma({one(gap)})", one(term)
            ),
            Step(r"L = -\log p_w + L_{\text{OR}}", rf"0.5 + {one(term)}", one(0.5 + term)),
        ),
    )


def simple() -> Worked:
    """SimPO: the mean per token, and a margin."""
    loss = pair_loss("simpo", -0.5, -0.9, 0, 0, beta=2.0, margin=1.0)
    plain = pair_loss("simpo", -0.5, -0.9, 0, 0, beta=2.0)
    return Worked(
        title="SimPO on the same pair",
        given="Mean log-probability per token: the better answer −0.5, the worse one −0.9. β = 2, γ = 1.",
        calls=("objectives.preference.simpo",),
        steps=(
            Step(r"\beta (\bar c - \bar r) - \gamma", r"2\,(-0.5 + 0.9) - 1", one(2 * 0.4 - 1)),
            Step(r"L = -\log \sigma(\cdot)", rf"-\log \sigma({one(2 * 0.4 - 1)})", one(loss)),
            Step(r"-\log \sigma(0.8)", "", one(plain), "Without the margin, the pair would be nearly learned already:"),
        ),
    )


EXAMPLES: dict[str, Example] = {
    "dpo": direct,
    "cancels": cancels,
    "ipo": squared,
    "kto": unpaired,
    "orpo": odds,
    "simpo": simple,
}
