"""Every answer of a small policy, enumerated: what each estimator's gradient is on average, against what it should be.

Three tokens, of which 0 stops, and at most three of them: 15 answers. A policy is a table of logits, one row for each
of the 7 prefixes, or a small network that makes that table. Averages are sums over all answers, all pairs or all
triples, weighted by their probability, in float64; nothing is sampled. Where an estimator is biased, the test states
what it estimates instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from posttrain.objectives.advantages import (
    batch_relative,
    group_relative,
    leave_one_out,
    max_rl,
    minus_baseline,
    returns_to_go,
)
from posttrain.objectives.policy import POLICY_LOSSES, importance, is_correction, reinforce
from posttrain.objectives.tokens import kl, token_weights
from posttrain.objectives.values import gae, token_rewards
from tests.test_objectives_laws import HIGH, LOW

STOP, LONGEST = 0, 3
PREFIXES: list[tuple[int, ...]] = [p for n in range(LONGEST) for p in itertools.product((1, 2), repeat=n)]
ANSWERS: list[tuple[int, ...]] = [
    (*p, token) for p in PREFIXES for token in range(3) if token == STOP or len(p) == LONGEST - 1
]
LENGTHS = torch.tensor([len(a) for a in ANSWERS])
MASK = torch.arange(LONGEST) < LENGTHS.unsqueeze(1)  # (15, 3)
STATES = torch.tensor([[PREFIXES.index(a[:t]) if t < len(a) else 0 for t in range(LONGEST)] for a in ANSWERS])
TOKENS = torch.tensor([[a[t] if t < len(a) else 0 for t in range(LONGEST)] for a in ANSWERS])

Gradient = list[torch.Tensor]
Estimator = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Case:
    """A policy, another one, rewards for each answer, and the numbers a test needs of them."""

    parameters: Gradient
    logits: torch.Tensor  # (7, 3), a function of the parameters
    other: torch.Tensor  # (7, 3): a reference, or a sampler that is not the learner
    rewards: torch.Tensor  # (15,)

    @property
    def logp(self) -> torch.Tensor:
        return by_token(self.logits)

    @property
    def chance(self) -> torch.Tensor:
        return self.logp.sum(1).exp()

    def gradient(self, value: torch.Tensor) -> Gradient:
        found = torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def exact(self, rewards: torch.Tensor | None = None) -> Gradient:
        """The gradient of the expected reward."""
        return self.gradient((self.chance * (self.rewards if rewards is None else rewards)).sum())


def by_token(logits: torch.Tensor) -> torch.Tensor:
    """Logits (7, 3) → each answer's log-probabilities (15, 3), 0 behind its end."""
    return torch.where(MASK, logits.log_softmax(1)[STATES, TOKENS], 0)


def visits(logits: torch.Tensor) -> torch.Tensor:
    """How likely a policy is to come through each prefix (7,)."""
    at = [STATES.eq(s) & MASK for s in range(len(PREFIXES))]
    return torch.stack([(by_token(logits).sum(1).exp() * hit.any(1)).sum() for hit in at])


