"""Worked examples of chapter 3. Each one calls the library's training functions and shows their results."""

from __future__ import annotations

from itertools import product

import torch

from posttrain.lab.course.working import Example, Step, Worked, many, one, tensor
from posttrain.objectives.advantages import group_relative, leave_one_out
from posttrain.objectives.policy import clip, ratio
from posttrain.objectives.tokens import kl_k3
from posttrain.objectives.values import adaptive_kl, gae, token_rewards, value_loss

HERE = torch.ones(1, 4, dtype=torch.bool)


# --- the objective --------------------------------------------------------------------------------------------------


def optimum() -> Worked:
    """The optimal policy under a KL penalty, compared with others."""
    reference, rewards, beta = tensor(0.6, 0.3, 0.1), tensor(0.0, 1.0, 2.0), 1.0
    weights = reference * (rewards / beta).exp()
    best = weights / weights.sum()

    def earns(policy: torch.Tensor) -> tuple[str, ...]:
        apart = torch.xlogy(policy, policy / reference).sum()
        return many((reward := (policy * rewards).sum(), apart, reward - beta * apart))

    rows = [
        (name, *many(policy, 3), *earns(policy))
        for name, policy in (
            ("reference", reference),
            ("only the best answer", tensor(0, 0, 1)),
            ("between the two", tensor(0.3, 0.3, 0.4)),
            ("the optimum", best),
        )
    ]
    z = weights.sum()
    return Worked(
        title="The best policy when leaving the reference costs",
        given="Three answers with reference probabilities 0.6, 0.3, 0.1 and rewards 0, 1, 2; β = 1.",
        calls=("torch.xlogy",),
        steps=(
            Step(
                r"Z = \sum_y \pi_{\text{ref}}(y)\, e^{r(y)/\beta}",
                r"0.6\,e^0 + 0.3\,e^1 + 0.1\,e^2",
                one(z),
            ),
            Step(
                r"\pi^*(y_3) = \tfrac{1}{Z} \pi_{\text{ref}}(y_3)\, e^{r(y_3)/\beta}",
                rf"0.1\,e^2 / {one(z)}",
                one(best[2]),
            ),
            Step(r"\beta \log Z", "", one(beta * z.log()), "The optimum reaches exactly"),
        ),
        head=(
            "policy",
            r"$\pi(y_1)$",
            r"$\pi(y_2)$",
            r"$\pi(y_3)$",
            r"$\mathbb{E}[r]$",
            "KL",
            r"$\mathbb{E}[r] - \beta\,$KL",
        ),
        rows=tuple(rows),
    )


def per_token() -> Worked:
    """A score at the end and a penalty at every token."""
    logp, ref = tensor(-0.4, -1.0, -0.2, -0.1).unsqueeze(0), tensor(-0.5, -2.0, -0.3, -0.1).unsqueeze(0)
    apart = logp - ref
    rewards = token_rewards(tensor(1.0), apart, HERE, 0.1)[0]
    rows = [(str(t + 1), *many((logp[0, t], ref[0, t], apart[0, t], rewards[t]), 2)) for t in range(4)]
    return Worked(
        title="The reward of each token",
        given="An answer of four tokens has a score of 1. The penalty's coefficient is 0.1.",
        calls=("objectives.values.token_rewards",),
        steps=(
            Step(r"r_4 = R - \beta\,(\log\pi - \log\pi_{\text{ref}})", r"1 - 0.1 \cdot 0.00", one(rewards[3], 2)),
            Step(
                r"\sum_t r_t", "", one(rewards.sum(), 2), "Together, all tokens earn the score minus the whole penalty:"
            ),
        ),
        head=("t", r"$\log \pi$", r"$\log \pi_{\text{ref}}$", "difference", "$r_t$"),
        rows=tuple(rows),
    )


def advantages() -> Worked:
    """Generalised advantage estimation on four tokens, for three values of λ."""
    rewards = tensor(-0.01, -0.10, -0.01, 1.0).unsqueeze(0)
    values = tensor(0.5, 0.4, 0.7, 0.9).unsqueeze(0)
    (td, _), (some, back), (whole, _) = (gae(rewards, values, HERE, 1.0, lam) for lam in (0.0, 0.95, 1.0))
    rows = [
        (str(t + 1), *many((rewards[0, t], values[0, t], td[0, t], some[0, t], whole[0, t], back[0, t])))
        for t in range(4)
    ]
    return Worked(
        title="GAE, from the last token to the first",
        given="The rewards of four tokens and the critic's value before each; γ = 1, λ = 0.95.",
        calls=("objectives.values.gae",),
        steps=(
            Step(r"A_4 = \delta_4 = r_4 - V_4", r"1 - 0.9", one(some[0, 3])),
            Step(r"\delta_3 = r_3 + V_4 - V_3", r"-0.01 + 0.9 - 0.7", one(td[0, 2])),
            Step(r"A_3 = \delta_3 + \lambda A_4", rf"{one(td[0, 2])} + 0.95 \cdot {one(some[0, 3])}", one(some[0, 2])),
            Step(r"\delta_2 = r_2 + V_3 - V_2", r"-0.10 + 0.7 - 0.4", one(td[0, 1])),
            Step(r"A_2 = \delta_2 + \lambda A_3", rf"{one(td[0, 1])} + 0.95 \cdot {one(some[0, 2])}", one(some[0, 1])),
        ),
        head=(
            "t",
            "$r_t$",
            "$V_t$",
            r"$A_t,\ \lambda = 0$",
            r"$A_t,\ \lambda = 0.95$",
            r"$A_t,\ \lambda = 1$",
            "return",
        ),
        rows=tuple(rows),
    )


