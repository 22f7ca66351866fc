"""Run health: when a run stops, and that a value that is not a number never passes a limit."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.models import kernels
from posttrain.train import health
from posttrain.types import Stat, stat_values

numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(numbers, min_size=1, max_size=6), st.sampled_from(["max", "min"]))
def test_the_extreme_of_values_with_nan_is_nan_in_every_order(values: list[float], kind: str) -> None:
    expected = math.nan if any(map(math.isnan, values)) else (max if kind == "max" else min)(values)
    for order in list(permutations(values))[:24]:
        found = stat_values([{"gap": Stat(value, 1, kind)} for value in order])["gap"]  # type: ignore[arg-type]
        assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize(
    ("gap", "stops"), [(0.0, False), (0.5, False), (0.51, True), (math.inf, True), (math.nan, True)]
)
def test_a_mismatch_that_is_not_within_the_limit_stops_the_run(gap: float, stops: bool) -> None:
    assert bool(health.mismatch({"mismatch": gap}, 0.5)) == stops
    assert not health.mismatch({}, 0.5)


class Wrapped(torch.Tensor):
    """A tensor subclass, as DTensor or a quantised tensor: its address need not hold its values."""


def test_the_kernels_take_plain_tensors_and_parameters_alone() -> None:
    plain = torch.zeros(2, 2)
    taken = kernels.library() is not None
    assert kernels.takes(plain) == kernels.takes(torch.nn.Parameter(plain)) == taken
    assert not kernels.takes(plain.as_subclass(Wrapped))
    assert not kernels.takes(plain.double()) and not kernels.takes(plain.to("meta"))


def test_the_kernels_do_not_take_a_distributed_tensor() -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    dist = pytest.importorskip("torch.distributed")
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        assert not kernels.takes(distributed.distribute_tensor(torch.zeros(2, 2), mesh))
    finally:
        dist.destroy_process_group()