def action_values(logits: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Q (7, 3): the expected reward after each prefix and token, under the policy from there on."""
    chance = by_token(logits).sum(1).exp()
    out = torch.zeros(len(PREFIXES), 3, dtype=torch.float64)
    for s, token in itertools.product(range(len(PREFIXES)), range(3)):
        hit = (STATES.eq(s) & TOKENS.eq(token) & MASK).any(1)
        out[s, token] = (chance * rewards * hit).sum() / (chance * hit).sum()
    return out


def make(kind: str, seed: int, binary: bool = False) -> Case:
    draw = np.random.default_rng(seed)
    normal = lambda *shape: torch.tensor(draw.normal(0, 1, shape))
    if kind == "table":
        parameters = [normal(7, 3).requires_grad_()]
        logits = parameters[0] * 1.0
    else:
        features = normal(7, 4)
        parameters = [normal(4, 5).requires_grad_(), normal(5, 3).requires_grad_()]
        logits = (features @ parameters[0]).tanh() @ parameters[1]
    rewards = torch.tensor(draw.integers(0, 2, 15)).double() if binary else normal(15)
    return Case(parameters, logits, normal(7, 3), rewards)


def assert_equal(ours: Gradient, theirs: Gradient) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def times(factor: float, gradient: Gradient) -> Gradient:
    return [factor * g for g in gradient]


def of_groups(case: Case, estimator: Estimator, size: int) -> Gradient:
    """The mean over all groups of `size` answers of 1/G Σ A ∇ log π."""
    groups = torch.tensor(list(itertools.product(range(15), repeat=size)))  # (15^G, G)
    chance = case.chance.detach()[groups].prod(1)
    advantages = estimator(case.rewards[groups])
    return case.gradient((chance.unsqueeze(1) * advantages * case.logp.sum(1)[groups]).sum() / size)


policies = pytest.mark.parametrize(("kind", "seed"), [("table", 0), ("table", 1), ("network", 2)])
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@policies
def test_the_answers_are_all_there_are(kind: str, seed: int) -> None:
    case = make(kind, seed)
    assert len(set(ANSWERS)) == 15 and case.chance.sum().item() == pytest.approx(1)
    assert visits(case.logits)[0].item() == pytest.approx(1)
    values = (case.logits.softmax(1) * action_values(case.logits, case.rewards)).sum(1)
    assert values[0].item() == pytest.approx((case.chance * case.rewards).sum().item())


# --- one answer at a time ----------------------------------------------------------------------------------------


@policies
@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_every_policy_loss_expects_the_exact_policy_gradient(kind: str, name: str, seed: int, baseline: float) -> None:
    """On-policy, summed over tokens; a baseline that does not depend on the answer changes nothing."""
    case = make(kind, seed)
    advantages = (case.rewards - baseline).unsqueeze(1).expand(15, 3)
    loss, _ = POLICY_LOSSES[name](case.logp, case.logp.detach(), advantages, MASK, LOW, HIGH)
    assert_equal(case.gradient(-(case.chance.detach() * loss.sum(1)).sum()), case.exact())


@policies
def test_remax_is_unbiased_because_the_greedy_answer_is_not_the_sampled_one(kind: str, seed: int) -> None:
    case = make(kind, seed)
    greedy: tuple[int, ...] = ()
    while greedy not in ANSWERS:
        greedy += (int(case.logits[PREFIXES.index(greedy)].argmax()),)
    baseline = case.rewards[ANSWERS.index(greedy)].view(1, 1)
    assert_equal(of_groups(case, lambda r: minus_baseline(r, baseline.expand(len(r), 1)), 1), case.exact())


AGGREGATED_AS_IF: dict[str, torch.Tensor] = {  # reward × this is what a batch of one answer maximises
    "token-mean": 1 / LENGTHS,
    "seq-mean-token-mean": 1 / LENGTHS,
    "seq-mean-token-sum": torch.ones(15),
    "constant": torch.full((15,), 1 / LONGEST, dtype=torch.float64),
}


@policies
@pytest.mark.parametrize("how", AGGREGATED_AS_IF)
def test_dividing_by_the_length_is_maximising_reward_per_token(kind: str, how: str, seed: int) -> None:
    """Weights of one answer alone. Only the two that do not look at its length keep the direction."""
    case = make(kind, seed)
    weights = torch.cat([token_weights(MASK[i : i + 1], how, LONGEST) for i in range(15)]).double()
    loss, _ = reinforce(case.logp, case.logp, case.rewards.unsqueeze(1).expand(15, 3), MASK, 0, 0)
    ours = case.gradient(-(case.chance.detach() * (weights * loss).sum(1)).sum())
    for a, b in zip(ours, case.exact(case.rewards * AGGREGATED_AS_IF[how]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # weights are float32


@policies
def test_the_token_mean_of_a_batch_divides_by_the_expected_length_of_the_batch(kind: str, seed: int) -> None:
    """Two answers: an answer of length n is worth 2 E[1 / (n + m)] times its reward, m the other's length."""
    case = make(kind, seed)
    pairs = torch.tensor(list(itertools.product(range(15), repeat=2)))
    chance, logp = case.chance.detach(), case.logp.sum(1)
    total = LENGTHS[pairs].sum(1)
    both = chance[pairs].prod(1) * (case.rewards[pairs] * logp[pairs]).sum(1) / total
    worth = 2 * (chance / (LENGTHS.unsqueeze(1) + LENGTHS)).sum(1)
    assert_equal(case.gradient(both.sum()), case.exact(case.rewards * worth))


# --- groups ------------------------------------------------------------------------------------------------------


@policies
@pytest.mark.parametrize("size", [2, 3])
def test_leaving_one_out_is_exact_and_the_groups_mean_shrinks_by_one_in_g(kind: str, size: int, seed: int) -> None:
    case = make(kind, seed)
    assert_equal(of_groups(case, leave_one_out, size), case.exact())
    assert_equal(of_groups(case, group_relative, size), times((size - 1) / size, case.exact()))


@seeds
def test_the_batchs_mean_shrinks_by_one_in_the_batchs_size(seed: int) -> None:
    case = make("table", seed)
    each = lambda rewards: torch.cat([batch_relative(row, "none") for row in rewards.split(1)])
    assert_equal(of_groups(case, each, 2), times(1 / 2, case.exact()))


@policies
@pytest.mark.parametrize(("std", "scale"), [("sample", math.sqrt(1 / 2)), ("population", 1.0), ("batch", None)])
def test_a_pair_divided_by_its_deviation_maximises_wins_not_reward(
    kind: str, std: str, scale: float | None, seed: int
) -> None:
    """G = 2: what remains of the rewards is which is larger. "batch" divides all pairs by one number: no bias."""
    case = make(kind, seed)
    ours = of_groups(case, lambda r: group_relative(r, std), 2)
    if scale is None:
        pairs = torch.tensor(list(itertools.product(range(15), repeat=2)))
        assert_equal(ours, times(1 / (2 * case.rewards[pairs].std().item()), case.exact()))
        return
    wins = (case.chance.detach() * (case.rewards.unsqueeze(1) - case.rewards).sign()).sum(1)  # wins minus losses
    assert_equal(ours, times(scale, case.exact(wins)))


BINARY: dict[str, Estimator] = {
    "none": group_relative,
    "sample": lambda r: group_relative(r, "sample"),
    "population": lambda r: group_relative(r, "population"),
    "trl": lambda r: group_relative(r, "sample", 1e-4),
    "leave-one-out": leave_one_out,
    "max-rl": max_rl,
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("size", [2, 3])
@seeds
def test_with_rewards_0_and_1_every_estimator_rescales_the_task_by_its_success_rate(
    name: str, size: int, seed: int
) -> None:
    """The factor is Σ_k Binomial(k; G − 1, p) · (a success's advantage − a failure's) with k successes beside it."""
    case = make("table", seed, binary=True)
    p = (case.chance * case.rewards).sum().item()
    factor = 0.0
    for k in range(size):
        beside = [1.0] * k + [0.0] * (size - 1 - k)
        success, failure = (
            BINARY[name](torch.tensor([[first, *beside]], dtype=torch.float64))[0, 0].item() for first in (1.0, 0.0)
        )
        factor += math.comb(size - 1, k) * p**k * (1 - p) ** (size - 1 - k) * (success - failure)
    assert_equal(of_groups(case, BINARY[name], size), times(factor, case.exact()))


@policies
@pytest.mark.parametrize("size", [2, 3])
def test_max_rl_maximises_a_harmonic_mixture_of_pass_at_k(kind: str, size: int, seed: int) -> None:
    """pass@1 + pass@2 / 2 + … up to G − 1, terms of log p's series; the average over successes alone has G of them."""
    case = make(kind, seed, binary=True)
    failure = 1 - (case.chance * case.rewards).sum()
    terms = torch.stack([(1 - failure**k) / k for k in range(1, size + 1)])
    assert_equal(of_groups(case, max_rl, size), case.gradient(terms[:-1].sum()))
    of_successes: Estimator = lambda r: r / r.mean(1, keepdim=True).where(r.any(1, keepdim=True), 1)
    assert_equal(of_groups(case, of_successes, size), case.gradient(terms.sum()))


# --- rewards per token, returns and critics ----------------------------------------------------------------------


def of_tokens(case: Case, advantages: torch.Tensor) -> Gradient:
    """The mean over all answers of Σ_t A_t ∇ log π_t."""
    return case.gradient((case.chance.detach() * (torch.where(MASK, advantages, 0) * case.logp).sum(1)).sum())


@policies
@pytest.mark.parametrize("coef", [0.0, 0.1, 2.0])
def test_a_kl_in_the_reward_gives_the_exact_gradient_of_reward_minus_kl(kind: str, seed: int, coef: float) -> None:
    """With k1 per token and rewards to go; also with a critic that is wrong, as long as λ is 1."""
    case = make(kind, seed)
    k1 = kl(case.logp, by_token(case.other), "k1")
    exact = case.gradient((case.chance * (case.rewards - coef * k1.sum(1))).sum())
    rewards = token_rewards(case.rewards, k1.detach(), MASK, coef)
    assert_equal(of_tokens(case, returns_to_go(rewards, MASK, 1.0)), exact)
    wrong = case.other[:, 0][STATES]
    assert_equal(of_tokens(case, gae(rewards, wrong, MASK, 1.0, 1.0)[0]), exact)


@policies
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_with_a_true_critic_gae_is_exact_for_every_lambda(kind: str, lam: float, seed: int) -> None:
    case = make(kind, seed)
    true = (case.logits.softmax(1) * action_values(case.logits, case.rewards)).sum(1).detach()
    rewards = token_rewards(case.rewards, torch.zeros(15, 3), MASK, 0.0)
    assert_equal(of_tokens(case, gae(rewards, true[STATES], MASK, 1.0, lam)[0]), case.exact())


@policies
def test_with_a_wrong_critic_and_lambda_0_the_critics_belief_replaces_the_future(kind: str, seed: int) -> None:
    """Σ_s d(s) Σ_a ∇π(a | s) · (the critic's value of s a, or the reward where the answer ends)."""
    case = make(kind, seed)
    belief = case.other[:, 0]
    after = torch.zeros(7, 3, dtype=torch.float64)
    for s, token in itertools.product(range(7), range(3)):
        answer = (*PREFIXES[s], token)
        ends = answer in ANSWERS
        after[s, token] = case.rewards[ANSWERS.index(answer)] if ends else belief[PREFIXES.index(answer)]
    rewards = token_rewards(case.rewards, torch.zeros(15, 3), MASK, 0.0)
    ours = of_tokens(case, gae(rewards, belief[STATES], MASK, 1.0, 0.0)[0])
    stated = (visits(case.logits).detach() * (case.logits.softmax(1) * after).sum(1)).sum()
    assert_equal(ours, case.gradient(stated))


# --- KL in the loss ----------------------------------------------------------------------------------------------


def per_state_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) at each of the 7 prefixes."""
    return (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)


@policies
def test_what_each_kl_estimator_does_to_a_loss(kind: str, seed: int) -> None:
    """k1: nothing. k2, k3+: the reverse KL at the prefixes visited. k3: the forward KL there."""
    case = make(kind, seed)
    seen = visits(case.logits).detach()
    reverse = case.gradient((seen * per_state_kl(case.logits, case.other)).sum())
    forward = case.gradient((seen * per_state_kl(case.other, case.logits)).sum())
    nothing = times(0.0, reverse)
    for how, expected in {"k1": nothing, "k2": reverse, "k3": forward, "k3+": reverse}.items():
        loss = torch.where(MASK, kl(case.logp, by_token(case.other), how), 0).sum(1)
        assert_equal(case.gradient((case.chance.detach() * loss).sum()), expected)


@policies
@pytest.mark.parametrize("how", ["k1", "k3", "k3+"])
def test_what_a_kl_estimator_reads_is_the_kl_between_whole_answers(kind: str, how: str, seed: int) -> None:
    case = make(kind, seed)
    read = (case.chance * kl(case.logp, by_token(case.other), how).sum(1)).sum()
    whole = (case.chance * (case.chance.log() - by_token(case.other).sum(1))).sum()
    assert read.item() == pytest.approx(whole.item(), abs=1e-12)


@policies
def test_a_kl_in_the_loss_leaves_out_which_prefixes_are_visited(kind: str, seed: int) -> None:
    """∇ KL of whole answers = the per-prefix gradient of k2 + Σ_s ∇d(s) KL_s; only a KL in the reward has both."""
    case = make(kind, seed)
    whole = case.gradient((case.chance * (case.chance.log() - by_token(case.other).sum(1))).sum())
    in_loss = case.gradient((case.chance.detach() * kl(case.logp, by_token(case.other), "k2").sum(1)).sum())
    left_out = case.gradient((visits(case.logits) * per_state_kl(case.logits, case.other).detach()).sum())
    assert_equal(whole, [a + b for a, b in zip(in_loss, left_out, strict=True)])


# --- another sampler ---------------------------------------------------------------------------------------------


def from_sampler(case: Case, weight: torch.Tensor) -> Gradient:
    """The mean over answers of `other` of Σ_t w_t R ∇ log π_t."""
    loss, _ = reinforce(case.logp, case.logp, case.rewards.unsqueeze(1).expand(15, 3), MASK, 0, 0)
    return case.gradient(-(by_token(case.other).sum(1).exp() * (weight * loss).sum(1)).sum())


@policies
def test_the_exact_row_weight_gives_the_on_policy_gradient_from_another_sampler(kind: str, seed: int) -> None:
    case = make(kind, seed)
    for how in ("sequence-sum-truncate", "sequence-sum-mask"):
        weight = is_correction(case.logp, by_token(case.other), MASK, 1e9, how)
        assert_equal(from_sampler(case, weight), case.exact())


@policies
@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0])
def test_a_bounded_row_weight_learns_from_the_part_of_the_policy_the_sampler_covers(
    kind: str, cap: float, seed: int
) -> None:
    """Truncated: as if an answer had probability min(π, cap · μ). Masked: as if those beyond the cap had none."""
    case = make(kind, seed)
    chance, sampler, score = case.chance.detach(), by_token(case.other).sum(1).exp(), case.logp.sum(1)
    parts = {
        "sequence-sum-truncate": torch.minimum(chance, cap * sampler),
        "sequence-sum-mask": torch.where(chance <= cap * sampler, chance, 0),
    }
    for how, part in parts.items():
        weight = is_correction(case.logp, by_token(case.other), MASK, cap, how)
        assert_equal(from_sampler(case, weight), case.gradient((part * case.rewards * score).sum()))


@policies
def test_a_token_weight_corrects_the_token_but_not_where_it_stands_or_what_follows(kind: str, seed: int) -> None:
    """Σ_s d_μ(s) Σ_a ∇π(a | s) Q_μ(s, a): prefixes and futures stay the sampler's. The ratio loss is the same."""
    case = make(kind, seed)
    futures = action_values(case.other, case.rewards)
    stated = case.gradient((visits(case.other) * (case.logits.softmax(1) * futures).sum(1)).sum())
    weight = is_correction(case.logp, by_token(case.other), MASK, 1e9, "token-truncate")
    assert_equal(from_sampler(case, weight), stated)
    advantages = case.rewards.unsqueeze(1).expand(15, 3)
    surrogate, _ = importance(case.logp, by_token(case.other), advantages, MASK, 0, 0)
    assert_equal(case.gradient(-(by_token(case.other).sum(1).exp() * surrogate.sum(1)).sum()), stated)


@policies
@pytest.mark.parametrize("name", sorted(POLICY_LOSSES.keys() - {"reinforce"}))
def test_at_the_policy_that_sampled_every_ratio_loss_needs_no_correction(kind: str, name: str, seed: int) -> None:
    case = make(kind, seed)
    for how in ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask", "sequence-sum-mask"):
        weight = is_correction(case.logp, case.logp.detach(), MASK, 1.0, how)
        advantages = case.rewards.unsqueeze(1).expand(15, 3)
        loss, _ = POLICY_LOSSES[name](case.logp, case.logp.detach(), advantages, MASK, LOW, HIGH)
        assert_equal(case.gradient(-(case.chance.detach() * (weight * loss).sum(1)).sum()), case.exact())
