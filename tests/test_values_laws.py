"""Laws of what a critic needs: per-token rewards, returns, GAE, the value loss and the KL controller."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from posttrain.objectives.advantages import returns_to_go
from posttrain.objectives.tokens import token_weights
from posttrain.objectives.values import adaptive_kl, gae, token_rewards, value_loss
from tests import oracle
from tests.test_objectives_laws import MAX_LEN, POISON, SEEDS, given, ragged, weightings

DISCOUNTS = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])


def critic(seed: int, rows: int = 4, length: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random rewards, values and mask (B, T), float64; rewards are on trained tokens only."""
    b = ragged(seed, rows, length)
    return torch.where(b.mask, b.advantages, 0), b.logp + 1, b.mask


def squeeze(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each row's trained entries moved to the front, zeros behind: the row with its gaps removed."""
    out = torch.zeros_like(tensor)
    for i, row in enumerate(mask):
        out[i, : int(row.sum())] = tensor[i, row]
    return out


# --- GAE and returns ---------------------------------------------------------------------------------------------


@given(SEEDS, DISCOUNTS, DISCOUNTS)
def test_gae_and_returns_agree_with_the_oracle(seed: int, gamma: float, lam: float) -> None:
    """Here rewards are anywhere, also on untrained positions."""
    b = ragged(seed)
    rewards, values, mask = b.advantages, b.logp, b.mask
    for ours, theirs in zip(
        (*gae(rewards, values, mask, gamma, lam), returns_to_go(rewards, mask, gamma)),
        (
            *oracle.gae(rewards.numpy(), values.numpy(), mask.numpy(), gamma, lam),
            oracle.returns_to_go(rewards.numpy(), mask.numpy(), gamma),
        ),
        strict=True,
    ):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)


@given(SEEDS, DISCOUNTS)
def test_gae_with_lambda_1_is_the_return_minus_the_value(seed: int, gamma: float) -> None:
    rewards, values, mask = critic(seed)
    advantages, returns = gae(rewards, values, mask, gamma, 1.0)
    exact = returns_to_go(rewards, mask, gamma)
    torch.testing.assert_close(returns, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages, torch.where(mask, exact - values, 0), rtol=0, atol=1e-12)


@given(SEEDS, DISCOUNTS)
def test_gae_with_lambda_0_is_the_one_step_temporal_difference(seed: int, gamma: float) -> None:
    rewards, values, _ = critic(seed)
    mask = torch.ones_like(values, dtype=torch.bool)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages, _ = gae(rewards, values, mask, gamma, 0.0)
    torch.testing.assert_close(advantages, rewards + gamma * following - values, rtol=0, atol=1e-12)


@given(SEEDS, DISCOUNTS, DISCOUNTS)
def test_a_gap_between_turns_is_as_if_it_were_not_there(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = critic(seed)
    short = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)
    with_gaps = (*gae(rewards, values, mask, gamma, lam), returns_to_go(rewards, mask, gamma))
    closed_up = (
        *gae(squeeze(rewards, mask), squeeze(values, mask), short, gamma, lam),
        returns_to_go(squeeze(rewards, mask), short, gamma),
    )
    for ours, theirs in zip(with_gaps, closed_up, strict=True):
        torch.testing.assert_close(squeeze(ours, mask), theirs, rtol=0, atol=0)
        assert ours[~mask].eq(0).all()


@pytest.mark.parametrize("poison", POISON, ids=str)
@given(SEEDS)
def test_values_on_untrained_positions_and_unknown_rewards_there_change_nothing(poison: float, seed: int) -> None:
    rewards, values, mask = critic(seed)
    dirty = torch.where(mask, values, poison).requires_grad_()
    unknown = rewards if math.isfinite(poison) else torch.where(mask, rewards, poison)
    for ours, theirs in zip(gae(unknown, dirty, mask, 0.9, 0.95), gae(rewards, values, mask, 0.9, 0.95), strict=True):
        assert torch.equal(ours.detach(), theirs)
        slope = torch.autograd.grad(ours.sum(), dirty, retain_graph=True)[0]
        assert slope[~mask].eq(0).all() and slope.isfinite().all()
    assert torch.equal(returns_to_go(unknown, mask, 0.9), returns_to_go(rewards, mask, 0.9))


