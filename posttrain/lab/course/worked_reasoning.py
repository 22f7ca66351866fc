"""Worked examples of chapter 4. Each one calls the library's training functions and shows their results."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from posttrain.evaluation.accuracy import majority, pass_at_k
from posttrain.lab.course.working import Example, Step, Worked, many, one, tensor
from posttrain.objectives.advantages import group_relative, leave_one_out
from posttrain.objectives.policy import cispo, clip, gspo, ratio, reinforce, sequence_ratio
from posttrain.objectives.reward import aggregate_steps
from posttrain.objectives.tokens import kl, token_weights
from posttrain.search.best_of_n import bon_kl, expected_pick

GROUP = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def group_advantage() -> Worked:
    """A group with two right answers out of eight."""
    rewards = tensor(*GROUP).unsqueeze(0)
    mean, spread = rewards.mean(), rewards.std()
    divided, plain, others = group_relative(rewards, "sample")[0], group_relative(rewards)[0], leave_one_out(rewards)[0]
    rows = [
        (f"{i + 1}", one(r, 0), *many(row))
        for i, (r, *row) in enumerate(zip(rewards[0], divided, plain, others, strict=True))
    ]
    return Worked(
        title="The advantages of one group",
        given="Eight answers to one sum; the first and the fourth are right.",
        calls=("objectives.advantages.group_relative", "objectives.advantages.leave_one_out"),
        steps=(
            Step(r"\mu_G = \frac{1}{G} \sum_i r_i", r"\frac{2}{8}", one(mean)),
            Step(r"\sigma_G = \sqrt{\tfrac{1}{G - 1} \sum_i (r_i - \mu_G)^2}", r"\sqrt{\tfrac{1.5}{7}}", one(spread)),
            Step(
                r"\hat A_1 = \frac{r_1 - \mu_G}{\sigma_G}",
                rf"\frac{{1 - {one(mean, 2)}}}{{{one(spread)}}}",
                one(divided[0]),
            ),
            Step(
                r"\hat A_2 = \frac{r_2 - \mu_G}{\sigma_G}",
                rf"\frac{{0 - {one(mean, 2)}}}{{{one(spread)}}}",
                one(divided[1]),
            ),
        ),
        head=("answer", "$r_i$", r"$(r_i - \mu) / \sigma$", r"$r_i - \mu$", "leave one out"),
        rows=tuple(rows),
        after="The columns differ by a factor that is constant within a group, so within one group they are "
        "equivalent. Between groups they are not: only the first weighs easy and hard tasks equally.",
    )


def relativity() -> Worked:
    """The same answer in three groups."""
    groups = {"2 of 8 right": GROUP, "7 of 8 right": (1.0,) * 7 + (0.0,), "8 of 8 right": (1.0,) * 8}
    rows = []
    for name, rewards in groups.items():
        advantages = group_relative(tensor(*rewards).unsqueeze(0), "sample")[0]
        rows.append((name, *many((advantages[0], advantages[-1]))))
    return Worked(
        title="The worth of a right answer depends on its group",
        given="The first answer is right in each of three groups. The last one is wrong in the first two.",
        calls=("objectives.advantages.group_relative",),
        head=("group", "first answer", "last answer"),
        rows=tuple(rows),
        after="If all answers are right, nothing is learned: the advantage is exactly 0.",
    )


def clip_and_kl() -> Worked:
    """The clipped objective on four tokens, with a k3 penalty towards the reference."""
    old = tensor(0.30, 0.30, 0.30, 0.30).log().unsqueeze(0)
    now = tensor(0.33, 0.42, 0.33, 0.21).log().unsqueeze(0)
    reference = tensor(0.25, 0.25, 0.25, 0.25).log().unsqueeze(0)
    advantages = tensor(1.0, 1.0, -1.0, -1.0).unsqueeze(0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    rho = ratio(now, old, mask)[0]
    loss, clipped = clip(now, old, advantages, mask, 0.2, 0.2)
    penalty = kl(now, reference, "k3")[0]
    rows = [
        (one(a, 0), one(r), one(r * a), one(r.clamp(0.8, 1.2) * a), one(-value), "yes" if cut else "no", one(k))
        for a, r, value, cut, k in zip(advantages[0], rho, loss[0], clipped[0], penalty, strict=True)
    ]
    whole = loss.mean() + 0.04 * penalty.mean()
    return Worked(
        title="Four tokens after a first update",
        given="Each token had probability 0.30 when it was sampled; they now have 0.33, 0.42, 0.33 and 0.21. The "
        "reference gives each 0.25. The clip is 0.2 on both sides, β is 0.04.",
        calls=("objectives.policy.ratio", "objectives.policy.clip", "objectives.tokens.kl"),
        head=(
            r"$\hat A$",
            r"$\rho$",
            r"$\rho \hat A$",
            r"$\mathrm{clip}(\rho) \hat A$",
            "smaller",
            "gradient cut",
            "k3",
        ),
        rows=tuple(rows),
        steps=(
            Step(
                r"L = -\tfrac{1}{4} \sum \min(\cdot) + \beta\, \overline{D}",
                rf"{one(loss.mean())} + 0.04 \cdot {one(penalty.mean(), 4)}",
                one(whole, 4),
            ),
        ),
        after="The second token has risen enough and the fourth has fallen enough: neither is pushed any further. The "
        "third has risen although it should fall, so its gradient is kept.",
    )


def group_baseline() -> Worked:
    """Gradient estimates over all groups of four of a policy that is right with probability 0.3."""
    p, size = 0.3, 4
    score = {1.0: 1 - p, 0.0: -p}  # d log π / d logit of being right
    found: dict[str, list[tuple[float, float]]] = {
        "none": [],
        "group mean": [],
        "leave one out": [],
        "divided by σ": [],
    }
    for outcome in itertools.product((1.0, 0.0), repeat=size):
        chance = math.prod(p if r else 1 - p for r in outcome)
        rewards = tensor(*outcome).unsqueeze(0)
        scores = tensor(*(score[r] for r in outcome))
        each = {
            "none": rewards[0],
            "group mean": group_relative(rewards)[0],
            "leave one out": leave_one_out(rewards)[0],
            "divided by σ": group_relative(rewards, "sample")[0],
        }
        for name, advantages in each.items():
            found[name].append((chance, float((advantages * scores).mean())))
    rows = []
    for name, values in found.items():
        mean = sum(c * g for c, g in values)
        variance = sum(c * (g - mean) ** 2 for c, g in values)
        rows.append((name, *many((mean, math.sqrt(variance), math.sqrt(variance) / mean), 4)))
    return Worked(
        title="What a baseline does to the gradient, over all 16 groups of four",
        given="A policy with one logit θ is right with probability σ(θ) = 0.3. Each of the 16 possible groups is "
        "weighted by its probability, so means and deviations are exact.",
        calls=("objectives.advantages.group_relative", "objectives.advantages.leave_one_out"),
        steps=(
            Step(
                r"\frac{\partial\, \mathbb{E}[r]}{\partial \theta} = p (1 - p)", r"0.3 \cdot 0.7", one(p * (1 - p), 2)
            ),
        ),
        head=("baseline", "mean of the estimate", "standard deviation", "deviation / mean"),
        rows=tuple(rows),
        after="Leaving an answer out of its own baseline gives the true gradient; the group's mean gives (G − 1)/G = ¾ "
        "of it, in the same direction. Relative to their size, both have less noise than no baseline. Dividing by σ "
        "changes the size.",
    )


def on_policy() -> Worked:
    """On-policy, the clipped objective has the same gradient as REINFORCE."""
    advantages = tensor(*(float(a) for a in group_relative(tensor(1.0, 0.0, 0.0, 1.0).unsqueeze(0))[0])).unsqueeze(0)
    mask, rows = torch.ones(1, 4, dtype=torch.bool), []
    slopes = []
    for loss in (reinforce, clip, cispo):
        logp = tensor(0.5, 0.2, 0.2, 0.1).log().unsqueeze(0).requires_grad_()
        value, _ = loss(logp, logp.detach(), advantages, mask, 0.2, 0.2)
        slopes.append(torch.autograd.grad(value.sum(), logp)[0][0])
    rows = [(f"{i + 1}", *many((advantages[0, i], *(slope[i] for slope in slopes)))) for i in range(4)]
    return Worked(
        title="Three losses, one gradient",
        given="Four answers of one token each, two of them right, before any update: every ratio is 1.",
        calls=("objectives.policy.reinforce", "objectives.policy.clip", "objectives.policy.cispo"),
        head=("answer", r"$\hat A$", "REINFORCE", "clip", "CISPO"),
        rows=tuple(rows),
        after="The columns on the right are the derivatives of each loss with respect to the answer's log-probability: "
        "−A for every loss. They differ only from the second update on the same answers.",
    )


def shares() -> Worked:
    """The weight of a token in an answer of two tokens and in one of six."""
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    names = (
        ("GRPO as published", "seq-mean-token-mean"),
        ("DAPO", "token-mean"),
        ("Dr. GRPO", "constant"),
        ("whole sequences", "seq-mean-token-sum"),
    )
    rows = []
    for name, how in names:
        weights = token_weights(mask, how, 8)
        rows.append((name, *many((weights[0, 0], weights[1, 0], weights[0].sum(), weights[1].sum()))))
    return Worked(
        title="How much a token counts",
        given="A short answer of 2 tokens and a long one of 6; at most 8 are allowed.",
        calls=("objectives.tokens.token_weights",),
        head=("method", "short: a token", "long: a token", "short: all", "long: all"),
        rows=tuple(rows),
        after="In the first row, a token of a long wrong answer is penalised a third as much as one of a short wrong "
        "answer.",
    )


def ratios() -> Worked:
    """PPO's clip, GSPO and CISPO on the same ratios of a four-token answer."""
    logp = tensor(0.9, 0.5, 0.36, 0.6).log().unsqueeze(0).requires_grad_()
    old = tensor(0.9, 0.5, 0.20, 0.6).log().unsqueeze(0)
    advantages, mask = torch.ones_like(old), torch.ones(1, 4, dtype=torch.bool)
    rho, whole = ratio(logp.detach(), old, mask)[0], sequence_ratio(logp.detach(), old, mask)[0, 0]
    columns = []
    for loss, low, high in ((clip, 0.2, 0.2), (gspo, 3e-4, 4e-4), (cispo, 1.0, 4.0)):
        value, _ = loss(logp, old, advantages, mask, low, high)
        columns.append(-torch.autograd.grad(value.sum(), logp)[0][0])
    rows = [(f"{i + 1}", *many((rho[i], *(column[i] for column in columns)))) for i in range(4)]
    return Worked(
        title="One unlikely token that has become more likely",
        given="An answer with advantage 1. Its third token had probability 0.20 and has 0.36 now; the others have "
        "not changed.",
        calls=("objectives.policy.clip", "objectives.policy.gspo", "objectives.policy.cispo"),
        steps=(
            Step(
                r"s = \Bigl(\tfrac{\pi(y)}{\pi_{\text{old}}(y)}\Bigr)^{1/|y|}",
                rf"{one(rho[2], 1)}^{{1/4}}",
                one(whole),
            ),
        ),
        head=("token", r"$\rho_t$", "gradient: clip", "gradient: GSPO", "gradient: CISPO"),
        rows=tuple(rows),
        after="The clip removes the gradient of the third token. GSPO's single ratio for the whole answer is beyond "
        "its narrow bound, which removes the gradient of all four. CISPO keeps all four and bounds only the weight, "
        "here at 5.",
    )


