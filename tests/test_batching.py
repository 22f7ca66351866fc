"""From samples to passes: every sample once, weights fixed over the whole batch, padding that holds nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import batching
from posttrain.objectives.tokens import AGGREGATIONS, token_weights
from posttrain.types import Batch, Sample

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=20)
weightings = pytest.mark.parametrize("how", AGGREGATIONS)


def sample(length: int, number: int = 0, advantage: float = 1.0, prompt: int = 1, old: bool = False) -> Sample:
    """Tokens number·100 …, so that a row can be recognised; all but `prompt` tokens are trained."""
    index = np.arange(length)
    mask = index >= prompt
    values = (number + index / 100).astype(np.float32)
    return Sample(
        number * 100 + index,
        mask,
        -values,
        np.where(mask, advantage, 0).astype(np.float32),
        values + 7 if old else None,
    )


def samples_of(lengths: list[int], old: bool = False) -> list[Sample]:
    return [sample(n, i, old=old) for i, n in enumerate(lengths)]


def rows(batches: list[Batch]) -> dict[int, tuple[Batch, int]]:
    """Sample number → the batch and row it is in; no number comes twice."""
    found = [(int(b.tokens[r, 0]) // 100, (b, r)) for b in batches for r in range(len(b.tokens))]
    assert len(dict(found)) == len(found)
    return dict(found)


@given(LENGTHS, st.integers(1, 100))
def test_passes_hold_every_sample_once_within_their_room(lengths: list[int], room: int) -> None:
    parts = batching.passes(lengths, room)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in part) <= room or len(part) == 1 for part in parts)
    loads = [sum(lengths[row] for row in part) for part in parts]
    assert loads == sorted(loads, reverse=True)


def test_passes_by_hand() -> None:
    """The row of 20 is alone; 21 tokens in passes of 10 need three of them."""
    assert batching.passes([3, 9, 4, 5, 20], 10) == [[4], [1], [0, 2], [3]]
    assert batching.passes([], 10) == []


@weightings
@given(LENGTHS, st.integers(1, 100))
def test_no_split_changes_a_tokens_weight(how: str, lengths: list[int], room: int) -> None:
    samples = samples_of(lengths)
    whole = token_weights(batching.loss_masks(samples), how, 40)
    found = rows(batching.micro(samples, room, how, 40))
    assert found.keys() == set(range(len(samples)))
    for number, (batch, row) in found.items():
        length = lengths[number]
        assert torch.equal(batch.weights[row, :length], whole[number, :length])
        assert not batch.weights[row, length:].any()


@given(LENGTHS, st.integers(1, 60))
def test_a_batch_holds_its_samples_and_nothing_on_padding(lengths: list[int], room: int) -> None:
    samples = samples_of(lengths, old=True)
    for number, (batch, row) in rows(batching.micro(samples, room, "token-mean")).items():
        want, n = samples[number], lengths[number]
        assert batch.old_logp is not None and batch.ref_logp is None
        assert batch.real[row].tolist() == [True] * n + [False] * (batch.tokens.shape[1] - n)
        for tensor, array in (
            (batch.tokens, want.tokens),
            (batch.behaviour_logp, want.behaviour_logp),
            (batch.advantages, want.advantages),
            (batch.old_logp, want.old_logp),
            (batch.mask, want.loss_mask),
        ):
            np.testing.assert_array_equal(tensor[row, :n].numpy(), array)
            assert not tensor[row, n:].any()


@weightings
def test_rows_without_advantage_are_counted_but_not_computed(how: str) -> None:
    """Their policy gradient is exactly 0, but they were attempts: leaving them out must not reweight the others."""
    samples = [sample(5, 0), sample(7, 1, advantage=0.0), sample(4, 2)]
    all_rows, kept = (
        rows(batching.micro(samples, 99, how, 9)),
        rows(batching.micro(samples, 99, how, 9, skip_zero_advantage=True)),
    )
    assert kept.keys() == {0, 2}
    for number, (batch, row) in kept.items():
        other, at = all_rows[number]
        n = len(samples[number].tokens)
        assert torch.equal(batch.weights[row, :n], other.weights[at, :n])


def test_nothing_to_train_makes_no_pass() -> None:
    assert batching.micro([], 10, "token-mean") == []
    assert batching.micro([sample(4, advantage=0.0)], 10, "token-mean", skip_zero_advantage=True) == []


def test_the_same_sample_twice_is_two_rows_of_equal_weight() -> None:
    """SFT draws rows anew each epoch, so a small file puts one row into a batch twice."""
    twice = sample(3, 1)
    (batch,) = batching.micro([twice, twice], 99, "token-mean")
    torch.testing.assert_close(batch.weights, torch.tensor([[0, 0.25, 0.25], [0, 0.25, 0.25]]))


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32))
def test_minibatches_deal_every_sample_exactly_once(total: int, count: int, seed: int) -> None:
    samples = samples_of([2] * total)
    dealt = batching.minibatches(samples, count, seed)
    assert len(dealt) == count
    assert sorted(id(s) for part in dealt for s in part) == sorted(map(id, samples))
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
    again = batching.minibatches(samples, count, seed)
    assert [[id(s) for s in part] for part in dealt] == [[id(s) for s in part] for part in again]


def test_minibatches_mix_samples_by_seed_and_one_minibatch_keeps_the_order() -> None:
    samples = samples_of([2] * 16)
    dealt = {tuple(id(s) for s in batching.minibatches(samples, 2, seed)[0]) for seed in range(5)}
    assert len(dealt) == 5
    assert batching.minibatches(samples, 1, 3) == [samples]
