"""Test cases of the coding exercises. The library's own functions compute the expected values, in float64.

A reader's code never sees the expected values: it gets the arguments in the sandbox, and exercises.py compares the
results. A case may list typical wrong results, so that the reader is told what went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from posttrain.lab.course.case import Case
from posttrain.objectives.advantages import group_relative
from posttrain.objectives.policy import clip as clipped_loss
from posttrain.objectives.reward import bradley_terry
from posttrain.objectives.tokens import kl_k1
from posttrain.search.choose import vote
from posttrain.search.mcts import puct
from posttrain.search.rebase import shares
from posttrain.search.tree import Node

STD_EPS = 1e-4
CLIP = 0.2
Floats = Sequence[float]


def tensor(values: Any) -> torch.Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


# --- Bradley–Terry ---------------------------------------------------------------------------------------------------

PAIRS = [([1.0, 0.5], [0.0, 1.0]), ([0.5, 2.0], [1.5, 0.0]), ([2.0, 1.0], [1.0, 3.0]), ([0.0, 0.0], [-1.0, 1.0])]
FAR = [([500.0, 0.0], [-500.0, 0.0]), ([-500.0, 0.0], [500.0, 0.0])]


def reward_loss(weights: torch.Tensor, pairs: Sequence[tuple[Floats, Floats]]) -> torch.Tensor:
    """Mean Bradley–Terry loss of a linear reward."""
    chosen, rejected = tensor([c for c, _ in pairs]) @ weights, tensor([r for _, r in pairs]) @ weights
    return bradley_terry(chosen, rejected, torch.ones_like(chosen), torch.zeros_like(chosen)).mean()


def reward_gradient(weights: Floats, pairs: Sequence[tuple[Floats, Floats]]) -> list[float]:
    """Gradient of `reward_loss`."""
    at = tensor(weights).requires_grad_()
    return torch.autograd.grad(reward_loss(at, pairs), at)[0].tolist()


def reward_training(pairs: Sequence[tuple[Floats, Floats]], steps: int, lr: float) -> list[float]:
    """Weights after gradient descent from 0."""
    weights = [0.0] * len(pairs[0][0])
    for _ in range(steps):
        weights = [w - lr * g for w, g in zip(weights, reward_gradient(weights, pairs), strict=True)]
    return weights


def bradley_terry_cases() -> list[Case]:
    """A reward model in plain Python."""
    weights = [0.8, -0.4]
    right = float(reward_loss(tensor(weights), PAIRS))
    slope = reward_gradient(weights, PAIRS)
    swapped = float(reward_loss(tensor([-w for w in weights]), PAIRS))
    trained = reward_training(PAIRS, 50, 0.5)
    return [
        Case("the score is the sum of weight times feature", "score", [[0.8, -0.4], [2.0, 3.0]], 0.8 * 2 - 0.4 * 3),
        Case("the loss of weights that know nothing is log 2", "loss", [[0.0, 0.0], PAIRS], math.log(2)),
        Case(
            "the loss of some weights",
            "loss",
            [weights, PAIRS],
            right,
            (
                (swapped, "that is the loss with chosen and rejected swapped."),
                (right * len(PAIRS), "that is the sum over the pairs; the mean is expected."),
                (-right, "the sign is wrong: the loss is -log sigmoid, which is never negative."),
            ),
        ),
        Case("scores that differ by 1,000 do not overflow", "loss", [[1.0, 0.0], FAR], 500.0),
        Case(
            "the gradient",
            "gradient",
            [weights, PAIRS],
            slope,
            (
                ([-g for g in slope], "the sign is wrong: sigmoid(d) - 1 is negative."),
                ([g * len(PAIRS) for g in slope], "that is the gradient of the sum; that of the mean is expected."),
            ),
        ),
        Case(
            "fifty steps of training",
            "train",
            [PAIRS, 50, 0.5],
            trained,
            (
                ([0.0, 0.0], "nothing was trained: the weights are still 0."),
                (reward_training(PAIRS, 50, -0.5), "the weights move up the loss: subtract lr times the gradient."),
                (reward_training(PAIRS, 51, 0.5), "that is one step too many."),
            ),
        ),
    ]


# --- GRPO ------------------------------------------------------------------------------------------------------------

LOGITS = [0.2, -0.3, 0.5, 0.0]
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
REWARD_OF = [0.0, 1.0, 0.0, 0.25]
DRAWS = [[(0.137 + 0.311 * i + 0.073 * s) % 1.0 for i in range(8)] for s in range(30)]


def sampled(logits: Floats, uniforms: Floats) -> list[int]:
    """Inverse transform sampling: answers for uniform numbers."""
    edges = torch.softmax(tensor(logits), 0).cumsum(0)
    return torch.searchsorted(edges, tensor(uniforms), right=True).clamp_max(len(logits) - 1).tolist()


def relative(rewards: Floats, std: str = "sample") -> list[float]:
    """The library's advantages of one group."""
    return group_relative(tensor([list(rewards)]), std, STD_EPS)[0].tolist()