def step_scores() -> Worked:
    """Four ways to aggregate step scores."""
    probabilities, mask = tensor(0.95, 0.9, 0.2, 0.85).unsqueeze(0), torch.ones(1, 4, dtype=torch.bool)
    clean = tensor(0.8, 0.8, 0.75, 0.7).unsqueeze(0)
    names = (("weakest step", "min"), ("all right", "product"), ("last step", "last"), ("mean", "mean"))
    rows = [
        (name, *many((aggregate_steps(probabilities, mask, how)[0], aggregate_steps(clean, mask, how)[0])))
        for name, how in names
    ]
    return Worked(
        title="From steps to a score",
        given="Two solutions of four steps; a process reward model gives each step a probability of being right. A: "
        "0.95, 0.90, 0.20, 0.85. B: 0.80, 0.80, 0.75, 0.70.",
        calls=("objectives.reward.aggregate_steps",),
        head=("rule", "A", "B"),
        rows=tuple(rows),
        after="The weakest step and the product reflect A's third step. The last step and the mean hardly do.",
    )


def coverage() -> Worked:
    """pass@k of two models whose order reverses as k grows."""
    base, trained = (52, 6), (98, 0)
    rows = []
    for k in (1, 4, 16, 64):
        values = [sum(pass_at_k(128, right, k) for right in model) / 2 for model in (base, trained)]
        rows.append((f"{k}", *many(values)))
    return Worked(
        title="How a model can be better with one answer and worse with many",
        given="Two tasks, 128 answers each. The base model got 52 and 6 of them right, a sharpened model 98 and 0. The "
        "numbers are made up; the estimator is not.",
        calls=("evaluation.accuracy.pass_at_k",),
        steps=(
            Step(
                r"\text{pass@}k = 1 - \binom{n - c}{k} \Big/ \binom{n}{k}",
                r"1 - \tbinom{122}{16} / \tbinom{128}{16}",
                one(pass_at_k(128, 6, 16)),
                "The base model's second task at k = 16:",
            ),
        ),
        head=("k", "base", "sharpened"),
        rows=tuple(rows),
        after="With one answer the sharpened model wins; with 64 the base model does, because it can still solve both "
        "tasks.",
    )


