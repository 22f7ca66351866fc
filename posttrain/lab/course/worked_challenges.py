"""Worked examples of chapters 5 and 6, some of them from recorded results."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache
from pathlib import Path

import torch

from posttrain.evaluation.intervals import wilson
from posttrain.lab.course import coding
from posttrain.lab.course.working import Example, Step, Worked, many, one, tensor
from posttrain.objectives.advantages import flat_groups, group_relative
from posttrain.objectives.policy import reinforce
from posttrain.objectives.reward import bradley_terry
from posttrain.objectives.tokens import kl_k1, select, token_weights
from posttrain.search.best_of_n import bon_kl

RESULTS = Path(__file__).parents[2] / "config" / "recipes" / "results"


@cache
def recorded(pipeline: str) -> dict[str, float]:
    """The recorded results of a bundled pipeline."""
    return json.loads((RESULTS / f"{pipeline}.json").read_text(encoding="utf-8"))["results"]


def nanochat_step() -> Worked:
    """Sixteen answers to one question, in two passes of eight rows."""
    rewards = tensor(*([1.0] * 4 + [0.0] * 12)).unsqueeze(0)
    advantages = group_relative(rewards)[0]
    lengths = [10] * 8 + [20] * 8
    mask = torch.tensor([[t < length for t in range(20)] for length in lengths])
    passes, even = token_weights(mask, "chunk-mean"), token_weights(mask, "token-mean")
    rows = [
        ("a right one (rows 1–4)", *many((advantages[0], passes[0, 0] * advantages[0], even[0, 0] * advantages[0]), 5)),
        ("a wrong one (rows 5–8)", *many((advantages[4], passes[4, 0] * advantages[4], even[4, 0] * advantages[4]), 5)),
        (
            "a wrong one (rows 9–16)",
            *many((advantages[9], passes[9, 0] * advantages[9], even[9, 0] * advantages[9]), 5),
        ),
    ]
    return Worked(
        title="One question in nanochat's loop",
        given="Sixteen answers, of which the first four are right. The first eight have 10 tokens each, the other "
        "eight 20.",
        calls=("objectives.advantages.group_relative", "objectives.tokens.token_weights"),
        steps=(
            Step(r"A_i = r_i - \mu", r"1 - \tfrac{4}{16}", one(advantages[0], 2), "A right answer:"),
            Step(
                r"w = \frac{1}{C \cdot \sum_{c} |y|}",
                r"\frac{1}{2 \cdot 80}",
                one(passes[0, 0], 5),
                "A token of the first pass:",
            ),
            Step(
                r"w = \frac{1}{C \cdot \sum_{c} |y|}",
                r"\frac{1}{2 \cdot 160}",
                one(passes[9, 0], 5),
                "A token of the second pass:",
            ),
        ),
        head=("a token of", "advantage", "weight × advantage, passes of 8", "weight × advantage, one mean over all"),
        rows=tuple(rows),
        after="Two equally wrong answers are weighted differently, because one is in a pass with shorter answers.",
    )


def proxy_and_truth() -> Worked:
    """The exercise's toy problem: padding that the proxy rewards and the true reward does not."""
    free, held = coding.simulated(0.0), coding.simulated(coding.BETA)
    rows = [(f"{i}", *many((*free[i], *held[i]))) for i in (0, 5, 20, 50, 100, 200)]
    best = max(range(len(free)), key=lambda i: free[i][1])
    return Worked(
        title="Climbing a proxy, with and without a KL penalty",
        given="A policy over 0 to 7 sentences of padding. The proxy rises with each sentence; the true reward is "
        f"highest at two. Exact gradient ascent, 200 steps at rate {coding.RATE}; β = {coding.BETA} on the right.",
        calls=("objectives.tokens.kl_k1",),
        head=("step", "proxy", "truth", "KL", "proxy, β", "truth, β", "KL, β"),
        rows=tuple(rows),
        after=f"Without the penalty the truth peaks after {best} steps and ends below where it started. With the "
        "penalty it gains less, but keeps the gain.",
    )


def gao_fit() -> Worked:
    """The peak of the fitted best-of-n curve, from the recorded run of `overoptimisation`."""
    found = recorded("overoptimisation")
    alpha, beta = (found[f"figure.best-of-n.fits.best-of-4.{name}"] for name in ("alpha", "beta"))
    peak = alpha / (2 * beta)
    rows = []
    for n in (1, 4, 16, 32):
        distance = math.sqrt(bon_kl(n))
        curve = 100 * distance * (alpha - beta * distance)
        measured = 100 * (found[f"best-of-4.best_of.{n}.accuracy"] - found["best-of-4.best_of.1.accuracy"])
        score = found[f"best-of-4.best_of.{n}.score"]
        rows.append((f"{n}", one(distance, 2), one(score, 2), one(measured, 1), one(curve, 1)))
    return Worked(
        title="Where choosing by the reward model stops helping",
        given="Our reward model with four layers chooses the best of n answers. The curve was fitted to the true "
        "scores of our run.",
        calls=("search.best_of_n.bon_kl", "config/recipes/results/overoptimisation.json"),
        steps=(
            Step(r"R(d) = d\,(\alpha - \beta d)", rf"d\,({one(alpha, 3)} - {one(beta, 3)}\, d)"),
            Step(
                r"R'(d) = 0 \;\Rightarrow\; d^* = \frac{\alpha}{2\beta}",
                rf"\frac{{{one(alpha, 3)}}}{{2 \cdot {one(beta, 3)}}}",
                one(peak, 2),
            ),
        ),
        head=("n", r"$d = \sqrt{D_{\mathrm{KL}}}$", "proxy", "truth gained, %", "the curve, %"),
        rows=tuple(rows),
        after="The proxy keeps rising. The truth turns down before the best of 32.",
    )


