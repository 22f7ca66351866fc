"""Laws every objective obeys. A new policy loss joins by being in POLICY_LOSSES; it also needs a line in the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, settings
from hypothesis import given as given_any
from hypothesis import strategies as st

from posttrain.objectives.policy import IS_MODES, POLICY_LOSSES, dual_clip, is_correction, ratio, sequence_ratio
from posttrain.objectives.tokens import AGGREGATIONS, token_weights
from tests import oracle

LOW, HIGH, MAX_LEN = 0.2, 0.28, 12
losses = pytest.mark.parametrize("name", POLICY_LOSSES)
modes = pytest.mark.parametrize("how", IS_MODES)
weightings = pytest.mark.parametrize("how", AGGREGATIONS)
SEEDS = st.integers(0, 2**32 - 1)
STOPS_GRADIENTS = {"cispo", "gspo-token"}  # their gradient is not that of their value, by design
POISON = [math.nan, math.inf, -math.inf, 1e4, -1e4]


def given(
    *args: st.SearchStrategy, **kwargs: st.SearchStrategy
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis with 8 examples: there are many laws, and each runs for every loss."""
    return lambda test: settings(max_examples=8, deadline=None)(given_any(*args, **kwargs)(test))


@dataclass
class Rows:
    """A ragged batch in float64: logp, old, behaviour, advantages and mask, each (B, T); column 0 is never trained."""

    logp: torch.Tensor
    old: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    def select(self, index: torch.Tensor) -> Rows:
        return Rows(*(tensor[index] for tensor in vars(self).values()))

    def to(self, dtype: torch.dtype) -> Rows:
        return Rows(*(t if t.dtype == torch.bool else t.to(dtype) for t in vars(self).values()))


def ragged(seed: int, rows: int = 5, length: int = 7) -> Rows:
    """Random rows of random lengths, some with gaps, perhaps some without any trained token."""
    draw = np.random.default_rng(seed)
    logp = -draw.exponential(1.0, (rows, length))
    old, behaviour = logp + draw.normal(0, 0.3, logp.shape), logp + draw.normal(0, 0.3, logp.shape)
    mask = (np.arange(length) < draw.integers(0, length + 1, (rows, 1))) & (draw.random(logp.shape) < 0.8)
    mask[:, 0] = False
    advantages = draw.normal(0, 1, logp.shape)
    return Rows(*(torch.tensor(x) for x in (logp, old, behaviour, advantages, mask)))


