"""The worked examples of chapters 5 and 6, some of them from results that the package records."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from posttrain.lab.course import coding
from posttrain.lab.course.working import Example, Step, Worked, many, one, tensor
from posttrain.objectives.advantages import group_relative
from posttrain.objectives.tokens import select, token_weights
from posttrain.search import bon_kl

RESULTS = Path(__file__).parents[2] / "recipes" / "results"


@cache
def recorded(pipeline: str) -> dict[str, Any]:
    """What a shipped pipeline came to, as the package records it."""
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
        title="One question of nanochat's loop",
        given="Sixteen answers, of which the first four are right. The first eight have 10 tokens each, the other "
        "eight 20.",
        calls=("objectives.advantages.group_relative", "objectives.tokens.token_weights"),
        steps=(
            Step(r"A_i = r_i - \mu", r"1 - \tfrac{4}{16}", one(advantages[0], 2), "A right answer:"),
            Step(
                r"w = \frac{1}{C \cdot \sum_{c} |y|}",
                r"\frac{1}{2 \cdot 80}",
                one(passes[0, 0], 5),
                "A token in the first pass:",
            ),
            Step(
                r"w = \frac{1}{C \cdot \sum_{c} |y|}", r"\frac{1}{2 \cdot 160}", one(passes[9, 0], 5), "In the second:"
            ),
        ),
        head=("a token of", "advantage", "push with passes of 8", "push with one mean over all"),
        rows=tuple(rows),
        after="Two equally wrong answers are pushed differently, because one shares its pass with shorter neighbours.",
    )


def proxy_and_truth() -> Worked:
    """The toy of the exercise: padding that the proxy likes and the reader does not."""
    free, held = coding.simulated(0.0), coding.simulated(coding.BETA)
    rows = [(f"{i}", *many((*free[i], *held[i]))) for i in (0, 5, 20, 50, 100, 200)]
    best = max(range(len(free)), key=lambda i: free[i][1])
    return Worked(
        title="Climbing a proxy, with and without a KL penalty",
        given="A policy over 0 to 7 sentences of padding. The proxy pays more for each sentence; the truth is highest "
        f"at two. Exact gradient ascent, 200 steps at rate {coding.RATE}; β = {coding.BETA} on the right.",
        calls=("objectives.tokens.kl_k1",),
        head=("step", "proxy", "truth", "KL", "proxy, held", "truth, held", "KL, held"),
        rows=tuple(rows),
        after=f"Without the penalty the truth is best after {best} steps and ends below where it began. With it, less "
        "is won, and kept.",
    )


def gao_fit() -> Worked:
    """Where our fitted curves of best-of-n turn, from the recorded run of `overoptimisation`."""
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
        title="Where choosing by the reward model stops paying",
        given="Our reward model of four layers chooses the best of n answers. The curve was fitted to the true score "
        "of our run.",
        calls=("search.bon_kl", "recipes/results/overoptimisation.json"),
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
        after="The proxy rises all the way. The truth has turned round before the best of 32.",
    )


def entropies() -> Worked:
    """Three distributions over four answers that are equally right."""
    logits = {"varied": (0.0, 0.0, 0.0, 0.0), "narrowed": (2.0, 1.0, 0.0, -1.0), "collapsed": (8.0, 0.0, 0.0, 0.0)}
    rows = []
    for name, values in logits.items():
        _, entropy = select(tensor(*values).unsqueeze(0), torch.tensor([0]))
        shares_ = torch.softmax(tensor(*values), 0)
        distinct = float((1 - (1 - shares_) ** 8).sum())
        rows.append((name, one(shares_.max()), one(entropy[0]), one(math.exp(float(entropy[0])), 2), one(distinct, 2)))
    return Worked(
        title="What entropy says of eight answers",
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
        head=("policy", "likeliest answer", "entropy, nats", r"$e^H$", "different answers in eight"),
        rows=tuple(rows),
        after="All three earn the same reward, so the reward does not say that anything was lost.",
    )


EXAMPLES: dict[str, Example] = {
    "nanochat-step": nanochat_step,
    "proxy-and-truth": proxy_and_truth,
    "gao-fit": gao_fit,
    "entropies": entropies,
}
