"""Randomness is a function: known answers, uniformity, prefixes, permutations and resumable passes over the data."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain import rng

SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("counter", "keys", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, keys: str, expected: str) -> None:
    words = [np.array([int(w, 16) for w in text.split()], np.uint64) for text in (counter, keys, expected)]
    assert rng.philox(words[0], words[1]).tolist() == words[2].tolist()


def test_uniforms_are_the_53_high_bits_of_philox_words() -> None:
    """Word 0 gives 27 bits, word 1 gives 26: with key 0 and counter 0 the known answer fixes the first number."""
    expected = ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    assert rng.uniforms(0, 1)[0] == expected


def test_both_halves_of_a_64_bit_seed_count() -> None:
    low, high, neither = rng.uniforms(1, 4), rng.uniforms(1 << 32, 4), rng.uniforms(0, 4)
    assert len({low[0], high[0], neither[0]}) == 3


@given(SEEDS, st.integers(0, 300), st.integers(0, 300))
def test_number_i_does_not_depend_on_how_many_are_drawn(seed: int, few: int, more: int) -> None:
    np.testing.assert_array_equal(rng.uniforms(seed, few + more)[:few], rng.uniforms(seed, few))


@given(SEEDS)
def test_uniforms_lie_in_the_half_open_unit_interval(seed: int) -> None:
    drawn = rng.uniforms(seed, 1000)
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0 and drawn.max() < 1


def test_uniforms_fill_equal_bins_equally() -> None:
    """Chi-square over 100 bins: 99 degrees of freedom, and 148.2 is exceeded by one fair seed in 1,000."""
    counts = np.bincount((rng.uniforms(7, 100_000) * 100).astype(int), minlength=100)
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 148.2


def test_first_numbers_of_consecutive_seeds_are_uniform_and_unrelated() -> None:
    """Seeds are per sample, so it is the first numbers of neighbouring seeds that meet in a batch."""
    first = np.array([rng.uniforms(seed, 1)[0] for seed in range(4000)])
    counts = np.bincount((first * 100).astype(int), minlength=100)
    assert ((counts - 40.0) ** 2 / 40).sum() < 148.2
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.063  # four standard errors of 1/√4,000


def test_keys_tell_order_type_and_number_of_parts_apart() -> None:
    keys = [rng.key(1, 2), rng.key(2, 1), rng.key(12), rng.key("1", 2), rng.key(1, "2"), rng.key(1, 2, 0), rng.key()]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**64 for k in keys)


def test_a_key_is_the_same_in_every_process() -> None:
    """Python's own hash() is salted per process; a resumed run must not depend on it."""
    assert rng.key(0, "train", 3, "task-7", 1) == 2189720005356570644


@given(st.integers(0, 200), st.integers(0, 1000))
def test_a_permutation_holds_every_index_once_and_repeats_for_its_parts(count: int, part: int) -> None:
    order = rng.permutation(count, "x", part)
    assert sorted(order.tolist()) == list(range(count))
    np.testing.assert_array_equal(order, rng.permutation(count, "x", part))


def test_permutations_of_three_are_equally_likely() -> None:
    """Six orders, 3,000 draws: 5 degrees of freedom, and 20.5 is exceeded by one fair run in 1,000."""
    seen: dict[tuple[int, ...], int] = {}
    for i in range(3000):
        order = tuple(rng.permutation(3, i).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6
    assert sum((n - 500.0) ** 2 / 500 for n in seen.values()) < 20.5


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 60), st.integers(0, 60), SEEDS)
def test_a_pass_over_the_data_continues_anywhere(count: int, start: int, first: int, second: int, seed: int) -> None:
    whole = rng.draw_order(count, start, first + second, seed)
    assert len(whole) == first + second
    parts = rng.draw_order(count, start, first, seed) + rng.draw_order(count, start + first, second, seed)
    assert whole == parts


@given(st.integers(1, 30), st.integers(1, 4), SEEDS)
def test_each_epoch_reads_every_row_once(count: int, epochs: int, seed: int) -> None:
    order = rng.draw_order(count, 0, count * epochs, seed)
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_their_own_orders() -> None:
    order = rng.draw_order(50, 0, 100, 0)
    assert order[:50] != order[50:]
    assert order[:50] != rng.draw_order(50, 0, 50, 1)


def test_seed_global_makes_python_numpy_and_torch_repeat() -> None:
    def drawn(*parts: int | str) -> tuple[float, float, float]:
        rng.seed_global(*parts)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn(3, "update", 1) == drawn(3, "update", 1)
    assert all(a != b for a, b in zip(drawn(3, "update", 1), drawn(3, "update", 2), strict=True))
