"""Mixing sources: the schedule is exact, resumes from one integer and misses no row; the text syntax is unambiguous."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain import rng
from posttrain.data.files import is_file_name, is_hub_id
from posttrain.data.mixing import Mixture, parse_mixture
from posttrain.types import ConfigError, DataError

weights = st.one_of(
    st.integers(1, 40).map(float),
    st.decimals("0.001", "9", places=3).map(float),
    st.floats(1e-3, 1e3, allow_nan=False),
)
sources = st.lists(st.tuples(st.integers(1, 30), weights), min_size=1, max_size=6)
seeds = st.integers(0, 2**32)


def mixture(parts: list[tuple[int, float]], seed: int) -> Mixture:
    return Mixture([size for size, _ in parts], [weight for _, weight in parts], seed)


def test_three_to_one_by_hand() -> None:
    # n·w for the second source is 0.25, 0.5, 0.75, 1: it is owed half a row after two draws, and gets the third.
    assert [source for source, _ in Mixture([9, 9], [3, 1], 0).draw(0, 8)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_equal_weights_take_turns() -> None:
    assert [source for source, _ in Mixture([9, 9, 9], [2, 2, 2], 0).draw(0, 6)] == [0, 1, 2, 0, 1, 2]


@given(sources, seeds)
def test_every_prefix_gives_each_source_its_share_to_less_than_one_row(
    parts: list[tuple[int, float]], seed: int
) -> None:
    exact = [Fraction(repr(weight)) for _, weight in parts]
    # Tijdeman's bound: 1 − 1/(2K − 2) for K sources, which is below 1; a single source has every draw.
    bound = 1 - Fraction(1, 2 * len(parts) - 2) if len(parts) > 1 else Fraction(0)
    counts = Counter[int]()
    for n, (source, _) in enumerate(mixture(parts, seed).draw(0, 200), 1):
        counts[source] += 1
        assert all(abs(counts[i] - n * w / sum(exact)) <= bound for i, w in enumerate(exact))


@given(sources, seeds)
def test_each_epoch_of_a_source_visits_each_of_its_rows_once(parts: list[tuple[int, float]], seed: int) -> None:
    drawn = mixture(parts, seed).draw(0, 200)
    for i, (size, _) in enumerate(parts):
        rows = [row for source, row in drawn if source == i]
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))
        last = rows[len(rows) - len(rows) % size :]
        assert len(set(last)) == len(last)


@given(sources, seeds, st.integers(0, 500), st.integers(0, 60), st.integers(0, 60))
def test_any_slice_is_a_function_of_its_position_alone(
    parts: list[tuple[int, float]], seed: int, start: int, first: int, second: int
) -> None:
    fresh, used = mixture(parts, seed), mixture(parts, seed)
    whole = fresh.draw(start, first + second)
    assert used.draw(start + first, second) == whole[first:]
    assert used.draw(start, first) == whole[:first]
    assert used.draw(0, start + first + second)[start:] == whole


@given(sources, seeds, st.integers(0, 400))
def test_the_count_of_draws_is_told_without_drawing(parts: list[tuple[int, float]], seed: int, n: int) -> None:
    counts = Counter(source for source, _ in mixture(parts, seed).draw(0, n))
    assert mixture(parts, seed).drawn(n) == [counts[i] for i in range(len(parts))]


@given(sources, seeds, st.integers(-3, 3))
def test_only_the_ratio_of_the_weights_matters(parts: list[tuple[int, float]], seed: int, power: int) -> None:
    # Whole numbers, because the decimal of a scaled float is not always the scaled decimal.
    whole = [(size, float(math.ceil(weight))) for size, weight in parts]
    scaled = [(size, weight * 2.0**power) for size, weight in whole]
    assert mixture(whole, seed).draw(0, 100) == mixture(scaled, seed).draw(0, 100)
    assert sum(mixture(whole, seed).shares) == pytest.approx(1)


def test_a_weight_counts_as_the_decimal_it_is_written_as() -> None:
    assert Mixture([5, 5], [0.7, 0.3], 0).period == 10
    assert Mixture([5, 5], [0.1 + 0.2, 0.7], 0).period > 10  # 0.30000000000000004 is another decimal
    assert Mixture([5, 5, 5], [1, 2, 0.5], 0).shares == pytest.approx([2 / 7, 4 / 7, 1 / 7])


def test_a_position_far_away_costs_one_period_and_no_more() -> None:
    mixed = Mixture([7, 5], [0.7, 0.3], 3)
    far = 10**15
    drawn = mixed.draw(far, 20)
    assert [source for source, _ in drawn] == [source for source, _ in mixed.draw(0, 20)]
    assert mixed.drawn(far) == [7 * 10**14, 3 * 10**14]


@given(st.integers(1, 40), seeds, st.integers(0, 200), st.integers(0, 100))
def test_one_source_is_visited_as_it_is_without_a_mixture(size: int, seed: int, start: int, count: int) -> None:
    assert [row for _, row in Mixture([size], [0.3], seed).draw(start, count)] == rng.draw_order(
        size, start, count, seed
    )


def test_sources_of_one_size_and_two_seeds_have_orders_of_their_own() -> None:
    drawn = Mixture([50, 50], [1, 1], 0).draw(0, 100)
    first, second = ([row for source, row in drawn if source == i] for i in (0, 1))
    assert first != second
    assert drawn != Mixture([50, 50], [1, 1], 1).draw(0, 100)


@pytest.mark.parametrize(
    ("sizes", "given_weights", "error", "says"),
    [
        ([], [], ConfigError, "0 sources have 0 weights"),
        ([3], [1, 2], ConfigError, "1 sources have 2 weights"),
        ([3, 3], [1, 0], ConfigError, "the weight of source 1 is 0. Give a positive number"),
        ([3, 3], [-1, 1], ConfigError, "the weight of source 0 is -1"),
        ([3, 3], [1, math.nan], ConfigError, "the weight of source 1 is nan"),
        ([3, 3], [1, math.inf], ConfigError, "the weight of source 1 is inf"),
        ([3, 0], [1, 1], DataError, "source 1 has 0 rows"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    sizes: list[int], given_weights: list[float], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Mixture(sizes, given_weights, 0)


@pytest.mark.parametrize(("start", "count"), [(-1, 3), (0, -1)])
def test_a_negative_position_is_refused(start: int, count: int) -> None:
    with pytest.raises(ConfigError, match="Give non-negative numbers"):
        Mixture([3], [1], 0).draw(start, count)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.jsonl", [("a.jsonl", 1.0)]),
        ("a.jsonl + b.jsonl", [("a.jsonl", 1.0), ("b.jsonl", 1.0)]),
        ("a.jsonl*3 + b.jsonl*1", [("a.jsonl", 3.0), ("b.jsonl", 1.0)]),
        (" a.jsonl * 0.7  +  b.parquet*3e-1 ", [("a.jsonl", 0.7), ("b.parquet", 0.3)]),
        ("a.jsonl*3 +\n  b.jsonl", [("a.jsonl", 3.0), ("b.jsonl", 1.0)]),
        ("openai/gsm8k/main:test*2 + C:/x/b.jsonl", [("openai/gsm8k/main:test", 2.0), ("C:/x/b.jsonl", 1.0)]),
        ("c++/a+b.jsonl*2 + my data.json", [("c++/a+b.jsonl", 2.0), ("my data.json", 1.0)]),
    ],
)
def test_a_mixture_is_read_from_one_string(text: str, parts: list[tuple[str, float]]) -> None:
    assert parse_mixture(text) == parts
    assert all(is_file_name(name) or is_hub_id(name) for name, _ in parts)


def test_an_existing_file_is_one_source_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a + b.jsonl", "a*3", "2*x.jsonl"):
        (tmp_path / name).write_text("{}")
        assert parse_mixture(str(tmp_path / name)) == [(str(tmp_path / name), 1.0)]
    assert parse_mixture(f"{tmp_path}/2*x.jsonl*5 + b.jsonl") == [(f"{tmp_path}/2*x.jsonl", 5.0), ("b.jsonl", 1.0)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"has no source next to a \+ or \*"),
        ("a.jsonl + ", "has no source"),
        ("a.jsonl +  + b.jsonl", "has no source"),
        ("*3", "has no source"),
        ("a.jsonl*", r"'' after a.jsonl\* is not a number"),
        ("a.jsonl*much", "'much' after a.jsonl. is not a number. Write it as a.jsonl.3"),
        ("a.jsonl*0 + b.jsonl", "the weight of a.jsonl is 0.0. Give a positive number, or leave the source out"),
        ("a.jsonl*-2", "the weight of a.jsonl is -2.0"),
        ("a.jsonl*nan", "the weight of a.jsonl is nan"),
        ("a.jsonl*inf", "the weight of a.jsonl is inf"),
        ("a.jsonl*1 + a.jsonl*2", "names a.jsonl twice. Name it once, with the sum of its weights"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_mixture(text)
