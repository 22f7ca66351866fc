"""Worked examples of chapter 1. Each one calls the library's training functions and shows their results."""

from __future__ import annotations

import torch

from posttrain.evaluation.accuracy import pass_at_k
from posttrain.lab.course.working import Example, Step, Worked, many, one, tensor
from posttrain.objectives.policy import reinforce
from posttrain.objectives.preference import sequence_logp
from posttrain.objectives.tokens import token_logprobs

ANSWERS = ("391", "381", "400")  # to "What is 23 × 17?"
LOGITS = (0.2, 0.5, 0.0)


def log_probability() -> Worked:
    """The probability of an answer is a product over its tokens, its logarithm a sum."""
    words = ("1", "3", "9", "stop")
    tokens = torch.tensor([[0, 1, 2, 0, 3]])  # the first stands for the prompt
    logits = torch.zeros(1, 5, 4, dtype=torch.float64)
    logits[0, :4] = torch.tensor([[0.5, 2.0, 0.0, -1], [0.0, 0.5, 1.5, 0.0], [2.5, 0.5, 0.0, 1.0], [0, 0, 0, 3.0]])
    logp = token_logprobs(logits, tokens)
    whole = sequence_logp(logp, torch.tensor([[False, True, True, True, True]]))[0]
    rows = [
        (words[int(token)], *many((value.exp(), value)))
        for token, value in zip(tokens[0, 1:], logp[0, 1:], strict=True)
    ]
    terms = " ".join(one(value) for value in logp[0, 1:])
    return Worked(
        title="The log-probability of “391”",
        given="A model with four tokens writes 3, 9, 1 and the stop token; its logits are made up for this example.",
        calls=("objectives.tokens.token_logprobs", "objectives.preference.sequence_logp"),
        steps=(
            Step(r"\log \pi(y \mid x) = \sum_t \log \pi(a_t \mid s_t)", terms, one(whole)),
            Step(r"\pi(y \mid x)", rf"e^{{{one(whole)}}}", one(whole.exp())),
        ),
        head=("token", r"$\pi(a_t \mid s_t)$", r"$\log \pi$"),
        rows=tuple(rows),
    )


def gradients(rewards: torch.Tensor, baseline: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """π (A,), REINFORCE's gradient estimate from each sampled answer (A answers, A logits), and the logits (A,)."""
    logits = tensor(*LOGITS).requires_grad_()
    each: list[torch.Tensor] = []
    for action, reward in enumerate(rewards):
        logp = logits.log_softmax(0)[action].view(1, 1)
        advantage = (reward - baseline).view(1, 1)
        loss, _ = reinforce(logp, logp, advantage, torch.ones(1, 1, dtype=torch.bool), 0.2, 0.2)
        each.append(-torch.autograd.grad(loss.sum(), logits)[0])
    return logits.detach().softmax(0), torch.stack(each), logits.detach()


def policy_gradient() -> Worked:
    """The expectation of REINFORCE's estimate equals the gradient of the expected reward."""
    rewards = tensor(1, 0, 0)
    pi, each, logits = gradients(rewards, 0.0)
    logits.requires_grad_()
    value = (logits.softmax(0) * rewards).sum()
    exact = torch.autograd.grad(value, logits)[0]
    mean = (pi.unsqueeze(1) * each).sum(0)
    rows = [
        (f"“{answer}”", one(r, 0), *many((p, e, m), 4))
        for answer, r, p, e, m in zip(ANSWERS, rewards, pi, exact, mean, strict=True)
    ]
    return Worked(
        title="The policy-gradient theorem on three answers",
        given="“What is 23 × 17?” has three possible answers here, with logits θ = 0.2, 0.5 and 0. Only 391 is right.",
        calls=("objectives.policy.reinforce",),
        steps=(Step(r"J = \sum_y \pi_\theta(y) R(y)", rf"{one(pi[0], 4)} \cdot 1", one(value.detach(), 4)),),
        head=(
            "answer",
            r"$R$",
            r"$\pi_\theta$",
            r"$\partial J / \partial \theta$",
            r"$\mathbb{E}[R\, \nabla \log \pi]$",
        ),
        rows=tuple(rows),
        after="The fourth column differentiates J itself. The fifth averages REINFORCE's estimates from the single "
        "answers, weighted by how often each answer is sampled.",
    )


def baseline() -> Worked:
    """Subtracting a constant from the reward keeps the mean of the estimate and reduces its variance."""
    rows: list[tuple[str, ...]] = []
    for name, shift, subtract in (("1 or 0", 0.0, False), ("11 or 10", 10.0, False), ("11 or 10", 10.0, True)):
        rewards = tensor(1, 0, 0) + shift
        pi = tensor(*LOGITS).softmax(0)
        off = float((pi * rewards).sum()) if subtract else 0.0
        pi, each, _ = gradients(rewards, off)
        mean = (pi * each[:, 0]).sum()
        spread = (pi * (each[:, 0] - mean).square()).sum().sqrt()
        rows.append((name, one(off), one(mean, 4), one(spread, 4)))
    return Worked(
        title="What a baseline changes and what it does not",
        given="The same three answers. The last two columns describe the estimate from one sampled answer, for the "
        "logit of 391.",
        calls=("objectives.policy.reinforce",),
        head=("rewards", r"$b$", "mean", "standard deviation"),
        rows=tuple(rows),
        after="The mean never changes. Adding ten points to every reward makes the estimate many times noisier, and "
        "the baseline removes that noise again.",
    )


def best_of() -> Worked:
    """With a judge that recognises right answers, sampling more answers is enough to get one."""
    rows = [(str(k), f"{100 * pass_at_k(100, 17, k):.1f} %") for k in (1, 2, 4, 8, 16, 32)]
    return Worked(
        title="What it is worth to choose",
        given="A model writes 100 answers to a question, and 17 are right. Someone who recognises right answers may "
        "choose from k of them. How often is there a right one to choose?",
        calls=("evaluation.accuracy.pass_at_k",),
        steps=(Step(r"1 - \binom{83}{k} \big/ \binom{100}{k}"),),
        head=("k", "at least one right"),
        rows=tuple(rows),
    )


EXAMPLES: dict[str, Example] = {
    "log-probability": log_probability,
    "policy-gradient": policy_gradient,
    "baseline": baseline,
    "best-of": best_of,
}