def loss_and_gradient(
    name: str, b: Rows, weights: torch.Tensor, old: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss and its gradient with respect to logp (B, T)."""
    leaf = b.logp.clone().requires_grad_()
    per_token, _ = POLICY_LOSSES[name](leaf, b.old if old is None else old, b.advantages, b.mask, LOW, HIGH)
    total = (weights * per_token).sum()
    return total.detach(), torch.autograd.grad(total, leaf)[0]


def test_the_oracle_knows_every_policy_loss() -> None:
    assert oracle.POLICY_LOSSES.keys() == POLICY_LOSSES.keys()


@losses
@given(SEEDS)
def test_loss_gradient_and_clipping_agree_with_the_oracle(name: str, seed: int) -> None:
    b = ragged(seed)
    leaf = b.logp.clone().requires_grad_()
    loss, clipped = POLICY_LOSSES[name](leaf, b.old, b.advantages, b.mask, LOW, HIGH)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    logp, old, advantages, mask = (x.numpy() for x in (b.logp, b.old, b.advantages, b.mask))
    value, slope, removed = oracle.POLICY_LOSSES[name](logp, old, advantages, mask, LOW, HIGH)
    np.testing.assert_allclose(loss.detach().numpy(), value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(clipped.numpy(), removed)


@losses
@weightings
@given(seed=SEEDS, extra=st.integers(1, 9))
def test_padding_never_changes_loss_or_gradient(name: str, how: str, seed: int, extra: int) -> None:
    b = ragged(seed)
    wide = Rows(*(torch.nn.functional.pad(t, (0, extra)) for t in vars(b).values()))
    loss, gradient = loss_and_gradient(name, b, token_weights(b.mask, how, MAX_LEN))
    padded_loss, padded_gradient = loss_and_gradient(name, wide, token_weights(wide.mask, how, MAX_LEN))
    torch.testing.assert_close(padded_loss, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(padded_gradient[:, : gradient.shape[1]], gradient, rtol=0, atol=1e-15)
    assert not padded_gradient[:, gradient.shape[1] :].any()


@losses
@weightings
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
@given(seed=SEEDS, parts=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_any_split_over_passes_and_ranks_gives_the_same_gradient(
    name: str, how: str, dtype: torch.dtype, tolerance: float, seed: int, parts: list[int]
) -> None:
    """Row i goes to pass parts[i]; weights are those of the whole batch; losses are summed, never averaged."""
    b = ragged(seed, rows=8).to(dtype)
    weights = token_weights(b.mask, how, MAX_LEN).to(dtype)
    loss, gradient = loss_and_gradient(name, b, weights)
    total, pieces = torch.zeros((), dtype=dtype), torch.zeros_like(gradient)
    for part in range(4):
        index = torch.tensor([i for i in range(8) if parts[i] == part], dtype=torch.int64)
        piece, slope = loss_and_gradient(name, b.select(index), weights[index])
        total, pieces[index] = total + piece, slope
    torch.testing.assert_close(total, loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pieces, gradient, rtol=tolerance, atol=tolerance)


@losses
@weightings
@given(seed=SEEDS)
def test_row_order_is_irrelevant(name: str, how: str, seed: int) -> None:
    b = ragged(seed)
    order = torch.tensor(np.random.default_rng(seed).permutation(len(b.mask)))
    loss, gradient = loss_and_gradient(name, b, token_weights(b.mask, how, MAX_LEN))
    mixed = b.select(order)
    mixed_loss, mixed_gradient = loss_and_gradient(name, mixed, token_weights(mixed.mask, how, MAX_LEN))
    torch.testing.assert_close(mixed_loss, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed_gradient, gradient[order], rtol=0, atol=1e-12)


@losses
@weightings
@given(SEEDS)
def test_on_policy_nothing_clips_and_the_gradient_is_that_of_reinforce(name: str, how: str, seed: int) -> None:
    """For one advantage per row, as groups give; GSPO has one ratio per row and averages unequal ones."""
    b = ragged(seed)
    b = replace(b, advantages=b.advantages[:, :1].expand_as(b.advantages))
    weights = token_weights(b.mask, how, MAX_LEN)
    assert (ratio(b.logp, b.logp, b.mask) == 1).all() and (sequence_ratio(b.logp, b.logp, b.mask) == 1).all()
    assert not POLICY_LOSSES[name](b.logp, b.logp, b.advantages, b.mask, LOW, HIGH)[1].any()
    _, gradient = loss_and_gradient(name, b, weights, old=b.logp)
    expected = torch.where(b.mask, -b.advantages * weights, 0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@given(SEEDS)
def test_with_an_advantage_per_token_every_loss_but_gspo_is_reinforce_on_policy(seed: int) -> None:
    """GSPO then gives each token the mean of its row's advantages."""
    b = ragged(seed)
    weights = token_weights(b.mask, "token-mean").double()
    each = torch.where(b.mask, -b.advantages * weights, 0)
    mean = torch.where(b.mask, each.sum(1, keepdim=True) / b.mask.sum(1, keepdim=True).clamp_min(1), 0)
    for name in POLICY_LOSSES:
        _, gradient = loss_and_gradient(name, b, weights, old=b.logp)
        torch.testing.assert_close(gradient, mean if name == "gspo" else each, rtol=0, atol=1e-12)


@losses
@pytest.mark.parametrize("poison", POISON, ids=str)
@given(seed=SEEDS)
def test_what_unweighted_positions_hold_changes_nothing(name: str, poison: float, seed: int) -> None:
    """Not the loss, not the gradient elsewhere; and their own gradient is exactly 0, even where they hold NaN."""
    b = ragged(seed)
    weights = token_weights(b.mask, "token-mean")
    dirty = replace(
        b, **{f: torch.where(b.mask, getattr(b, f), poison) for f in ("logp", "old", "behaviour", "advantages")}
    )
    loss, gradient = loss_and_gradient(name, b, weights)
    dirty_loss, dirty_gradient = loss_and_gradient(name, dirty, weights)
    assert torch.equal(dirty_loss, loss) and torch.equal(dirty_gradient, gradient)
    assert (dirty_gradient[~b.mask] == 0).all()
    per_token, clipped = POLICY_LOSSES[name](dirty.logp, dirty.old, dirty.advantages, b.mask, LOW, HIGH)
    assert not per_token[~b.mask].any() and not clipped[~b.mask].any()
    for how in IS_MODES:
        correction = is_correction(dirty.old, dirty.behaviour, b.mask, 1.3, how, 0.8)
        assert torch.equal(correction, is_correction(b.old, b.behaviour, b.mask, 1.3, how, 0.8))


@losses
def test_the_last_token_of_a_row_is_trained_like_the_others(name: str) -> None:
    """The stop token is the last trained token; a system that drops it never learns to stop."""
    logp = torch.full((1, 4), -1.0, dtype=torch.float64)
    b = Rows(logp, logp, logp, torch.ones_like(logp), torch.tensor([[False, False, True, True]]))
    _, gradient = loss_and_gradient(name, b, token_weights(b.mask, "token-mean"))
    assert gradient.tolist() == [[0, 0, -0.5, -0.5]]


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES.keys() - STOPS_GRADIENTS))
@given(seed=SEEDS)
def test_finite_differences_agree(name: str, seed: int) -> None:
    b = ragged(seed, rows=2, length=5)
    gaps = torch.where(b.mask, b.logp - b.old, 0)
    ratios = torch.cat([gaps.flatten(), gaps.sum(1) / b.mask.sum(1).clamp_min(1)])
    kinks = torch.tensor([math.log(1 - LOW), math.log(1 + HIGH), math.log(3)])  # no derivative there
    assume((ratios.unsqueeze(-1) - kinks).abs().min() > 1e-3)

    def loss(logp: torch.Tensor) -> torch.Tensor:
        return POLICY_LOSSES[name](logp, b.old, b.advantages, b.mask, LOW, HIGH)[0]

    assert torch.autograd.gradcheck(loss, (b.logp.clone().requires_grad_(),))


