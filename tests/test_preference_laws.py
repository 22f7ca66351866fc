"""Laws of preference and reward objectives. A new pair loss joins by being in PAIR_LOSSES and needs an oracle line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from posttrain.objectives import reward
from posttrain.objectives.preference import (
    LENGTH_NORMALISED,
    PAIR_LOSSES,
    REFERENCE_FREE,
    WITH_NLL,
    implicit_rewards,
    kto,
    kto_baseline,
    log_odds,
    sequence_logp,
)
from tests import oracle_preference as oracle

losses = pytest.mark.parametrize("name", PAIR_LOSSES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
SEEDS = st.integers(0, 2**32 - 1)
BETAS = st.floats(0.01, 5.0)
POISON = [math.nan, math.inf, -math.inf, 1e4]


def given(
    *args: st.SearchStrategy, **kwargs: st.SearchStrategy
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis with 20 examples: there are many laws, and each runs for every loss."""
    return lambda test: settings(max_examples=20, deadline=None)(given_any(*args, **kwargs)(test))


@dataclass
class Pairs:
    """N pairs in float64: log-probabilities, labels and margins, each (N,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    label: torch.Tensor
    margin: torch.Tensor

    def loss(self, name: str, beta: float) -> torch.Tensor:
        return PAIR_LOSSES[name](
            self.chosen, self.rejected, self.ref_chosen, self.ref_rejected, beta, self.label, self.margin
        )

    def loss_and_gradients(self, name: str, beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, its gradient with respect to chosen, to rejected), each (N,)."""
        c, r = (x.clone().requires_grad_() for x in (self.chosen, self.rejected))
        loss = replace(self, chosen=c, rejected=r).loss(name, beta)
        up, down = torch.autograd.grad(loss.sum(), [c, r])
        return loss.detach(), up, down

    def oracle(self, name: str, beta: float) -> tuple[np.ndarray, ...]:
        c, r, ref_c, ref_r, label, margin = (x.numpy() for x in vars(self).values())
        return oracle.PAIR_LOSSES[name](c, r, ref_c, ref_r, beta, label, margin)


def draw_pairs(seed: int, pairs: int = 6) -> Pairs:
    """Random pairs; labels anywhere but within 0.05 of a tie, where the robust loss blows up; some margins are 0."""
    draw = np.random.default_rng(seed)
    chosen, rejected = -draw.exponential(2.0, (2, pairs)) - 1e-3
    ref_chosen, ref_rejected = chosen + draw.normal(0, 1, pairs), rejected + draw.normal(0, 1, pairs)
    label = np.where(draw.random(pairs) < 0.5, draw.uniform(0.55, 1.0, pairs), draw.uniform(0.0, 0.45, pairs))
    margin = draw.exponential(1.0, pairs) * (draw.random(pairs) < 0.5)
    return Pairs(*(torch.tensor(x) for x in (chosen, rejected, ref_chosen, ref_rejected, label, margin)))


def plain(chosen: list[float], rejected: list[float], label: float = 1.0, margin: float = 0.0) -> Pairs:
    """Pairs under a reference of zeros, with one label and one margin."""
    c, r = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    zeros = torch.zeros_like(c)
    return Pairs(c, r, zeros, zeros, zeros + label, zeros + margin)


def same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- every pair loss ---------------------------------------------------------------------------------------------


def test_the_oracle_knows_every_pair_loss() -> None:
    assert oracle.PAIR_LOSSES.keys() == PAIR_LOSSES.keys()


def test_what_the_trainer_reads_about_losses_names_real_ones() -> None:
    assert PAIR_LOSSES.keys() >= REFERENCE_FREE | LENGTH_NORMALISED | WITH_NLL


@losses
@given(SEEDS, BETAS)
def test_loss_and_gradients_agree_with_the_oracle(name: str, seed: int, beta: float) -> None:
    pairs = draw_pairs(seed)
    for ours, theirs in zip(pairs.loss_and_gradients(name, beta), pairs.oracle(name, beta), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)


