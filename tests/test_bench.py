"""The comparisons with TRL: their own pieces, and that a table fails when it must. TRL itself is not needed."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from bench import parity
from bench.parity import Measured, World, compare
from bench.parity_ours import sft
from bench.parity_rows import ROWS, Row
from posttrain.config import ModelConfig
from posttrain.models.heads import attach_scalar
from posttrain.models.load import load_policy
from tests import tiny

PEER = Path(parity.__file__).with_name("parity_peer.py")
EQUAL = Measured(Row("SFT", "sft", sft), loss=0.5, peer_loss=0.5, norm=2.0, peer_norm=2.0, apart=0.0)
EXCUSED = Row("SFT", "sft", sft, differs=("loss",), reason="another divisor")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tiny.chatty(tmp_path_factory.mktemp("model"))
    policy, reference = (load_policy(ModelConfig(path=str(folder))) for _ in range(2))
    attach_scalar(policy, 1, 0)
    yield World(policy, parity.noisy(reference), parity.make_batch(policy))


def test_every_row_has_a_name_of_its_own_and_a_trainer_that_the_peer_knows() -> None:
    tables = [n for n in ast.walk(ast.parse(PEER.read_text(encoding="utf-8"))) if isinstance(n, ast.AnnAssign)]
    (trainers,) = (n.value for n in tables if isinstance(n.target, ast.Name) and n.target.id == "TRAINERS")
    assert isinstance(trainers, ast.Dict)
    assert {row.trainer for row in ROWS} == {ast.literal_eval(key) for key in trainers.keys if key is not None}
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_row_that_differs_says_why_and_no_other_row_does() -> None:
    assert all(bool(row.differs) == bool(row.reason) for row in ROWS)


def test_rows_for_the_peer_are_plain_data() -> None:
    rows = [row.for_peer() for row in ROWS]
    assert json.loads(json.dumps(rows)) == rows


def test_equal_numbers_pass() -> None:
    assert EQUAL.failures == [] and EQUAL.verdict == "equal"


@pytest.mark.parametrize(
    "other",
    [
        {"loss": 0.50002},
        {"loss": float("nan")},
        {"norm": 2.0001},
        {"norm": float("nan")},
        {"apart": 1e-3},  # equally long, in another direction
    ],
)
def test_a_number_over_the_bar_fails(other: dict[str, float]) -> None:
    assert replace(EQUAL, **other).failures


def test_the_bar_is_absolute_for_small_losses_and_relative_for_large_ones() -> None:
    assert not replace(EQUAL, loss=0.500009).failures
    assert not replace(EQUAL, loss=100.0009, peer_loss=100.0).failures
    assert replace(EQUAL, loss=100.002, peer_loss=100.0).failures


def test_a_reason_excuses_only_the_quantity_it_names() -> None:
    measured = replace(EQUAL, row=EXCUSED, loss=0.7)
    assert measured.failures == [] and measured.verdict == "differs: another divisor"
    assert replace(measured, norm=2.5).failures == ["the gradient differs"]


def test_a_reason_that_no_longer_holds_fails() -> None:
    assert replace(EQUAL, row=EXCUSED).failures == ["the loss was expected to differ and does not"]


def test_every_objective_gives_a_finite_loss_and_a_gradient_and_leaves_none_behind(world: World) -> None:
    for row in ROWS:
        loss = row.ours(world)
        size = parity.norm(parity.gradient(world))
        assert abs(loss) < 1e6 and 0 < size < 1e6, row.name
    assert parity.gradient(world) == {}


def test_a_peer_with_our_own_numbers_is_equal_and_one_with_others_fails(world: World, tmp_path: Path) -> None:
    row = EQUAL.row
    (tmp_path / "gradients").mkdir()

    def peer(scale: float) -> Measured:
        (tmp_path / "peer.json").write_text(json.dumps({"losses": {row.name: scale * row.ours(world)}}))
        scaled = {name: scale * tensor for name, tensor in parity.gradient(world).items()}
        save_file(scaled, tmp_path / "gradients" / "0.safetensors")
        (measured,) = compare(world, [row], tmp_path)
        return measured

    assert peer(1.0).failures == []
    wrong = peer(1.001)
    assert wrong.failures == ["the loss differs", "the gradient differs"]
    assert "**FAILS**" in parity.table([wrong])
