"""Laws of advantages, token weights, log-probabilities and KL estimators."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from posttrain.objectives.advantages import (
    STDS,
    batch_relative,
    flat_groups,
    group_relative,
    leave_one_out,
    max_rl,
    minus_baseline,
    overlong_penalty,
)
from posttrain.objectives.tokens import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    kl,
    kl_k3,
    masked_mean,
    masked_var,
    select,
    token_logprobs,
    token_weights,
    whiten,
)
from tests import oracle
from tests.test_objectives_laws import MAX_LEN, SEEDS, given, ragged, weightings

# --- advantages --------------------------------------------------------------------------------------------------

Estimator = Callable[[torch.Tensor], torch.Tensor]
Groups = list[list[float]]

# name → ours and the oracle's; those in GROUPED compare an attempt with its own group only
ESTIMATORS: dict[str, tuple[Estimator, Callable[[Groups], np.ndarray]]] = {
    "false": (group_relative, oracle.group_relative),
    "true": (lambda r: group_relative(r, True), lambda r: oracle.group_relative(r, True)),
    "none": (lambda r: group_relative(r, "none"), lambda r: oracle.group_relative(r, "none")),
    "sample": (lambda r: group_relative(r, "sample"), lambda r: oracle.group_relative(r, "sample")),
    "population": (lambda r: group_relative(r, "population"), lambda r: oracle.group_relative(r, "population")),
    "trl": (lambda r: group_relative(r, "sample", 1e-4), lambda r: oracle.group_relative(r, "sample", 1e-4)),
    "verl": (lambda r: group_relative(r, "sample", 1e-6), lambda r: oracle.group_relative(r, "sample", 1e-6)),
    "leave-one-out": (leave_one_out, oracle.leave_one_out),
    "max-rl": (max_rl, oracle.max_rl),
    "batch": (lambda r: group_relative(r, "batch"), lambda r: oracle.group_relative(r, "batch")),
    "batch-relative": (batch_relative, oracle.batch_relative),
    "batch-population": (lambda r: batch_relative(r, "population"), lambda r: oracle.batch_relative(r, "population")),
    "batch-centred": (lambda r: batch_relative(r, "none"), lambda r: oracle.batch_relative(r, "none")),
}
GROUPED = list(ESTIMATORS)[:9]
estimators = pytest.mark.parametrize("name", ESTIMATORS)
grouped = pytest.mark.parametrize("name", GROUPED)
REWARDS = st.lists(
    st.lists(st.one_of(st.floats(0, 10, width=32), st.just(math.nan)), min_size=4, max_size=4), min_size=1, max_size=5
)


def estimate(name: str, rewards: torch.Tensor) -> torch.Tensor:
    return ESTIMATORS[name][0](rewards)


@estimators
@given(SEEDS)
def test_advantages_agree_with_the_oracle(name: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    levels = [0.0, 0.1, 0.5, 1.0, 2.5] if name == "max-rl" else [0.0, 0.1, 0.5, 1.0, -2.5]
    rewards = np.where(draw.random((6, 4)) < 0.2, np.nan, draw.choice(levels, (6, 4)))
    ours = estimate(name, torch.tensor(rewards))
    np.testing.assert_allclose(ours.numpy(), ESTIMATORS[name][1](rewards.tolist()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"max-rl"}))
@given(st.lists(st.lists(st.integers(-8, 8), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(-100, 100))
def test_adding_a_constant_to_all_rewards_changes_nothing(name: str, rewards: list[list[int]], shift: int) -> None:
    """Not so for MaxRL, whose divisor is the mean reward."""
    base = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(estimate(name, base + shift), estimate(name, base), rtol=0, atol=1e-12)


@grouped
@given(st.floats(0, 1e6, width=32), st.integers(2, 33))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_a_group_of_equal_rewards_gets_exactly_zero(
    name: str, dtype: torch.dtype, reward: float, attempts: int
) -> None:
    """Also for numbers such as 0.1, whose mean over 3 is not 0.1 in floating point."""
    for value in (reward, 0.1, 1 / 3, 1e-8, 16777217.0, -0.1 if name != "max-rl" else 0.0):
        rewards = torch.full((2, attempts), value, dtype=dtype)
        rewards[1] = torch.arange(attempts)
        assert estimate(name, rewards)[0].eq(0).all() and estimate(name, rewards)[1].ne(0).any()
        assert flat_groups(rewards).tolist() == [True, False]


@estimators
@given(st.floats(0, 1e6, width=32), st.integers(2, 33))
def test_a_batch_of_equal_rewards_gets_exactly_zero(name: str, reward: float, attempts: int) -> None:
    for value in (reward, 0.1, 1 / 3, 1e-8, 16777217.0):
        assert estimate(name, torch.full((3, attempts), value)).eq(0).all()


@estimators
@given(REWARDS)
def test_advantages_are_finite_sum_to_zero_and_order_like_rewards(name: str, rewards: Groups) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    advantages = estimate(name, table)
    assert advantages.isfinite().all() and advantages[~table.isfinite()].eq(0).all()
    total = advantages.sum(1) if name in GROUPED or name == "batch" else advantages.sum()
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-9)
    for row, adv in zip(table, advantages, strict=True):
        order = row[row.isfinite()].argsort()
        assert (adv[row.isfinite()][order].diff() >= 0).all()


@grouped
@given(REWARDS)
def test_an_unscored_attempt_is_as_if_it_had_not_been_made(name: str, rewards: Groups) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    for row, adv in zip(table, estimate(name, table), strict=True):
        scored = row.isfinite()
        assert adv[~scored].eq(0).all()
        if scored.sum() >= 2:
            torch.testing.assert_close(adv[scored], estimate(name, row[scored].unsqueeze(0))[0], rtol=1e-12, atol=1e-12)
        else:
            assert adv.eq(0).all()


@pytest.mark.parametrize("name", ["true", "sample", "population"])
@given(REWARDS)
def test_divided_by_its_own_deviation_a_group_has_variance_one(name: str, rewards: Groups) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    advantages = estimate(name, table)
    for row, adv, flat in zip(table, advantages, flat_groups(table), strict=True):
        scored = row[row.isfinite()]
        if not flat and scored.max() - scored.min() > 1e-6:
            variance = adv[row.isfinite()].var(correction=0 if name == "population" else 1)
            torch.testing.assert_close(variance, torch.ones_like(variance))


@given(st.lists(st.lists(st.integers(0, 8), min_size=4, max_size=4), min_size=1, max_size=5))
def test_leaving_one_out_is_centring_times_n_over_n_minus_one(rewards: list[list[int]]) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(table), group_relative(table) * 4 / 3, rtol=0, atol=1e-12)


@given(st.integers(1, 15))
def test_max_rl_weighs_a_success_by_how_rare_it_is(successes: int) -> None:
    rewards = (torch.arange(16) < successes).double().unsqueeze(0)
    assert max_rl(rewards)[0].tolist() == pytest.approx([16 / successes - 1] * successes + [-1] * (16 - successes))


def test_max_rl_refuses_a_negative_reward() -> None:
    with pytest.raises(ValueError, match="got a reward of -0.5, but it divides by the group's mean"):
        max_rl(torch.tensor([[1.0, -0.5]]))


@given(REWARDS, st.floats(-3, 3))
def test_a_baseline_is_subtracted_where_both_are_known(rewards: Groups, baseline: float) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    known = table.isfinite()
    advantages = minus_baseline(table, torch.full((len(table), 1), baseline, dtype=torch.float64))
    assert torch.equal(advantages[known], table[known] - baseline) and advantages[~known].eq(0).all()
    assert minus_baseline(table, torch.full((len(table), 1), math.nan)).eq(0).all()
    assert minus_baseline(table[:, :1].nan_to_num(1.0), table[:, :1].nan_to_num(1.0)).eq(0).all()


@given(st.integers(0, 400), st.integers(1, 100), st.integers(0, 200))
def test_the_overlong_penalty_falls_from_zero_to_minus_one_over_the_buffer(length: int, buffer: int, more: int) -> None:
    longest = buffer + more
    penalty = overlong_penalty(torch.tensor([length, longest - buffer, longest, longest + 1]), longest, buffer)
    assert penalty[0].item() == pytest.approx(oracle.overlong_penalty(length, longest, buffer), abs=1e-6)
    assert penalty[1:].tolist() == [0, -1, -1]


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_an_overlong_buffer_that_does_not_fit_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match="expected between 1 and max_len = 10"):
        overlong_penalty(torch.tensor([5]), 10, buffer)


@pytest.mark.parametrize("estimator", [group_relative, leave_one_out, max_rl])
@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 2, 2)])
def test_a_group_of_one_or_a_table_of_another_shape_is_refused(estimator: Estimator, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\(prompts, completions\\) with at least 2"):
        estimator(torch.zeros(shape))


def test_an_unknown_standard_deviation_is_refused() -> None:
    with pytest.raises(ValueError, match=f"unknown std 'unbiased'; expected one of {', '.join(STDS)}"):
        group_relative(torch.zeros(1, 2), "unbiased")
    with pytest.raises(ValueError, match="unknown std 'batch'; expected 'none', 'sample' or 'population'"):
        batch_relative(torch.zeros(1, 2), "batch")


def test_flat_groups_are_those_whose_scored_rewards_are_equal() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, 1, 1], [0, 1, 0], [nan, 2, 2], [nan, nan, 0.5], [nan, nan, nan], [nan, 0, 1]])
    assert flat_groups(rewards).tolist() == [True, False, True, True, True, False]


# --- weights and means -------------------------------------------------------------------------------------------


@weightings
@given(SEEDS)
def test_weights_agree_with_the_oracle_and_are_zero_exactly_off_the_mask(how: str, seed: int) -> None:
    mask = ragged(seed).mask
    weights = token_weights(mask, how, MAX_LEN)
    np.testing.assert_allclose(weights.numpy(), oracle.token_weights(mask.numpy(), how, MAX_LEN), rtol=1e-6)
    assert torch.equal(weights > 0, mask)


@given(SEEDS)
def test_each_weighting_sums_to_what_it_promises(seed: int) -> None:
    mask = ragged(seed).mask
    lengths = mask.sum(1).float()
    rows = int((lengths > 0).sum())
    if not rows:
        assert all(token_weights(mask, how, MAX_LEN).eq(0).all() for how in AGGREGATIONS)
        return
    by_row = {how: token_weights(mask, how, MAX_LEN).sum(1) for how in AGGREGATIONS}
    torch.testing.assert_close(by_row["token-mean"], lengths / lengths.sum())
    torch.testing.assert_close(by_row["seq-mean-token-mean"], (lengths > 0).float() / rows)
    torch.testing.assert_close(by_row["seq-mean-token-sum"], lengths / rows)
    torch.testing.assert_close(by_row["constant"], lengths / (rows * MAX_LEN))


@weightings
@given(seed=SEEDS, extra=st.integers(1, 3))
def test_rows_without_a_trained_token_count_for_nothing(how: str, seed: int, extra: int) -> None:
    mask = ragged(seed).mask
    more = torch.cat([mask, torch.zeros(extra, mask.shape[1], dtype=torch.bool)])
    weights = token_weights(more, how, MAX_LEN)
    assert torch.equal(weights[: len(mask)], token_weights(mask, how, MAX_LEN))
    assert not weights[len(mask) :].any()


def test_an_unknown_weighting_or_a_constant_without_length_is_refused() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="unknown aggregate 'mean'; expected one of token-mean"):
        token_weights(mask, "mean")
    with pytest.raises(ValueError, match="divides by max_len"):
        token_weights(mask, "constant")


def test_a_masked_mean_ignores_what_is_masked_and_is_zero_over_nothing() -> None:
    values = torch.tensor([2.0, math.nan, 4.0, math.inf])
    assert masked_mean(values, torch.tensor([True, False, True, False])).item() == 3
    assert masked_mean(values, torch.zeros(4, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("bessel", [True, False])
@given(seed=SEEDS)
def test_whitening_agrees_with_the_oracle_whatever_is_masked(shift_mean: bool, bessel: bool, seed: int) -> None:
    b = ragged(seed)
    values = torch.where(b.mask, b.advantages * 3 + 1, math.nan)
    ours = whiten(values, b.mask, shift_mean, bessel)
    expected = oracle.whiten(values.numpy(), b.mask.numpy(), shift_mean, bessel)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)


@given(SEEDS)
def test_whitened_values_have_mean_zero_and_variance_one(seed: int) -> None:
    b = ragged(seed)
    if b.mask.sum() < 2:
        return
    for bessel in (True, False):
        white = whiten(b.advantages, b.mask, bessel=bessel, eps=0)
        assert masked_mean(white, b.mask).item() == pytest.approx(0, abs=1e-12)
        assert masked_var(white, b.mask, bessel).item() == pytest.approx(1)
        assert masked_mean(whiten(b.advantages, b.mask, False, bessel), b.mask).item() == pytest.approx(
            masked_mean(b.advantages, b.mask).item()
        )


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 9))
def test_equal_values_whiten_to_exactly_zero(value: float, count: int) -> None:
    values = torch.tensor([[value, 0.1][i % 2] for i in range(2 * count)]).reshape(count, 2)
    mask = torch.tensor([[True, False]]).expand(count, 2)
    for eps in (0.0, 1e-8):
        assert whiten(values, mask, eps=eps).eq(0).all()
        assert whiten(values, ~mask, eps=eps).eq(0).all()
    assert whiten(values, torch.zeros_like(mask)).eq(0).all()


# --- log-probabilities, entropy, KL ------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([0.5, 1.0, 1.7]))
def test_log_probabilities_and_entropies_agree_with_the_oracle(seed: int, temperature: float) -> None:
    draw = np.random.default_rng(seed)
    logits, tokens = draw.normal(0, 3, (2, 4, 6)), draw.integers(0, 6, (2, 4))
    ours = token_logprobs(torch.tensor(logits), torch.tensor(tokens), temperature)
    np.testing.assert_allclose(ours.numpy(), oracle.token_logprobs(logits, tokens, temperature), rtol=0, atol=1e-12)
    leaf = torch.tensor(logits[0], requires_grad=True)
    logp, entropy = select(leaf, torch.tensor(tokens[0]), temperature)
    expected = [oracle.entropy(row, temperature) for row in logits[0]]
    np.testing.assert_allclose(entropy.detach().numpy(), expected, rtol=0, atol=1e-12)
    slopes = [oracle.logprob_gradient(row, t, temperature) for row, t in zip(logits[0], tokens[0], strict=True)]
    np.testing.assert_allclose(torch.autograd.grad(logp.sum(), leaf)[0].numpy(), slopes, rtol=0, atol=1e-12)


def test_a_token_of_probability_zero_leaves_the_entropy_finite() -> None:
    logp, entropy = select(torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([0]))
    assert logp.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))


def test_half_precision_logits_are_widened_before_the_softmax() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    logp, entropy = select(logits, torch.tensor([0, 1, 2]))
    assert logp.dtype == entropy.dtype == torch.float32
    assert torch.equal(logp, select(logits.float(), torch.tensor([0, 1, 2]))[0])


@pytest.mark.parametrize("how", ["k2", "k3", "k3+"])
@given(st.floats(-50, 0), st.floats(-50, 0))
def test_k2_and_k3_are_never_negative_and_zero_only_for_equal_policies(how: str, logp: float, ref: float) -> None:
    value = kl(torch.tensor(logp, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64), how).item()
    assert value >= 0
    assert value > 0 or abs(logp - ref) < 1e-6


kinds = pytest.mark.parametrize("how", KL_ESTIMATORS)


@kinds
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_each_kl_estimator_is_zero_at_the_reference_and_agrees_with_the_oracle(
    how: str, logp: float, ref: float
) -> None:
    leaf = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    value = kl(leaf, torch.tensor(ref, dtype=torch.float64), how)
    expected, slope = oracle.KL_ESTIMATORS[how](logp, ref)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.autograd.grad(value, leaf)[0].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert kl(leaf, leaf, how).item() == 0


@pytest.mark.parametrize("how", ["k1", "k2", "k3"])
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_a_kl_estimators_gradient_agrees_with_finite_differences(how: str, logp: float, ref: float) -> None:
    leaf = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(ref, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl(x, fixed, how), (leaf,), atol=1e-4, rtol=1e-4)


@given(st.floats(-40, 0), st.floats(-40, 0))
def test_the_straight_through_k3_has_the_value_of_k3_and_the_gradient_of_k2(logp: float, ref: float) -> None:
    leaf, fixed = torch.tensor(logp, requires_grad=True), torch.tensor(ref)
    assert kl(leaf, fixed, "k3+").item() == kl(leaf, fixed, "k3").item()
    slopes = [torch.autograd.grad(kl(leaf, fixed, how), leaf)[0] for how in ("k3+", "k2")]
    assert torch.equal(slopes[0], slopes[1])


def test_an_unknown_kl_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'; expected one of k1, k2, k3, k3\\+"):
        kl(torch.zeros(1), torch.zeros(1), "k4")


def test_k3_stays_finite_in_fp32_where_the_reference_is_far_likelier() -> None:
    leaf = torch.tensor(-120.0, requires_grad=True)
    value = kl_k3(leaf, torch.tensor(-0.1))
    assert value.isfinite() and torch.autograd.grad(value, leaf)[0].isfinite()