@losses
@given(SEEDS)
def test_finite_differences_agree(name: str, seed: int) -> None:
    pairs = draw_pairs(seed, pairs=3)
    if name == "hinge":  # no derivative where β |h| = 1 + margin: stay off it
        gap = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
        near = (0.7 * gap.abs() - 1 - pairs.margin).abs() < 1e-3
        pairs = replace(pairs, margin=torch.where(near, pairs.margin + 0.1, pairs.margin))

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return replace(pairs, chosen=chosen, rejected=rejected).loss(name, 0.7)

    leaves = tuple(x.clone().requires_grad_() for x in (pairs.chosen, pairs.rejected))
    assert torch.autograd.gradcheck(loss, leaves)


@losses
@given(SEEDS, BETAS)
def test_row_order_is_irrelevant_and_rows_do_not_mix(name: str, seed: int, beta: float) -> None:
    pairs = draw_pairs(seed)
    order = torch.tensor(np.random.default_rng(seed).permutation(len(pairs.label)))
    mixed = Pairs(*(x[order] for x in vars(pairs).values()))
    alone = Pairs(*(x[2:3] for x in vars(pairs).values()))
    for ours, shuffled, one in zip(
        pairs.loss_and_gradients(name, beta),
        mixed.loss_and_gradients(name, beta),
        alone.loss_and_gradients(name, beta),
        strict=True,
    ):
        same(shuffled, ours[order])
        same(one, ours[2:3])


@losses
@given(SEEDS, BETAS)
def test_swapping_the_answers_and_the_label_changes_nothing(name: str, seed: int, beta: float) -> None:
    """Holds for every loss, margins included: a margin is what the better answer wins by, whichever that is."""
    p = draw_pairs(seed)
    swapped = Pairs(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, 1 - p.label, p.margin)
    loss, up, down = p.loss_and_gradients(name, beta)
    swapped_loss, swapped_up, swapped_down = swapped.loss_and_gradients(name, beta)
    same(swapped_loss, loss, 1e-9)
    same(swapped_up, down, 1e-9)
    same(swapped_down, up, 1e-9)


@losses
@dtypes
@pytest.mark.parametrize("label", [0.0, 0.3, 0.9, 1.0])
def test_loss_and_gradients_are_finite_at_extremes(name: str, dtype: torch.dtype, label: float) -> None:
    edge = [0.0, -1e-12, -1e-6, -0.5, -90.0, -1e4]
    every = [(c, r) for c in edge for r in edge]
    pairs = plain([c for c, _ in every], [r for _, r in every], label, margin=0.5)
    pairs = Pairs(*(x.to(dtype) for x in vars(pairs).values()))
    for beta in (0.01, 1.0, 10.0):
        assert all(x.isfinite().all() for x in pairs.loss_and_gradients(name, beta))


@losses
@given(SEEDS, BETAS)
def test_a_sure_label_pushes_chosen_up_and_rejected_down(name: str, seed: int, beta: float) -> None:
    """Until it is won: the hinge then stops, IPO past its optimum turns round; sigmoids only fade."""
    p = draw_pairs(seed)
    p = replace(p, label=torch.ones_like(p.label))
    _, up, down = p.loss_and_gradients(name, beta)
    gap = (p.chosen - p.ref_chosen) - (p.rejected - p.ref_rejected)
    wanted = {"ipo": (0.5 + p.margin) / beta, "hinge": (1 + p.margin) / beta}.get(name)
    short = torch.ones_like(gap, dtype=torch.bool) if wanted is None else gap < wanted - 1e-6
    assert (up[short] < 0).all() and (down[short] > 0).all()
    if wanted is not None:
        beyond = gap > wanted + 1e-6
        assert (up[beyond] > 0).all() if name == "ipo" else not up[beyond].any()


@losses
@given(SEEDS, BETAS)
def test_only_losses_with_a_reference_read_it(name: str, seed: int, beta: float) -> None:
    p = draw_pairs(seed)
    moved = replace(p, ref_chosen=p.ref_chosen + 0.1)
    assert torch.equal(moved.loss(name, beta), p.loss(name, beta)) == (name in REFERENCE_FREE)


@losses
@given(SEEDS, BETAS, st.floats(-50, 50))
def test_only_the_difference_of_the_answers_matters(name: str, seed: int, beta: float, shift: float) -> None:
    """Except to ORPO, whose odds depend on how likely the answers are."""
    p = draw_pairs(seed)
    moved = replace(p, chosen=p.chosen + shift, rejected=p.rejected + shift)
    if name != "orpo":
        same(moved.loss(name, beta), p.loss(name, beta), 1e-9)
    elif shift < -0.1:
        assert not torch.equal(moved.loss(name, beta), p.loss(name, beta))