def entropies() -> Worked:
    """Three distributions over four equally right answers."""
    logits = {"varied": (0.0, 0.0, 0.0, 0.0), "narrowed": (2.0, 1.0, 0.0, -1.0), "collapsed": (8.0, 0.0, 0.0, 0.0)}
    rows = []
    for name, values in logits.items():
        _, entropy = select(tensor(*values).unsqueeze(0), torch.tensor([0]))
        shares_ = torch.softmax(tensor(*values), 0)
        distinct = float((1 - (1 - shares_) ** 8).sum())
        rows.append((name, one(shares_.max()), one(entropy[0]), one(math.exp(float(entropy[0])), 2), one(distinct, 2)))
    return Worked(
        title="What entropy says about eight answers",
        given="Four answers are equally right. A policy draws eight times.",
        calls=("objectives.tokens.select",),
        steps=(
            Step(
                r"H(\pi) = -\sum_a \pi(a) \log \pi(a)",
                r"-4 \cdot \tfrac{1}{4} \log \tfrac{1}{4}",
                rows[0][2],
                "Varied:",
            ),
        ),
        head=("policy", "most likely answer", "entropy, nats", r"$e^H$", "different answers in eight"),
        rows=tuple(rows),
        after="All three earn the same reward, so the reward does not show that anything was lost.",
    )


def flat_share() -> Worked:
    """The probability of a flat group, for equal tasks and for a mixture of tasks."""
    rows = []
    for size in (2, 4, 8):
        outcomes = torch.tensor(list(itertools.product((1.0, 0.0), repeat=size)), dtype=torch.float64)
        flat = flat_groups(outcomes)

        def chance(p: float, outcomes: torch.Tensor = outcomes, flat: torch.Tensor = flat) -> float:
            return float(torch.where(outcomes > 0, p, 1 - p).prod(1)[flat].sum())

        rows.append((f"{size}", *many((chance(0.17), 0.8 * chance(0.01) + 0.2 * chance(0.81)))))
    return Worked(
        title="How many groups teach nothing",
        given="Equal: every task is solved with probability 0.17. Unequal: four tasks in five are solved with "
        "probability 0.01 and one in five with 0.81, which is 0.17 on average.",
        calls=("objectives.advantages.flat_groups",),
        steps=(Step("p^G + (1 - p)^G", "0.17^4 + 0.83^4", rows[1][1], "For G = 4 and equal tasks:"),),
        head=("G", "equal tasks", "unequal tasks"),
        rows=tuple(rows),
        after="With the same accuracy, unequal tasks leave many more groups flat.",
    )


def interval() -> Worked:
    """Wilson's intervals for two accuracies on GSM8K's test set."""
    rows = []
    for name, right in (("before, 4.6 %", 60), ("after, 7.6 %", 100)):
        found = wilson(right, 1319)
        rows.append((name, f"{right}", one(100 * found.low, 1), one(100 * found.high, 1)))
    p = 100 / 1319
    return Worked(
        title="What 1,319 problems can show",
        given="60 and 100 of 1,319 problems are solved. The intervals are Wilson's, at 95 %.",
        calls=("evaluation.intervals.wilson",),
        steps=(
            Step(
                r"\sqrt{p (1 - p) / n}",
                rf"\sqrt{{{one(p)} \cdot {one(1 - p)} / 1319}}",
                one(math.sqrt(p * (1 - p) / 1319), 4),
            ),
        ),
        head=("accuracy", "right", "from, %", "to, %"),
        rows=tuple(rows),
        after="The two intervals do not overlap.",
    )


def thinking() -> Worked:
    """The gradient of the accuracy with respect to the logit of thinking, by REINFORCE over both ways to answer."""
    right = tensor(0.9, 0.15)
    rows = []
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        logit = tensor(math.log(q / (1 - q))).requires_grad_()
        logp = torch.cat([torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)]).unsqueeze(0)
        loss, _ = reinforce(logp, logp, right.unsqueeze(0), torch.ones(1, 2, dtype=torch.bool), 0.0, 0.0)
        slope = -torch.autograd.grad((loss * logp.exp().detach()).sum(), logit)[0]
        rows.append((one(q, 2), *many((q * 0.9 + (1 - q) * 0.15, slope[0], q * (1 - q) * 0.75), 4)))
    return Worked(
        title="How fast thinking spreads",
        given="With thinking 90 % of the answers are right, without it 15 %.",
        calls=("objectives.policy.reinforce",),
        head=("$q$", "accuracy", "gradient, by REINFORCE", "$q (1 - q)(a - b)$"),
        rows=tuple(rows),
        after="Slow, fast, slow: rare thoughts are seldom sampled, and once every answer thinks there is nothing to "
        "compare.",
    )