@given(SEEDS)
def test_stopped_gradients_are_those_of_the_stated_surrogates(seed: int) -> None:
    """CISPO's is REINFORCE times the bounded ratio; GSPO-token's is GSPO's when a row's advantages are equal."""
    b = ragged(seed)
    ones = torch.ones_like(b.logp)
    _, cispo = loss_and_gradient("cispo", b, ones)
    _, plain = loss_and_gradient("reinforce", b, ones)
    torch.testing.assert_close(cispo, ratio(b.logp, b.old, b.mask).clamp(1 - LOW, 1 + HIGH) * plain)
    b = replace(b, advantages=b.advantages[:, :1].expand_as(b.advantages))
    for ours, theirs in zip(loss_and_gradient("gspo-token", b, ones), loss_and_gradient("gspo", b, ones), strict=True):
        torch.testing.assert_close(ours, theirs)


@losses
@given(seed=SEEDS)
def test_clipped_marks_what_the_bounds_changed_and_wide_bounds_change_nothing(name: str, seed: int) -> None:
    b = ragged(seed)
    loss, clipped = POLICY_LOSSES[name](b.logp, b.old, b.advantages, b.mask, LOW, HIGH)
    free, untouched = POLICY_LOSSES[name](b.logp, b.old, b.advantages, b.mask, math.inf, math.inf)
    assert torch.equal(loss[~clipped], free[~clipped])
    assert not untouched.any() or name == "dual-clip"  # its third bound is its own
    assert not (clipped & ~b.mask).any()
    if name in ("clip", "dual-clip"):
        assert not loss_and_gradient(name, b, torch.ones_like(b.logp))[1][clipped].any()


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() -> None:
    """Ratio e² = 7.4 with advantage −1: PPO pays 7.4 and still pushes, dual clip pays 3 and lets go."""
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    old, bad, mask = torch.full((1, 1), -3.0).double(), torch.full((1, 1), -1.0).double(), torch.ones(1, 1).bool()
    for bound, paid, slope in ((3.0, 3.0, 0.0), (10.0, math.exp(2), math.exp(2))):
        loss, clipped = dual_clip(logp, old, bad, mask, LOW, HIGH, bound)
        assert loss.item() == pytest.approx(paid) and clipped.item() == (slope == 0)
        assert torch.autograd.grad(loss.sum(), logp)[0].item() == pytest.approx(slope)
    assert POLICY_LOSSES["clip"](logp, old, bad, mask, LOW, HIGH)[0].item() == pytest.approx(math.exp(2))