@losses
@given(st.floats(-20, -0.01), st.floats(0, 3), BETAS)
def test_a_tie_of_equal_answers_has_no_gradient(name: str, logp: float, margin: float, beta: float) -> None:
    pairs = plain([logp], [logp], label=0.5, margin=margin)
    if name == "robust":  # a tie means labels that are noise alone, of which nothing can be made
        with pytest.raises(ValueError, match="got a label of 0.5"):
            pairs.loss(name, beta)
        return
    _, up, down = pairs.loss_and_gradients(name, beta)
    assert (up.item(), down.item()) == (0, 0)


@losses
@given(SEEDS, BETAS, st.floats(0, 3))
def test_a_margin_is_a_handicap_of_the_better_answer(name: str, seed: int, beta: float, margin: float) -> None:
    """For a sure label, asking for m more is the same as the gap being m / β less (for ORPO, the log odds being m)."""
    p = draw_pairs(seed)
    p = replace(p, label=torch.ones_like(p.label))
    asked = replace(p, margin=p.margin + margin).loss(name, beta)
    if name == "orpo":
        lead = log_odds(p.chosen) - log_odds(p.rejected) - p.margin - margin
        same(asked, -beta * torch.nn.functional.logsigmoid(lead))
    else:
        same(asked, replace(p, chosen=p.chosen - margin / beta).loss(name, beta), 1e-9)


@losses
@given(SEEDS, BETAS)
def test_a_soft_label_is_the_expectation_over_which_answer_is_better(name: str, seed: int, beta: float) -> None:
    """The robust loss is the exception, and its purpose: there the expectation of the soft loss is the sure one."""
    p = draw_pairs(seed)
    ones = torch.ones_like(p.label)
    sure = replace(p, label=ones)
    flipped = Pairs(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, ones, p.margin)
    if name == "robust":
        wrong_way = replace(flipped, label=p.label)
        noisy = p.label * p.loss(name, beta) + (1 - p.label) * wrong_way.loss(name, beta)
        same(noisy, sure.loss("sigmoid", beta), 1e-8)
    else:
        same(p.loss(name, beta), p.label * sure.loss(name, beta) + (1 - p.label) * flipped.loss(name, beta))


# --- single losses -----------------------------------------------------------------------------------------------


@dtypes
@given(SEEDS, BETAS, st.floats(0, 1))
def test_dpo_at_the_reference_is_ln_2_whatever_the_label(
    dtype: torch.dtype, seed: int, beta: float, label: float
) -> None:
    p = draw_pairs(seed)
    p = Pairs(*(x.to(dtype) for x in vars(p).values()))
    p = replace(p, ref_chosen=p.chosen, ref_rejected=p.rejected, label=p.label * 0 + label, margin=p.margin * 0)
    loss, up, _ = p.loss_and_gradients("sigmoid", beta)
    same(loss, torch.full_like(loss, math.log(2)), 1e-6 if dtype == torch.float32 else 1e-15)
    same(up, torch.full_like(up, -beta * (label - 0.5)), 1e-6)
    assert all(not r.any() for r in implicit_rewards(p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, beta))


@given(SEEDS, BETAS)
def test_dpo_is_bradley_terry_on_the_implicit_rewards(seed: int, beta: float) -> None:
    p = draw_pairs(seed)
    rewards = implicit_rewards(p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, beta)
    same(p.loss("sigmoid", beta), reward.bradley_terry(*rewards, p.label, p.margin))


@given(SEEDS, BETAS)
def test_cpo_is_dpo_with_a_uniform_reference_and_simpo_is_cpo_on_means(seed: int, beta: float) -> None:
    p = draw_pairs(seed)
    uniform = replace(p, ref_chosen=p.chosen * 0 - 3, ref_rejected=p.rejected * 0 - 3)
    same(p.loss("cpo", beta), uniform.loss("sigmoid", beta))
    assert torch.equal(p.loss("cpo", beta), p.loss("simpo", beta))