def clipping() -> Worked:
    """PPO's surrogate for four ratios and both signs of the advantage."""
    rows: list[tuple[str, ...]] = []
    for advantage in (1.0, -1.0):
        for r in (0.7, 0.9, 1.1, 1.5):
            logp = tensor(r).log().unsqueeze(0).requires_grad_()
            here = torch.ones(1, 1, dtype=torch.bool)
            loss, clipped = clip(logp, torch.zeros_like(logp), torch.full_like(logp, advantage), here, 0.2, 0.2)
            slope = -torch.autograd.grad(loss.sum(), logp)[0]
            rows.append((f"{advantage:+.0f}", *many((r, -loss.detach()), 2), one(slope, 2), "yes" if clipped else "no"))
    return Worked(
        title="Where the clip removes the gradient",
        given="One token, ε = 0.2. The gradient is that of the surrogate with respect to log π: above 0 the token "
        "becomes more likely.",
        calls=("objectives.policy.clip",),
        head=("$A$", r"$\rho$", "surrogate", "gradient", "clipped"),
        rows=tuple(rows),
        after="Only two of the eight are clipped: a good token that is already much more likely, and a bad one that is "
        "already much less likely. A token that moved in the wrong direction keeps its gradient.",
    )


def critic_loss() -> Worked:
    """The clipped value loss."""
    value, old, back = tensor(0.9).unsqueeze(0), tensor(0.5).unsqueeze(0), tensor(1.0).unsqueeze(0)
    here = torch.ones(1, 1, dtype=torch.bool)
    loss, clipped = value_loss(value, old, back, here, 0.2)
    free, _ = value_loss(value, old, back, here, 0.0)
    return Worked(
        title="A critic's loss",
        given="The critic predicted 0.5 when the answer was sampled and predicts 0.9 now; the return was 1.",
        calls=("objectives.values.value_loss",),
        steps=(
            Step(r"\tfrac12 (V - R)^2", r"\tfrac12 (0.9 - 1)^2", one(free)),
            Step(
                r"\tfrac12 \max\big((V - R)^2, (V_{\text{clip}} - R)^2\big)",
                r"\tfrac12 \max\big((0.9 - 1)^2, (0.7 - 1)^2\big)",
                one(loss),
                f"With a clip range of 0.2, {'its gradient is gone' if clipped else 'nothing is clipped'}:",
            ),
        ),
    )


def controller() -> Worked:
    """An adaptive coefficient that steers the KL to a target."""
    rows = [(one(k, 1), one(adaptive_kl(0.1, k, 6.0, 10000, 512), 5)) for k in (2.0, 5.0, 6.0, 9.0)]
    return Worked(
        title="An adaptive KL coefficient",
        given="β is 0.1, the target is 6 nats per answer, the horizon 10,000 answers; 512 answers were sampled.",
        calls=("objectives.values.adaptive_kl",),
        steps=(
            Step(
                r"\beta \leftarrow \beta\,\Big(1 + \mathrm{clip}\big(\tfrac{\mathrm{KL}}{6} - 1, \pm 0.2\big)"
                r" \tfrac{n}{10000}\Big)"
            ),
        ),
        head=("measured KL", r"new $\beta$"),
        rows=tuple((a, b) for a, b in rows),
    )


# --- without a critic -----------------------------------------------------------------------------------------------


def others() -> Worked:
    """RLOO and the group mean on four answers."""
    rewards = tensor(1, 0, 0, 1).unsqueeze(0)
    mean, without = group_relative(rewards)[0], leave_one_out(rewards)[0]
    scaled = group_relative(rewards, "sample")[0]
    rows = [(str(i + 1), one(rewards[0, i], 0), *many((without[i], mean[i], scaled[i]))) for i in range(4)]
    return Worked(
        title="Four answers to one question",
        given="Rewards 1, 0, 0, 1.",
        calls=("objectives.advantages.leave_one_out", "objectives.advantages.group_relative"),
        steps=(
            Step(r"A_1^{\text{RLOO}} = r_1 - \tfrac13 (r_2 + r_3 + r_4)", r"1 - \tfrac13 (0 + 0 + 1)", one(without[0])),
            Step(
                r"\frac{G}{G - 1}\,(r_1 - \bar r)",
                r"\tfrac43\,(1 - 0.5)",
                one(4 / 3 * mean[0]),
                "The same, from the group mean:",
            ),
            Step(
                r"\hat A_1 = \frac{r_1 - \mu_G}{\sigma_G}",
                rf"\frac{{1 - 0.5}}{{{one(rewards.std())}}}",
                one(scaled[0]),
                "GRPO divides by the group’s standard deviation:",
            ),
        ),
        head=("i", "$r_i$", "RLOO", r"$r_i - \mu_G$", r"$(r_i - \mu_G) / \sigma_G$"),
        rows=tuple(rows),
    )