def test_a_reward_on_an_untrained_position_belongs_to_the_last_trained_token_before_it() -> None:
    mask = torch.tensor([[False, True, True, False, True, False]])
    given_there = torch.tensor([[9.0, 0.0, 1.0, 10.0, 100.0, 1000.0]])  # the first has nobody to belong to
    assert returns_to_go(given_there, mask, 0.5).tolist() == [[0, 280.5, 561, 0, 1100, 0]]
    moved = torch.tensor([[0.0, 0.0, 11.0, 0.0, 1100.0, 0.0]])
    values = torch.arange(6.0).unsqueeze(0)
    for ours, theirs in zip(gae(given_there, values, mask, 0.9, 0.8), gae(moved, values, mask, 0.9, 0.8), strict=True):
        assert torch.equal(ours, theirs)


@given(SEEDS)
def test_rows_are_independent_and_padding_adds_nothing(seed: int) -> None:
    rewards, values, mask = critic(seed)
    whole = gae(rewards, values, mask, 0.9, 0.95)
    further = [torch.nn.functional.pad(x, (0, 3)) for x in (rewards, values, mask)]
    wide = gae(further[0], further[1], further[2], 0.9, 0.95)
    for ours, padded in zip(whole, wide, strict=True):
        assert torch.equal(padded[:, : ours.shape[1]], ours) and not padded[:, ours.shape[1] :].any()
    for i in range(len(mask)):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], 0.9, 0.95)
        assert torch.equal(alone[0][0], whole[0][i]) and torch.equal(alone[1][0], whole[1][i])


@given(SEEDS, DISCOUNTS, DISCOUNTS)
def test_a_perfect_critic_leaves_no_advantage(seed: int, gamma: float, lam: float) -> None:
    """Where the value is the return that follows, every TD error is 0, for any λ."""
    rewards, _, mask = critic(seed)
    perfect = returns_to_go(rewards, mask, gamma)
    advantages, returns = gae(rewards, perfect, mask, gamma, lam)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, perfect, rtol=0, atol=1e-12)


# --- rewards per token -------------------------------------------------------------------------------------------


@given(SEEDS)
def test_token_rewards_agree_with_the_oracle_and_add_up_to_score_minus_kl(seed: int) -> None:
    b = ragged(seed)
    kl, scores = torch.where(b.mask, b.behaviour - b.logp, math.nan), b.advantages[:, 0]
    rewards = token_rewards(scores, kl, b.mask, 0.1)
    expected = oracle.token_rewards(scores.numpy(), kl.numpy(), b.mask.numpy(), 0.1)
    np.testing.assert_allclose(rewards.numpy(), expected, rtol=0, atol=1e-15)
    total = scores - 0.1 * torch.where(b.mask, kl, 0).sum(1)
    torch.testing.assert_close(rewards.sum(1), torch.where(b.mask.any(1), total, 0))


def test_an_unscored_row_keeps_its_kl_and_a_row_without_tokens_has_no_reward() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    rewards = token_rewards(torch.tensor([math.nan, 5.0]), torch.full((2, 2), 2.0), mask, 0.25)
    assert rewards.tolist() == [[-0.5, -0.5], [0, 0]]


# --- the value loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_range", [0.0, 0.2, 1.0, 1e9])
@given(seed=SEEDS)
def test_the_value_loss_and_its_gradient_agree_with_the_oracle(clip_range: float, seed: int) -> None:
    b = ragged(seed)
    leaf = b.logp.clone().requires_grad_()
    loss, clipped = value_loss(leaf, b.old, b.advantages, b.mask, clip_range)
    values, old, returns, mask = (x.numpy() for x in (b.logp, b.old, b.advantages, b.mask))
    expected, slope, removed = oracle.value_loss(values, old, returns, mask, clip_range)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(loss.sum(), leaf)[0].numpy(), slope, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(clipped.numpy(), removed)