@losses
def test_a_ratio_beyond_the_clamp_stays_finite_in_fp32(name: str) -> None:
    logp = torch.tensor([[0.0, -100.0, -0.1]], requires_grad=True)
    old = torch.tensor([[0.0, -0.1, -100.0]])
    mask = torch.tensor([[False, True, True]])
    loss, _ = POLICY_LOSSES[name](logp, old, torch.tensor([[0.0, -1.0, -1.0]]), mask, LOW, HIGH)
    loss.sum().backward()
    assert logp.grad is not None and loss.isfinite().all() and logp.grad.isfinite().all()


# --- importance correction ---------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize(("floor", "cap"), [(0.0, 0.5), (0.0, 1.0), (0.8, 1.2), (0.0, 1e9)])
@given(seed=SEEDS)
def test_the_importance_weight_agrees_with_the_oracle_and_carries_no_gradient(
    how: str, floor: float, cap: float, seed: int
) -> None:
    b = ragged(seed)
    weight = is_correction(b.old.clone().requires_grad_(), b.behaviour, b.mask, cap, how, floor)
    expected = oracle.is_correction(b.old.numpy(), b.behaviour.numpy(), b.mask.numpy(), cap, how, floor)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-12)
    assert not weight.requires_grad


@modes
@given(seed=SEEDS)
def test_a_sampler_that_is_the_learner_needs_no_correction(how: str, seed: int) -> None:
    b = ragged(seed)
    assert is_correction(b.old, b.old, b.mask, 1.0, how, 1.0).eq(1).all()


@modes
@given(seed=SEEDS, extra=st.integers(1, 9))
def test_a_rows_weight_depends_on_that_row_alone_and_not_on_its_padding(how: str, seed: int, extra: int) -> None:
    b = ragged(seed)
    weight = is_correction(b.old, b.behaviour, b.mask, 1.1, how, 0.9)
    old, behaviour, mask = (torch.nn.functional.pad(t, (0, extra)) for t in (b.old, b.behaviour, b.mask))
    padded = is_correction(old, behaviour, mask, 1.1, how, 0.9)
    torch.testing.assert_close(padded[:, : weight.shape[1]], weight, rtol=0, atol=1e-14)
    for i in range(len(b.mask)):
        alone = is_correction(b.old[i : i + 1], b.behaviour[i : i + 1], b.mask[i : i + 1], 1.1, how, 0.9)
        torch.testing.assert_close(alone, weight[i : i + 1], rtol=0, atol=1e-14)


@given(SEEDS)
def test_masking_zeroes_what_truncating_bounds_and_leaves_the_rest_alone(seed: int) -> None:
    b = ragged(seed)
    for level in ("token", "sequence", "sequence-sum"):
        free = is_correction(b.old, b.behaviour, b.mask, 1e9, f"{level}-truncate")
        cut = is_correction(b.old, b.behaviour, b.mask, 1.1, f"{level}-truncate", 0.9)
        kept = is_correction(b.old, b.behaviour, b.mask, 1.1, f"{level}-mask", 0.9)
        inside = (free >= 0.9) & (free <= 1.1)
        assert torch.equal(cut, free.clamp(0.9, 1.1))
        assert torch.equal(kept, torch.where(inside, free, 0))


def test_the_exact_row_weight_is_the_product_and_the_other_its_geometric_mean() -> None:
    old, behaviour = torch.tensor([[0.5, 0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5, 0.125]]).log()
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert is_correction(old, behaviour, mask, 100, "sequence-sum-truncate")[0].tolist() == pytest.approx([8, 8, 8])
    assert is_correction(old, behaviour, mask, 100, "sequence-truncate")[0].tolist() == pytest.approx([2, 2, 2])
    assert is_correction(old, behaviour, mask, 100, "token-truncate")[0].tolist() == pytest.approx([2, 1, 4])


def test_an_unknown_importance_correction_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown importance correction 'tis'; expected one of token-truncate"):
        is_correction(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 2.0, "tis")