def unbiased() -> Worked:
    """The expectation of two estimators over all possible groups, by enumeration, compared with the true gradient."""
    pi, rewards = tensor(0.3, 0.7), tensor(1.0, 0.0)
    score = tensor(1.0, 0.0) - pi[0]  # d log π(answer) / d logit of the right one
    exact = (pi * rewards * score).sum()
    found: list[tuple[str, ...]] = []
    for size in (2, 4, 8):
        drawn = torch.tensor(list(product((0, 1), repeat=size)))  # (groups, G)
        chance, scores = pi[drawn].prod(1), score[drawn]
        mean, others = (
            (chance * (estimator(rewards[drawn]) * scores).mean(1)).sum()
            for estimator in (group_relative, leave_one_out)
        )
        found.append((str(size), *many((exact, mean, (1 - 1 / size) * exact, others), 5)))
    return Worked(
        title="All groups that could have been drawn",
        given="A question that is answered correctly with probability 0.3. Each group of G answers is weighted by its "
        "probability; the numbers are expected estimates of the gradient of J with respect to the right answer’s "
        "logit.",
        calls=("objectives.advantages.group_relative", "objectives.advantages.leave_one_out"),
        head=("$G$", r"$\nabla J$", "group mean", r"$(1 - 1/G)\, \nabla J$", "leave one out"),
        rows=tuple(found),
    )


def group_as_critic() -> Worked:
    """How well a group's mean estimates the value of a prompt."""
    p = torch.tensor(0.3, dtype=torch.float64)
    rows: list[tuple[str, ...]] = []
    for size in (2, 4, 8, 16):
        counts = torch.arange(size + 1, dtype=torch.float64)
        log_choose = torch.lgamma(torch.tensor(size + 1.0)) - torch.lgamma(counts + 1) - torch.lgamma(size - counts + 1)
        chance = (log_choose + counts * p.log() + (size - counts) * (1 - p).log()).exp()
        spread = (chance * (counts / size - p).square()).sum().sqrt()
        flat = chance[0] + chance[-1]
        rows.append((str(size), one(spread), one((p * (1 - p) / size).sqrt()), one(flat)))
    return Worked(
        title="A group’s mean as a critic",
        given="A question is answered correctly with probability V = 0.3. How far is the mean of G rewards from V?",
        calls=("torch.lgamma",),
        steps=(Step(r"\text{standard error} = \sqrt{V (1 - V) / G}"),),
        head=("$G$", "spread, enumerated", "by the formula", "all rewards equal"),
        rows=tuple(rows),
        after="The last column is the share of groups that teach nothing, because all rewards are equal.",
    )


def objective() -> Worked:
    """GRPO's objective on four answers of one token each."""
    rewards = tensor(1, 0, 0, 1).unsqueeze(0)
    advantage = group_relative(rewards, "sample", 1e-4)
    old = tensor(-1.0, -0.5, -1.2, -2.0).unsqueeze(0)
    new = tensor(-0.7, -0.6, -1.6, -1.95).unsqueeze(0)
    reference = tensor(-1.0, -0.5, -1.3, -2.0).unsqueeze(0)
    rho = ratio(new, old, HERE)[0]
    loss, clipped = clip(new, old, advantage, HERE, 0.2, 0.2)
    apart = kl_k3(new, reference)[0]
    rows = [
        (str(i + 1), *many((advantage[0, i], rho[i], -loss[0, i], apart[i])), "yes" if clipped[0, i] else "no")
        for i in range(4)
    ]
    total = loss.mean() + 0.04 * apart.mean()
    return Worked(
        title="GRPO’s loss for one group",
        given="Four answers of one token each, with rewards 1, 0, 0, 1, after one update; ε = 0.2, β = 0.04.",
        calls=("objectives.advantages.group_relative", "objectives.policy.clip", "objectives.tokens.kl_k3"),
        steps=(
            Step(r"L = -\tfrac14 \sum_i \min(\cdot)", "", one(loss.mean())),
            Step(
                r"+\, \beta\, \overline{\mathrm{KL}}",
                rf"{one(loss.mean())} + 0.04 \cdot {one(apart.mean())}",
                one(total),
            ),
        ),
        head=("i", r"$\hat A_i$", r"$\rho_i$", r"$\min(\rho \hat A, \text{clip}(\rho) \hat A)$", "KL", "clipped"),
        rows=tuple(rows),
    )


EXAMPLES: dict[str, Example] = {
    "optimum": optimum,
    "token-rewards": per_token,
    "gae": advantages,
    "clip": clipping,
    "value-loss": critic_loss,
    "adaptive-kl": controller,
    "rloo": others,
    "unbiased": unbiased,
    "group-as-critic": group_as_critic,
    "grpo-loss": objective,
}