def covariance() -> Worked:
    """The effect of a step on the truth, at the start and later, when proxy and truth diverge."""
    proxy, truth, start = tensor(*coding.PROXY), tensor(*coding.TRUTH), tensor(*coding.START)
    rows = []
    for push in (0.0, 0.5, 1.0, 2.0):
        at = (start + push * proxy).softmax(0)
        together = float(at @ (proxy * truth) - (at @ proxy) * (at @ truth))
        little = (start + (push + 1e-4) * proxy).softmax(0)
        logp = at.log()
        rows.append((one(push, 1), *many((at @ proxy, at @ truth, together, float((little - at) @ truth) / 1e-4)),
                     one((at * kl_k1(logp, start.log_softmax(0))).sum(), 2)))  # fmt: skip
    return Worked(
        title="When pushing the proxy stops helping",
        given="The toy problem below. The policy is its start tilted by η times the proxy.",
        calls=("objectives.tokens.kl_k1",),
        head=(r"$\eta$", "proxy", "truth", r"$\mathrm{Cov}(r, r^*)$", "change of the truth", "KL"),
        rows=tuple(rows),
        after="The covariance is the rate at which the truth changes. It turns negative while the proxy can still rise "
        "a lot.",
    )


def soft_label() -> Worked:
    """A judge with a position bias, asked in both orders."""
    logit, bias, zero = 0.8, 0.5, tensor(0.0)
    ways = tensor(logit + bias, logit - bias)
    label = ways.mean().sigmoid().unsqueeze(0)
    rows = [
        (name, one(value), one(bradley_terry(tensor(0.8), zero, value.reshape(1), zero)[0]))
        for name, value in (
            ("first shown first", ways[0].sigmoid()),
            ("second shown first", ways[1].sigmoid()),
            ("mean of the logits", label[0]),
        )
    ]
    return Worked(
        title="One judgement from two orders",
        given="The judge prefers answer 1 with logit 0.8 and adds 0.5 for whichever answer comes first. The reward "
        "model scores answer 1 higher by 0.8.",
        calls=("objectives.reward.bradley_terry",),
        steps=(
            Step(r"\ell = \sigma\Bigl(\tfrac{(0.8 + 0.5) + (0.8 - 0.5)}{2}\Bigr)", r"\sigma(0.8)", one(label[0])),
            Step(
                r"-\ell \log \sigma(r_1 - r_2) - (1 - \ell) \log \sigma(r_2 - r_1)",
                rf"-{one(label[0])} \log {one(label[0])} - {one(1 - label[0])} \log {one(1 - label[0])}",
                rows[2][2],
            ),
        ),
        head=("order", r"label $\ell$", "loss"),
        rows=tuple(rows),
    )


def pinsker() -> Worked:
    """Pinsker's bound on the effect of a bounded error, and the actual effect in the toy problem."""
    wrong = tensor(*coding.PROXY) - tensor(*coding.TRUTH)
    start = tensor(*coding.START).log_softmax(0)
    most, rows = float(wrong.abs().max()), []
    for push in (0.25, 0.5, 1.0, 2.0):
        logp = (tensor(*coding.START) + push * tensor(*coding.PROXY)).log_softmax(0)
        distance = float((logp.exp() * kl_k1(logp, start)).sum())
        moved = float((logp.exp() - start.exp()) @ wrong)
        rows.append((one(push, 2), *many((distance, abs(moved), 2 * most * math.sqrt(distance / 2)))))
    return Worked(
        title="A bound, and how loose it is",
        given=f"The toy problem's proxy is wrong by at most B = {one(most, 2)}. The policy is its start, tilted.",
        calls=("objectives.tokens.kl_k1",),
        steps=(
            Step(
                r"2 B \sqrt{\tfrac{1}{2} D}",
                rf"2 \cdot {one(most, 2)} \sqrt{{\tfrac{{1}}{{2}} \cdot {rows[0][1]}}}",
                rows[0][3],
                "For the first row:",
            ),
        ),
        head=(r"$\eta$", "KL", "change of the error", "bound"),
        rows=tuple(rows),
    )


EXAMPLES: dict[str, Example] = {
    "nanochat-step": nanochat_step,
    "flat-share": flat_share,
    "interval": interval,
    "thinking": thinking,
    "covariance": covariance,
    "soft-label": soft_label,
    "pinsker": pinsker,
    "proxy-and-truth": proxy_and_truth,
    "gao-fit": gao_fit,
    "entropies": entropies,
}