def updated(
    logits: Floats, old: Floats, answers: Sequence[int], advantages: Floats, lr: float, bound: float
) -> list[float]:
    """One gradient step on the mean of the library's clipped loss over one-token answers."""
    at, chosen = tensor(logits).requires_grad_(), torch.tensor(answers)
    logp, old_logp = torch.log_softmax(at, 0)[chosen], torch.log_softmax(tensor(old), 0)[chosen]
    mask = torch.ones(len(answers), 1, dtype=torch.bool)
    loss, _ = clipped_loss(logp[:, None], old_logp[:, None], tensor(advantages)[:, None], mask, bound, bound)
    return (at - lr * torch.autograd.grad(loss.mean(), at)[0]).tolist()


def grpo_training(logits: Floats, reward_of: Floats, draws: Sequence[Floats], lr: float) -> list[float]:
    """Samples, scores, compares and updates, once per list of uniform numbers."""
    now = list(logits)
    for uniforms in draws:
        answers = sampled(now, uniforms)
        now = updated(now, now, answers, relative([reward_of[a] for a in answers]), lr, CLIP)
    return now


def grpo_cases() -> list[Case]:
    """GRPO on a policy over whole answers."""
    uniforms = [0.05, 0.3, 0.41, 0.77, 0.93]
    answers, advantages, old = [0, 2, 3, 2], [1.5, -0.5, -0.5, -0.5], [0.9, -0.3, 0.1, 0.0]
    step = updated(LOGITS, LOGITS, answers, advantages, 0.5, CLIP)
    far = [1.4, -0.3, -0.6, 0.0]
    bounded = updated(far, old, answers, advantages, 0.5, CLIP)
    return [
        Case("sampling from the policy", "sample", [LOGITS, uniforms], sampled(LOGITS, uniforms)),
        Case(
            "advantages of a group with two right answers",
            "advantages",
            [REWARDS],
            relative(REWARDS),
            (
                (
                    relative(REWARDS, "none"),
                    "the mean is subtracted, but the result is not divided by the standard deviation.",
                ),
                (relative(REWARDS, "population"), "that divides by the standard deviation over n; n - 1 is expected."),
                (REWARDS, "these are the rewards themselves."),
            ),
        ),
        Case("a group of equal rewards has zero advantages", "advantages", [[1.0, 1.0, 1.0]], [0.0, 0.0, 0.0]),
        Case(
            "an update of the policy that sampled",
            "update",
            [LOGITS, LOGITS, answers, advantages, 0.5, CLIP],
            step,
            (
                (LOGITS, "nothing moved."),
                (
                    [2 * a - b for a, b in zip(LOGITS, step, strict=True)],
                    "the step goes down the objective: add the gradient.",
                ),
                (
                    updated(LOGITS, LOGITS, answers, advantages, 0.5 * len(answers), CLIP),
                    "that is the sum over the answers; the mean is expected.",
                ),
            ),
        ),
        Case(
            "answers beyond the clip have no gradient",
            "update",
            [far, old, answers, advantages, 0.5, CLIP],
            bounded,
            (
                (updated(far, old, answers, advantages, 0.5, 1e9), "nothing was clipped: see the hint."),
                (updated(far, far, answers, advantages, 0.5, CLIP), "the ratio to the old policy is missing."),
            ),
        ),
        Case(
            "thirty steps of training",
            "train",
            [LOGITS, REWARD_OF, DRAWS, 0.3],
            grpo_training(LOGITS, REWARD_OF, DRAWS, 0.3),
            ((LOGITS, "nothing was trained."),),
        ),
    ]


# --- reward hacking --------------------------------------------------------------------------------------------------

START = [0.0, -0.8, -1.3, -1.9, -2.5, -3.0, -3.5, -4.0]
PROXY = [0.0, 0.8, 1.4, 1.8, 2.1, 2.3, 2.45, 2.55]
TRUTH = [0.0, 0.8, 1.0, 0.9, 0.5, -0.2, -1.0, -1.8]
STEPS, RATE, BETA = 200, 0.5, 1.3


def mean_value(logits: Floats, values: Floats) -> float:
    """Mean of values under the softmax policy."""
    return float(torch.softmax(tensor(logits), 0) @ tensor(values))


def divergence(logits: torch.Tensor, start: Floats) -> torch.Tensor:
    """KL(policy ‖ start): the mean of `kl_k1` under the policy."""
    logp = torch.log_softmax(logits, 0)
    return (logp.exp() * kl_k1(logp, torch.log_softmax(tensor(start), 0))).sum()


def climbed(logits: Floats, start: Floats, proxy: Floats, beta: float, lr: float) -> list[float]:
    """One step of gradient ascent on E[proxy] − beta · KL."""
    at = tensor(logits).requires_grad_()
    objective = torch.softmax(at, 0) @ tensor(proxy) - beta * divergence(at, start)
    return (at + lr * torch.autograd.grad(objective, at)[0]).detach().tolist()


def simulated(beta: float, steps: int = STEPS) -> list[list[float]]:
    """Proxy, truth and KL before the first step and after each step."""
    logits, curve = list(START), []
    for number in range(steps + 1):
        if number:
            logits = climbed(logits, START, PROXY, beta, RATE)
        distance = float(divergence(tensor(logits), START))
        curve.append([mean_value(logits, PROXY), mean_value(logits, TRUTH), distance])
    return curve