def voting() -> Worked:
    """The probability that a majority of n independent answers is right, by enumeration."""
    rows = []
    for n in (1, 3, 5, 7):
        chances = []
        for p in (0.6, 0.4):
            total = 0.0
            for outcome in itertools.product((True, False), repeat=n):
                chance = math.prod(p if right else 1 - p for right in outcome)
                total += chance * majority(["yes" if right else "no" for right in outcome], outcome)
            chances.append(total)
        rows.append((f"{n}", *many(chances)))
    return Worked(
        title="Majority vote",
        given="Questions with two possible answers; each sampled answer is right with probability 0.6, or with 0.4.",
        calls=("evaluation.accuracy.majority",),
        steps=(
            Step(
                r"\sum_{j > n/2} \tbinom{n}{j} p^j (1 - p)^{n - j}",
                r"3 \cdot 0.6^2 \cdot 0.4 + 0.6^3",
                rows[1][1],
                "For n = 3 and p = 0.6:",
            ),
        ),
        head=("n", "$p = 0.6$", "$p = 0.4$"),
        rows=tuple(rows),
        after="A vote makes the most common answer more certain. It helps if that answer is right and hurts if it is "
        "wrong.",
    )


def best_and_price() -> Worked:
    """Expected score of the best of n out of eight scored answers, and the KL that it costs."""
    scores = np.array([0.1, 0.4, 0.5, 0.9, 1.2, 1.4, 2.0, 2.6])
    truth = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    rows = [
        (f"{n}", *many((expected_pick(scores, scores, n), expected_pick(scores, truth, n), bon_kl(n))))
        for n in (1, 2, 4, 8)
    ]
    return Worked(
        title="Best of n, and what it costs",
        given="Eight answers to which a reward model gives the scores 0.1, 0.4, 0.5, 0.9, 1.2, 1.4, 2.0 and 2.6. The "
        "first, the third and the last are wrong.",
        calls=("search.best_of_n.expected_pick", "search.best_of_n.bon_kl"),
        steps=(
            Step(
                r"D_{\mathrm{KL}} \le \log n - \frac{n - 1}{n}",
                r"\log 4 - \tfrac{3}{4}",
                one(bon_kl(4)),
                "The KL of the best of four, in nats:",
            ),
        ),
        head=("n", "score of the pick", "probability of being right", "KL at most"),
        rows=tuple(rows),
        after="The score rises with n, as it must. The probability of being right rises and then falls, because the "
        "highest score belongs to a wrong answer.",
    )


EXAMPLES: dict[str, Example] = {
    "group-advantage": group_advantage,
    "relativity": relativity,
    "clip-and-kl": clip_and_kl,
    "group-baseline": group_baseline,
    "on-policy": on_policy,
    "shares": shares,
    "ratios": ratios,
    "step-scores": step_scores,
    "coverage": coverage,
    "voting": voting,
    "best-and-price": best_and_price,
}