def test_implicit_rewards_carry_no_gradient() -> None:
    leaf = torch.zeros(2, requires_grad=True)
    assert not any(r.requires_grad for r in implicit_rewards(leaf, leaf, leaf, leaf, 0.1))


@given(BETAS, st.floats(0, 1), st.floats(-30, 30))
def test_ipo_is_least_at_its_optimum(beta: float, label: float, gap: float) -> None:
    best = (2 * label - 1) / (2 * beta)
    loss, up, _ = plain([best - 100, best - 100 + gap], [-100.0, -100.0], label).loss_and_gradients("ipo", beta)
    assert abs(up[0].item()) < 1e-9 and loss[0] <= loss[1] + 1e-9
    same(loss[1] - loss[0], torch.tensor(gap, dtype=torch.float64) ** 2, 1e-8)  # a parabola of curvature 1 about it


@given(SEEDS, st.floats(0, 0.49), BETAS)
def test_the_robust_loss_is_unbiased_under_label_noise(seed: int, flips: float, beta: float) -> None:
    """A draw of 0/1 flips by enumeration: seen flipped with probability ε, the loss averages to the clean one."""
    p = draw_pairs(seed)
    p = replace(p, label=torch.full_like(p.label, 1 - flips))
    flipped = Pairs(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.label, p.margin)
    _, up, _ = p.loss_and_gradients("robust", beta)
    _, _, flipped_up = flipped.loss_and_gradients("robust", beta)
    clean, clean_up, _ = replace(p, label=torch.ones_like(p.label)).loss_and_gradients("sigmoid", beta)
    same((1 - flips) * p.loss("robust", beta) + flips * flipped.loss("robust", beta), clean, 1e-9)
    same((1 - flips) * up + flips * flipped_up, clean_up, 1e-9)


@given(st.floats(-60, -1e-6))
def test_log_odds_are_those_of_the_probability(logp: float) -> None:
    ours = log_odds(torch.tensor(logp, dtype=torch.float64)).item()
    assert ours == pytest.approx(logp - math.log(-math.expm1(logp)), rel=1e-12, abs=1e-12)


@given(SEEDS, st.booleans(), st.sampled_from(POISON))
def test_what_lies_outside_the_answer_is_not_read(seed: int, mean: bool, poison: float) -> None:
    draw = np.random.default_rng(seed)
    mask = torch.tensor(draw.random((4, 6)) < 0.5)
    mask[0] = False
    logp = torch.tensor(-draw.exponential(1.0, (4, 6)))
    leaf = torch.where(mask, logp, poison).requires_grad_()
    value = sequence_logp(leaf, mask, mean)
    gradient = torch.autograd.grad(value.sum(), leaf)[0]
    expected, slope = oracle.sequence_logp(logp.numpy(), mask.numpy(), mean)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-12)


# --- KTO ---------------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """N unpaired answers in float64, with the baseline and the weights of KTO."""

    logp: torch.Tensor
    ref: torch.Tensor
    desirable: torch.Tensor
    baseline: torch.Tensor
    beta: float = 0.3
    weights: tuple[float, float] = (1.0, 4 / 3)

    def loss_and_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = self.logp.clone().requires_grad_()
        loss = kto(leaf, self.ref, self.desirable, self.baseline, self.beta, *self.weights)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def draw_answers(seed: int) -> Answers:
    draw = np.random.default_rng(seed)
    logp = -draw.exponential(3.0, 8)
    ref, baseline = logp + draw.normal(0, 2, 8), torch.tensor(draw.normal(0, 1))
    return Answers(torch.tensor(logp), torch.tensor(ref), torch.arange(8) % 2 == 0, baseline.double())


@given(SEEDS, BETAS)
def test_kto_agrees_with_the_oracle_and_with_finite_differences(seed: int, beta: float) -> None:
    a = replace(draw_answers(seed), beta=beta)
    arrays = (a.logp.numpy(), a.ref.numpy(), a.desirable.numpy())
    expected = oracle.kto(*arrays, a.baseline.item(), beta, *a.weights)
    for ours, theirs in zip(a.loss_and_gradient(), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)
    leaf = a.logp.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kto(x, a.ref, a.desirable, a.baseline, beta, *a.weights), (leaf,))


