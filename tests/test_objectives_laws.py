"""Laws every objective obeys. A new policy loss joins by being in POLICY_LOSSES; it also needs a line in the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from posttrain.algos.grpo import POLICY_LOSSES
from posttrain.objectives.policy import is_correction, ratio
from posttrain.objectives.tokens import AGGREGATIONS, token_weights
from tests import oracle

LOW, HIGH, MAX_LEN = 0.2, 0.28, 12
losses = pytest.mark.parametrize("name", POLICY_LOSSES)
weightings = pytest.mark.parametrize("how", AGGREGATIONS)
SEEDS = st.integers(0, 2**32 - 1)
POISON = [math.nan, math.inf, -math.inf, 1e4, -1e4]


def given(
    *args: st.SearchStrategy, **kwargs: st.SearchStrategy
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis with 20 examples: there are many laws, and each runs for every loss."""
    return lambda test: settings(max_examples=20, deadline=None)(given_any(*args, **kwargs)(test))


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
    torch.testing.assert_close(padded_gradient[:, : gradient.shape[1]], gradient, rtol=0, atol=0)
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
@given(SEEDS)
def test_on_policy_nothing_clips_and_the_gradient_is_that_of_reinforce(name: str, seed: int) -> None:
    b = ragged(seed)
    weights = token_weights(b.mask, "token-mean")
    assert (ratio(b.logp, b.logp, b.mask) == 1).all()
    assert not POLICY_LOSSES[name](b.logp, b.logp, b.advantages, b.mask, LOW, HIGH)[1].any()
    _, gradient = loss_and_gradient(name, b, weights, old=b.logp)
    expected = torch.where(b.mask, -b.advantages * weights, 0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


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
    correction = is_correction(dirty.old, dirty.behaviour, b.mask, 2.0)
    assert torch.equal(correction, is_correction(b.old, b.behaviour, b.mask, 2.0))


@losses
def test_the_last_token_of_a_row_is_trained_like_the_others(name: str) -> None:
    """The stop token is the last trained token; a system that drops it never learns to stop."""
    logp = torch.full((1, 4), -1.0, dtype=torch.float64)
    b = Rows(logp, logp, logp, torch.ones_like(logp), torch.tensor([[False, False, True, True]]))
    _, gradient = loss_and_gradient(name, b, token_weights(b.mask, "token-mean"))
    assert gradient.tolist() == [[0, 0, -0.5, -0.5]]


@losses
@given(seed=SEEDS)
def test_finite_differences_agree(name: str, seed: int) -> None:
    b = ragged(seed, rows=2, length=5)
    kinks = torch.tensor([math.log(1 - LOW), math.log(1 + HIGH)])  # the surrogate has no derivative there
    near = ((b.logp - b.old).unsqueeze(-1) - kinks).abs().amin(-1) < 1e-3
    old = torch.where(near, b.old + 0.01, b.old)

    def weighted(logp: torch.Tensor) -> torch.Tensor:
        return POLICY_LOSSES[name](logp, old, b.advantages, b.mask, LOW, HIGH)[0]

    assert torch.autograd.gradcheck(weighted, (b.logp.clone().requires_grad_(),))


@losses
def test_a_ratio_beyond_the_clamp_stays_finite_in_fp32(name: str) -> None:
    logp = torch.tensor([[0.0, -100.0, -0.1]], requires_grad=True)
    old = torch.tensor([[0.0, -0.1, -100.0]])
    mask = torch.tensor([[False, True, True]])
    loss, _ = POLICY_LOSSES[name](logp, old, torch.tensor([[0.0, -1.0, -1.0]]), mask, LOW, HIGH)
    loss.sum().backward()
    assert logp.grad is not None and loss.isfinite().all() and logp.grad.isfinite().all()


@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0, 1e9]))
def test_the_importance_weight_agrees_with_the_oracle_and_carries_no_gradient(seed: int, cap: float) -> None:
    b = ragged(seed)
    weight = is_correction(b.old.clone().requires_grad_(), b.behaviour, b.mask, cap)
    expected = oracle.truncated_is(b.old.numpy(), b.behaviour.numpy(), b.mask.numpy(), cap)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-12)
    assert not weight.requires_grad


# --- expectations by enumeration ---------------------------------------------------------------------------------


@losses
@given(SEEDS)
def test_in_expectation_the_loss_gives_the_exact_policy_gradient(name: str, seed: int) -> None:
    """Vocabulary 3, answers of 2 tokens: all 9 are enumerated, each with any reward, with and without a baseline."""
    draw = np.random.default_rng(seed)
    rewards = torch.tensor(draw.normal(0, 1, 9))
    first = torch.tensor(draw.normal(0, 1, 3), requires_grad=True)
    second = torch.tensor(draw.normal(0, 1, (3, 3)), requires_grad=True)
    answers = torch.tensor(list(itertools.product(range(3), repeat=2)))
    by_token = torch.stack(
        [first.log_softmax(0)[answers[:, 0]], second.log_softmax(1)[answers[:, 0], answers[:, 1]]], 1
    )
    chance = by_token.sum(1).exp()
    exact = torch.autograd.grad(-(chance * rewards).sum(), [first, second], retain_graph=True)
    for baseline in (0.0, 0.7):
        advantages = (rewards - baseline).unsqueeze(1).expand(9, 2)
        mask = torch.ones(9, 2, dtype=torch.bool)
        loss, _ = POLICY_LOSSES[name](by_token, by_token.detach(), advantages, mask, LOW, HIGH)
        expected = torch.autograd.grad((chance.detach() * loss.sum(1)).sum(), [first, second], retain_graph=True)
        for ours, theirs in zip(expected, exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@given(SEEDS)
def test_the_importance_weight_turns_the_samplers_expectation_into_the_learners(seed: int) -> None:
    """Without truncation, E_sampler[w · f] = E_learner[f] for any f of one token."""
    draw = np.random.default_rng(seed)
    learner, sampler = torch.tensor(draw.normal(0, 1, (2, 6))).log_softmax(1)
    value = torch.tensor(draw.normal(0, 1, 6))
    weight = is_correction(learner.unsqueeze(1), sampler.unsqueeze(1), torch.ones(6, 1, dtype=torch.bool), 1e9)[:, 0]
    assert (sampler.exp() * weight * value).sum().item() == pytest.approx((learner.exp() * value).sum().item())