def hacking_cases() -> list[Case]:
    """A proxy that rewards length, and a true reward that does not."""
    moved = climbed(START, START, PROXY, 0.0, RATE)
    held = climbed(moved, START, PROXY, BETA, RATE)
    free = simulated(0.0)
    return [
        Case("the mean of the proxy under the policy", "expected", [START, PROXY], mean_value(START, PROXY)),
        Case("a policy has no divergence from itself", "kl", [START, START], 0.0),
        Case(
            "the divergence after a step",
            "kl",
            [moved, START],
            float(divergence(tensor(moved), START)),
            ((float(divergence(tensor(START), moved)), "that is KL(start || policy), the wrong way round."),),
        ),
        Case(
            "a step without the penalty",
            "step",
            [START, START, PROXY, 0.0, RATE],
            moved,
            (
                (list(START), "nothing moved."),
                (climbed(START, START, PROXY, 0.0, -RATE), "the step goes down the proxy: add the gradient."),
            ),
        ),
        Case(
            "a step with the penalty",
            "step",
            [moved, START, PROXY, BETA, RATE],
            held,
            (
                (climbed(moved, START, PROXY, 0.0, RATE), "the KL penalty is missing."),
                (climbed(moved, START, PROXY, -BETA, RATE), "the penalty is added; it should be subtracted."),
            ),
        ),
        Case("five steps", "simulate", [START, PROXY, TRUTH, 0.0, RATE, 5], simulated(0.0, 5)),
        Case(
            "without the penalty the proxy keeps rising and the truth ends below its start",
            "simulate",
            [START, PROXY, TRUTH, 0.0, RATE, STEPS],
            free,
        ),
        Case(
            "with the penalty the truth ends above its start",
            "simulate",
            [START, PROXY, TRUTH, BETA, RATE, STEPS],
            simulated(BETA),
        ),
        Case(
            "the best step to stop at",
            "best_step",
            [free],
            max(range(len(free)), key=lambda i: free[i][1]),
            ((STEPS, "that is the last step, where the proxy is highest."),),
        ),
    ]


# --- search ----------------------------------------------------------------------------------------------------------

ANSWERS, WEIGHTS = [2, 0, -1, 2, 0, 1], [0.26, 0.25, 3.0, 0.25, 0.3, 0.5]
SCORES = [0.9, 0.8, 0.5, 0.2]


def puct_scores(values: Floats, priors: Floats, visits: Sequence[int], c: float) -> list[float]:
    """The library's PUCT scores of children with these values, priors and visits."""
    root = Node(0, None, visits=sum(visits))
    children = [
        Node(i + 1, root, i, logprobs=np.log(np.array([prior])), visits=n, value=value)
        for i, (value, prior, n) in enumerate(zip(values, priors, visits, strict=True))
    ]
    return puct(root, children, c)


def search_cases() -> list[Case]:
    """The rules by which a vote, rebase and tree search spend tokens."""
    values, priors, visits = [0.2, 0.6, 0.0], [0.5, 0.3, 0.2], [3, 2, 0]
    return [
        Case("a majority", "vote", [[4, 7, 7], [1.0, 1.0, 1.0]], vote([4, 7, 7], [1.0] * 3)),
        Case(
            "a vote with weights",
            "vote",
            [ANSWERS, WEIGHTS],
            vote(ANSWERS, WEIGHTS),
            (
                (0, "that is the majority without the weights."),
                (2, "a completion without an answer (-1) does not vote."),
                (4, "that is another completion of the winning answer; the first is expected."),
            ),
        ),
        Case("a tie goes to the answer that came first", "vote", [[5, 3, 3, 5], [1.0] * 4], 0),
        Case("nobody has an answer", "vote", [[-1, -1], [1.0, 1.0]], -1),
        Case(
            "eight next steps",
            "shares",
            [SCORES, 8, 0.2],
            shares(SCORES, 8, 0.2),
            (
                (shares(SCORES, 8, 1.0), "the temperature is missing."),
                ([4, 2, 0, 0], "every share is rounded down; two places are left for the largest remainders."),
            ),
        ),
        Case("equal scores, and one place more than an equal share", "shares", [[0.3] * 3, 4, 0.2],
             shares([0.3] * 3, 4, 0.2)),
        Case(
            "PUCT at a node with five visits",
            "puct",
            [values, priors, visits, 1.0],
            puct_scores(values, priors, visits, 1.0),
            (
                (values, "that is the mean value alone; the bonus is missing."),
                (puct_scores(values, priors, visits, 5**0.5), "that is N where its root is expected."),
            ),
        ),
        Case("before any visit the policy decides", "puct", [[0.0] * 3, priors, [0] * 3, 1.5],
             puct_scores([0.0] * 3, priors, [0] * 3, 1.5)),
    ]  # fmt: skip


CASES: dict[str, Callable[[], list[Case]]] = {
    "bradley-terry": bradley_terry_cases,
    "simple-grpo": grpo_cases,
    "reward-hacking": hacking_cases,
    "search": search_cases,
}