@given(SEEDS)
def test_kto_pushes_desirable_answers_up_and_undesirable_down(seed: int) -> None:
    a = draw_answers(seed)
    loss, gradient = a.loss_and_gradient()
    assert (gradient[a.desirable] < 0).all() and (gradient[~a.desirable] > 0).all()
    most = torch.where(a.desirable, a.weights[0], a.weights[1])
    assert ((loss > 0) & (loss < most)).all()  # bounded, so that no one answer can rule a batch


@dtypes
def test_kto_saturates_both_ways_without_overflow(dtype: torch.dtype) -> None:
    logp = torch.tensor([-1e4, 0.0, -1e4, 0.0], dtype=dtype)
    a = Answers(logp, logp.flip(0), torch.tensor([True, True, False, False]), torch.zeros((), dtype=dtype), beta=1.0)
    loss, gradient = a.loss_and_gradient()
    same(loss, torch.tensor([1, 0, 0, 4 / 3], dtype=dtype), 1e-6)
    assert not gradient.any()


@given(SEEDS)
def test_kto_at_its_baseline_is_half_its_weight_with_the_steepest_gradient(seed: int) -> None:
    a = draw_answers(seed)
    z = a.baseline.clamp_min(0)
    at = replace(a, logp=a.ref + z)
    weight = torch.where(a.desirable, *torch.tensor(a.weights, dtype=torch.float64))
    loss, gradient = at.loss_and_gradient()
    same(loss, weight / 2)
    same(gradient.abs(), weight * a.beta / 4)
    assert (a.loss_and_gradient()[1].abs() <= gradient.abs() + 1e-15).all()


@given(SEEDS, st.floats(-50, 0))
def test_a_negative_kto_baseline_counts_as_zero(seed: int, baseline: float) -> None:
    a = draw_answers(seed)
    zero, negative = (replace(a, baseline=torch.tensor(z, dtype=torch.float64)) for z in (0.0, baseline))
    assert torch.equal(negative.loss_and_gradient()[0], zero.loss_and_gradient()[0])


def test_no_gradient_flows_through_the_kto_baseline() -> None:
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not kto_baseline(logp, torch.tensor([-3.0, -3.0])).requires_grad
    baseline = torch.tensor(0.5, requires_grad=True)
    kto(logp, logp.detach(), torch.tensor([True, False]), baseline, 0.1, 1.0, 1.0).sum().backward()
    assert baseline.grad is None and logp.grad is not None and logp.grad.all()


@given(SEEDS)
def test_the_kto_baseline_of_equal_parts_averages_to_that_of_the_whole(seed: int) -> None:
    """It may be negative in a part, which is why it is clamped only where it is used."""
    logp, ref = torch.tensor(np.random.default_rng(seed).normal(0, 1, (2, 8)))
    parts = [kto_baseline(logp[i : i + 4], ref[i : i + 4]) for i in (0, 4)]
    same((parts[0] + parts[1]) / 2, kto_baseline(logp, ref))
    assert kto_baseline(logp, ref).item() == pytest.approx(oracle.kto_baseline(logp.numpy(), ref.numpy()), abs=1e-12)


def test_a_kto_baseline_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no mismatched completions"):
        kto_baseline(torch.zeros(0), torch.zeros(0))


# --- reward models -----------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(-20, 20))
def test_bradley_terry_agrees_with_the_oracle_and_sees_only_differences(seed: int, shift: float) -> None:
    p = draw_pairs(seed)
    c, r = (x.clone().requires_grad_() for x in (p.chosen, p.rejected))
    loss = reward.bradley_terry(c, r, p.label, p.margin)
    gradients = torch.autograd.grad(loss.sum(), [c, r])
    expected = oracle.bradley_terry(*(x.numpy() for x in (p.chosen, p.rejected, p.label, p.margin)))
    for ours, theirs in zip((loss.detach(), *gradients), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)
    same(reward.bradley_terry(p.chosen + shift, p.rejected + shift, p.label, p.margin), loss.detach(), 1e-9)
    same(reward.bradley_terry(p.rejected, p.chosen, 1 - p.label, p.margin), loss.detach())