@given(SEEDS)
def test_clipping_never_lowers_the_value_loss_and_a_range_out_of_reach_does_nothing(seed: int) -> None:
    b = ragged(seed)
    free, none = value_loss(b.logp, b.old, b.advantages, b.mask, 0.0)
    wide, far = value_loss(b.logp, b.old, b.advantages, b.mask, 1e9)
    tight, clipped = value_loss(b.logp, b.old, b.advantages, b.mask, 0.1)
    torch.testing.assert_close(wide, free)
    assert not none.any() and not far.any()
    assert (tight >= free).all() and torch.equal(tight > free, clipped)


@given(SEEDS)
def test_at_the_old_values_nothing_clips_and_the_gradient_is_the_error(seed: int) -> None:
    b = ragged(seed)
    leaf = b.logp.clone().requires_grad_()
    loss, clipped = value_loss(leaf, b.logp, b.advantages, b.mask, 0.2)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    torch.testing.assert_close(gradient, torch.where(b.mask, b.logp - b.advantages, 0), rtol=0, atol=1e-12)
    assert not clipped.any()


@given(SEEDS)
def test_the_value_losss_gradient_agrees_with_finite_differences(seed: int) -> None:
    b = ragged(seed, rows=2, length=5)
    near = ((b.logp - b.old).abs() - 0.2).abs() < 1e-3  # no derivative there
    old = torch.where(near, b.old + 0.01, b.old)
    leaf = b.logp.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, b.advantages, b.mask, 0.2)[0], (leaf,))


@pytest.mark.parametrize("poison", POISON, ids=str)
@given(SEEDS)
def test_what_untrained_positions_hold_changes_no_value_loss(poison: float, seed: int) -> None:
    b = ragged(seed)
    leaf, old, returns = (torch.where(b.mask, x, poison) for x in (b.logp, b.old, b.advantages))
    loss, clipped = value_loss(leaf.requires_grad_(), old, returns, b.mask, 0.2)
    clean, removed = value_loss(b.logp, b.old, b.advantages, b.mask, 0.2)
    assert torch.equal(loss.detach(), clean) and torch.equal(clipped, removed)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    assert gradient.isfinite().all() and gradient[~b.mask].eq(0).all()


@weightings
@given(seed=SEEDS, parts=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_any_split_over_passes_and_ranks_gives_the_same_value_gradient(how: str, seed: int, parts: list[int]) -> None:
    """Row i goes to pass parts[i]; weights are those of the whole batch; losses are summed, never averaged."""
    b = ragged(seed, rows=8)
    weights = token_weights(b.mask, how, MAX_LEN).double()

    def gradient(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = b.logp[rows].requires_grad_()
        per_token, _ = value_loss(leaf, b.old[rows], b.advantages[rows], b.mask[rows], 0.2)
        total = (weights[rows] * per_token).sum()
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    loss, whole = gradient(torch.arange(8))
    total, pieces = torch.zeros_like(loss), torch.zeros_like(whole)
    for part in range(4):
        rows = torch.tensor([i for i in range(8) if parts[i] == part], dtype=torch.int64)
        piece, slope = gradient(rows)
        total, pieces[rows] = total + piece, slope
    torch.testing.assert_close(total, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=0)


# --- the KL controller -------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 10), st.floats(0, 100), st.floats(0.1, 10))
def test_the_kl_coefficient_moves_towards_the_target_and_never_far(coef: float, kl: float, target: float) -> None:
    after = adaptive_kl(coef, kl, target, horizon=100, episodes=10)
    assert (after > coef) == (kl > target) or after == pytest.approx(coef)
    assert 0.98 * coef - 1e-12 <= after <= 1.02 * coef + 1e-12
    assert adaptive_kl(coef, target, target, 100, 10) == coef
    assert adaptive_kl(coef, kl, target, 100, 0) == coef


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 10.0), (1.0, 0.0), (-1.0, 10.0)])
def test_a_controller_without_a_target_or_a_horizon_is_refused(target: float, horizon: float) -> None:
    with pytest.raises(ValueError, match="both must be positive"):
        adaptive_kl(0.1, 1.0, target, horizon, 1)
