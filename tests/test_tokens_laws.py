"""Laws of advantages, token weights, log-probabilities and KL estimators."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from posttrain.objectives.advantages import flat_groups, group_relative
from posttrain.objectives.tokens import (
    AGGREGATIONS,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    select,
    token_logprobs,
    token_weights,
)
from tests import oracle
from tests.test_objectives_laws import MAX_LEN, SEEDS, given, ragged, weightings

# --- advantages --------------------------------------------------------------------------------------------------

REWARDS = st.lists(
    st.lists(st.one_of(st.floats(-10, 10, width=32), st.just(math.nan)), min_size=4, max_size=4), min_size=1, max_size=5
)
both = pytest.mark.parametrize("std", [False, True])


@both
@given(SEEDS)
def test_advantages_agree_with_the_oracle(std: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    rewards = np.where(draw.random((6, 4)) < 0.2, np.nan, draw.choice([0.0, 0.1, 0.5, 1.0, -2.5], (6, 4)))
    ours = group_relative(torch.tensor(rewards), std)
    np.testing.assert_allclose(ours.numpy(), oracle.group_relative(rewards.tolist(), std), rtol=0, atol=1e-12)


@both
@given(st.lists(st.lists(st.integers(-8, 8), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(-100, 100))
def test_adding_a_constant_to_a_groups_rewards_changes_nothing(std: bool, rewards: list[list[int]], shift: int) -> None:
    base = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(group_relative(base + shift, std), group_relative(base, std), rtol=0, atol=1e-12)


@both
@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 33))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_equal_rewards_give_exactly_zero(std: bool, dtype: torch.dtype, reward: float, attempts: int) -> None:
    """Also for numbers such as 0.1, whose mean over 3 is not 0.1 in floating point."""
    for value in (reward, 0.1, 1 / 3, 1e-8, 16777217.0):
        rewards = torch.full((2, attempts), value, dtype=dtype)
        assert group_relative(rewards, std).eq(0).all()
        assert flat_groups(rewards).all()


@both
@given(REWARDS)
def test_advantages_are_finite_sum_to_zero_and_order_like_rewards(std: bool, rewards: list[list[float]]) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_relative(table, std)
    assert advantages.isfinite().all()
    torch.testing.assert_close(advantages.sum(1), torch.zeros(len(table), dtype=torch.float64), rtol=0, atol=1e-9)
    for row, adv in zip(table, advantages, strict=True):
        order = row[row.isfinite()].argsort()
        assert (adv[row.isfinite()][order].diff() >= 0).all()


@both
@given(REWARDS)
def test_an_unscored_attempt_is_as_if_it_had_not_been_made(std: bool, rewards: list[list[float]]) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    for row, adv in zip(table, group_relative(table, std), strict=True):
        scored = row.isfinite()
        assert adv[~scored].eq(0).all()
        if scored.sum() >= 2:
            alone = group_relative(row[scored].unsqueeze(0), std)[0]
            torch.testing.assert_close(adv[scored], alone, rtol=0, atol=1e-12)
        else:
            assert adv.eq(0).all()


@given(REWARDS)
def test_with_std_the_scored_advantages_have_unit_sample_variance(rewards: list[list[float]]) -> None:
    table = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_relative(table, std=True)
    for row, adv, flat in zip(table, advantages, flat_groups(table), strict=True):
        scored = row[row.isfinite()]
        if not flat and scored.max() - scored.min() > 1e-6:
            torch.testing.assert_close(adv[row.isfinite()].var(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 2, 2)])
def test_a_group_of_one_or_a_table_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\(tasks, attempts\\) with 2 attempts or more"):
        group_relative(torch.zeros(shape))


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


@given(st.floats(-50, 0), st.floats(-50, 0))
def test_k3_is_never_negative_and_zero_only_for_equal_policies(logp: float, ref: float) -> None:
    value = kl_k3(torch.tensor(logp, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)).item()
    assert value >= 0
    assert value > 0 or abs(logp - ref) < 1e-6


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_each_kl_estimator_is_zero_on_policy_and_agrees_with_the_oracle(
    estimator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logp: float, ref: float
) -> None:
    leaf = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    value = estimator(leaf, torch.tensor(ref, dtype=torch.float64))
    expected, slope = getattr(oracle, estimator.__name__.removeprefix("kl_"))(logp, ref)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.autograd.grad(value, leaf)[0].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert estimator(leaf, leaf).item() == 0


@given(SEEDS)
def test_k1_and_k3_expect_the_exact_kl_over_a_whole_vocabulary(seed: int) -> None:
    logits, ref_logits = torch.tensor(np.random.default_rng(seed).normal(0, 1.5, (2, 5)))
    logp, ref = logits.log_softmax(0), ref_logits.log_softmax(0)
    exact = oracle.kl(logp.numpy(), ref.numpy())
    for estimator in (kl_k1, kl_k3):
        assert (logp.exp() * estimator(logp, ref)).sum().item() == pytest.approx(exact, abs=1e-12)


@given(SEEDS)
def test_the_expected_gradient_of_k2_is_the_gradient_of_the_exact_kl(seed: int) -> None:
    """Sampling is not differentiated: the probabilities are constants, as they are for a learner."""
    logits, ref_logits = torch.tensor(np.random.default_rng(seed).normal(0, 1.5, (2, 5)))
    leaf = logits.clone().requires_grad_()
    logp, ref = leaf.log_softmax(0), ref_logits.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), leaf, retain_graph=True)[0]
    expected = torch.autograd.grad((logp.detach().exp() * kl_k2(logp, ref)).sum(), leaf)[0]
    torch.testing.assert_close(expected, exact, rtol=0, atol=1e-12)