@given(st.floats(0.001, 0.999))
def test_bradley_terry_is_least_where_the_model_says_the_label(label: float) -> None:
    score = torch.tensor([math.log(label / (1 - label))], dtype=torch.float64, requires_grad=True)
    zero, target = torch.zeros(1, dtype=torch.float64), torch.tensor([label], dtype=torch.float64)
    loss = reward.bradley_terry(score, zero, target, zero)
    assert abs(torch.autograd.grad(loss.sum(), score)[0].item()) < 1e-12
    entropy = -label * math.log(label) - (1 - label) * math.log(1 - label)
    assert loss.item() == pytest.approx(entropy, rel=1e-9)


@dtypes
def test_scores_of_any_size_give_a_finite_bradley_terry_loss(dtype: torch.dtype) -> None:
    score = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    loss = reward.bradley_terry(score, -score.detach(), torch.tensor([0.3, 0.3, 0.3], dtype=dtype), score.detach() * 0)
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), score)[0].isfinite().all()


@given(SEEDS, st.floats(-20, 20))
def test_centring_fixes_the_zero_that_bradley_terry_leaves_free(seed: int, shift: float) -> None:
    p = draw_pairs(seed)
    c, r = (x.clone().requires_grad_() for x in (p.chosen + shift, p.rejected + shift))
    loss = reward.centring(c, r)
    expected = oracle.centring(c.detach().numpy(), r.detach().numpy())
    for ours, theirs in zip((loss.detach(), *torch.autograd.grad(loss.sum(), [c, r])), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)
    middle = (p.chosen + p.rejected) / 2
    assert reward.centring(p.chosen - middle, p.rejected - middle).max() < 1e-20


@given(SEEDS)
def test_binary_cross_entropy_agrees_with_the_oracle_at_any_scale(seed: int) -> None:
    draw = np.random.default_rng(seed)
    logits, targets = torch.tensor(draw.normal(0, 1, (3, 4)) * 10.0 ** draw.integers(-2, 5)), draw.random((3, 4))
    leaf = logits.clone().requires_grad_()
    loss = reward.binary(leaf, torch.tensor(targets))
    expected = oracle.binary(logits.numpy(), targets)
    for ours, theirs in zip((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)


def draw_steps(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (5, 6) and a mask with gaps; row 0 is full, row 1 empty."""
    draw = np.random.default_rng(seed)
    mask = torch.tensor(draw.random((5, 6)) < 0.6)
    mask[0], mask[1] = True, False
    return torch.tensor(draw.uniform(0, 1, (5, 6))), mask


@pytest.mark.parametrize("how", reward.STEP_AGGREGATIONS)
@pytest.mark.parametrize("poison", POISON, ids=str)
@given(seed=SEEDS)
def test_a_score_of_steps_agrees_with_the_oracle_and_reads_only_steps(how: str, poison: float, seed: int) -> None:
    probabilities, mask = draw_steps(seed)
    leaf = torch.where(mask, probabilities, poison).requires_grad_()
    score = reward.aggregate_steps(leaf, mask, how)
    gradient = torch.autograd.grad(score[mask.any(1)].sum(), leaf)[0]
    value, slope = oracle.aggregate_steps(probabilities.numpy(), mask.numpy(), how)
    np.testing.assert_allclose(score.detach().numpy(), value, rtol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-9, atol=1e-12)


@given(SEEDS)
def test_step_scores_are_ordered_and_equal_for_a_single_step(seed: int) -> None:
    probabilities, mask = draw_steps(seed)
    scores = {how: reward.aggregate_steps(probabilities, mask, how) for how in reward.STEP_AGGREGATIONS}
    some = mask.any(1)
    for low, high in (("product", "min"), ("min", "last"), ("min", "mean")):
        assert (scores[low][some] <= scores[high][some] + 1e-15).all()
    assert all(s[~some].isnan().all() for s in scores.values())
    single = reward.aggregate_steps
    for how in reward.STEP_AGGREGATIONS:
        same(single(probabilities[:, :1], torch.ones(5, 1, dtype=torch.bool), how), probabilities[:, 0])


@pytest.mark.parametrize("how", reward.ENSEMBLES)
@given(SEEDS, st.floats(0, 3))
def test_an_ensemble_agrees_with_the_oracle(how: str, seed: int, coef: float) -> None:
    scores = torch.tensor(np.random.default_rng(seed).normal(0, 2, (4, 5)))
    leaf = scores.clone().requires_grad_()
    value = reward.ensemble(leaf, how, coef)
    gradient = torch.autograd.grad(value.sum(), leaf)[0]
    for ours, theirs in zip((value.detach(), gradient), oracle.ensemble(scores.numpy(), how, coef), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)


@given(SEEDS, st.integers(1, 6), st.floats(0, 3), st.floats(-10, 10))
def test_the_laws_of_ensembles(seed: int, members: int, coef: float, shift: float) -> None:
    scores = torch.tensor(np.random.default_rng(seed).normal(0, 2, (members, 5)))
    mean, low = reward.ensemble(scores, "mean"), reward.ensemble(scores, "min")
    penalised = reward.ensemble(scores, "penalised", coef)
    assert (low <= mean + 1e-15).all() and (penalised <= mean + 1e-15).all()
    same(reward.ensemble(scores, "penalised", 0.0), mean)
    for how in reward.ENSEMBLES:
        value = reward.ensemble(scores, how, coef)
        same(reward.ensemble(scores[:1], how, coef), scores[0])  # one member is its own ensemble
        same(reward.ensemble(scores[:1].expand(3, 5), how, coef), scores[0])  # and so are members that agree
        same(reward.ensemble(scores.flip(0), how, coef), value)
        same(reward.ensemble(scores + shift, how, coef), value + shift, 1e-9)


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
@dtypes
@given(seed=SEEDS)
def test_calibration_error_agrees_with_the_oracle(bins: int, dtype: torch.dtype, seed: int) -> None:
    draw = np.random.default_rng(seed)
    probability = torch.tensor(np.concatenate([draw.random(30), np.arange(bins + 1) / bins]), dtype=torch.float64)
    outcome = torch.tensor(draw.choice([0.0, 0.5, 1.0], len(probability)))
    ours = reward.expected_calibration_error(probability.to(dtype), outcome.to(dtype), bins)
    error, counts = oracle.expected_calibration_error(probability.tolist(), outcome.tolist(), bins)
    assert ours.counts.tolist() == counts
    assert ours.error.item() == pytest.approx(error, abs=1e-12 if dtype == torch.float64 else 1e-6)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=8))
def test_a_perfectly_calibrated_table_has_no_calibration_error(groups: list[tuple[int, int]]) -> None:
    """Groups of n predictions of k / n, of which exactly k come true."""
    exact = [(n, min(k, n)) for n, k in groups]
    probability = torch.tensor([k / n for n, k in exact for _ in range(n)], dtype=torch.float64)
    outcome = torch.tensor([float(i < k) for n, k in exact for i in range(n)], dtype=torch.float64)
    table = reward.expected_calibration_error(probability, outcome)
    assert table.error.item() < 1e-12
    assert table.counts.sum() == len(probability)


def test_the_calibration_table_by_hand() -> None:
    """0.2 twice of which one came true, 0.9 thrice of which two: 0.4 · |0.5 − 0.2| + 0.6 · |2/3 − 0.9| = 0.26."""
    probability, outcome = torch.tensor([0.2, 0.9, 0.9, 0.2, 0.9]), torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    table = reward.expected_calibration_error(probability, outcome, bins=5)
    assert table.error.item() == pytest.approx(0.26, abs=1e-7)
    assert table.counts.tolist() == [0, 2, 0, 0, 3]
    np.testing.assert_allclose(table.confidence.numpy(), [math.nan, 0.2, math.nan, math.nan, 0.9], atol=1e-7)
    np.testing.assert_allclose(table.frequency.numpy(), [math.nan, 0.5, math.nan, math.nan, 2 / 3], atol=1e-7)


def test_what_cannot_be_scored_is_refused_in_a_sentence() -> None:
    half, mask = torch.full((2, 2), 0.5), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="unknown step aggregation 'median'; expected one of min, product, last, mean"):
        reward.aggregate_steps(half, mask, "median")
    with pytest.raises(ValueError, match="unknown ensemble 'max'; expected one of mean, min, penalised"):
        reward.ensemble(half, "max")
    for scores in ([1.5], [-0.1], [math.nan], []):
        with pytest.raises(ValueError, match="at least one prediction"):
            reward.expected_calibration_error(torch.tensor(scores), torch.ones(len(scores)))
    with pytest.raises(ValueError, match="bins=0"):
        reward.expected_calibration_error(half[0], half[0], bins=0)
