"""Reference log-probabilities are computed once, read back bit for bit, and never from a file that does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.data.pairs import pair_rows
from posttrain.models.load import Policy, trainable, with_chat_format
from posttrain.store import cache
from posttrain.train import reference_cache as reference
from posttrain.train.forward import sample_logprobs
from posttrain.train.reference_cache import content_key, reference_logprobs
from posttrain.types import Message, Preference, Sample
from tests import tiny

ROOM = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return tiny.load(folder)


@pytest.fixture(scope="module")
def rows(policy: Policy) -> list[Sample]:
    pairs = [Preference(str(i), (Message("user", f"q{i}"),), "good" * (i + 1), "bad") for i in range(4)]
    return pair_rows(pairs, with_chat_format(policy, "chat"), 100)[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))


def equal(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def test_the_values_are_the_models_own_and_zero_outside_the_mask(policy: Policy, rows: list[Sample]) -> None:
    values, notes = reference_logprobs(policy, rows, ROOM)
    assert equal(values, sample_logprobs(policy, rows, ROOM)) and not notes
    for value, row in zip(values, rows, strict=True):
        assert value.dtype == np.float32 and (value[row.loss_mask] < 0).all() and not value[~row.loss_mask].any()


def test_a_second_call_reads_the_same_bits_and_computes_nothing(
    policy: Policy, rows: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = reference_logprobs(policy, rows, ROOM)

    def refuse(*_: Any) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(reference, "sample_logprobs", refuse)
    again, notes = reference_logprobs(policy, rows, ROOM)
    assert equal(first, again) and not notes


def test_what_was_computed_does_not_follow_the_policy_as_it_learns(folder: Path, rows: list[Sample]) -> None:
    policy = tiny.load(folder)
    before, _ = reference_logprobs(policy, rows, ROOM)
    with torch.no_grad():
        for p in trainable(policy).values():
            p.mul_(1.1)
    assert equal(before, reference_logprobs(tiny.load(folder), rows, ROOM)[0]), "the start is the reference"
    assert not equal(before, reference_logprobs(policy, rows, ROOM)[0]), "other weights must not find the start's file"


def test_adapters_are_off_in_the_reference(folder: Path, rows: list[Sample]) -> None:
    adapted = tiny.load(folder, lora_rank=4)
    with torch.no_grad():
        for p in trainable(adapted).values():
            p.add_(0.1)
    values, _ = reference_logprobs(adapted, rows, ROOM)
    plain, _ = reference_logprobs(tiny.load(folder), rows, ROOM)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(values, plain, strict=True))
    with_them = sample_logprobs(adapted, rows, ROOM)
    assert not all(np.allclose(a, b, atol=1e-3) for a, b in zip(with_them, plain, strict=True))


def test_whatever_decides_the_bits_decides_the_key(folder: Path, tmp_path: Path, rows: list[Sample]) -> None:
    policy = tiny.load(folder)
    key = content_key(policy, rows, ROOM, 1.0)
    other_token = [replace(rows[0], tokens=np.roll(rows[0].tokens, 1)), *rows[1:]]
    other_mask = [replace(rows[0], loss_mask=np.roll(rows[0].loss_mask, -1)), *rows[1:]]
    keys = {
        content_key(policy, other_token, ROOM, 1.0),
        content_key(policy, other_mask, ROOM, 1.0),
        content_key(policy, rows[::-1], ROOM, 1.0),
        content_key(policy, rows[1:], ROOM, 1.0),
        content_key(policy, rows, ROOM + 1, 1.0),
        content_key(policy, rows, ROOM, 0.5),
        content_key(tiny.load(folder, dtype="bfloat16"), rows, ROOM, 1.0),
    }
    with torch.no_grad():
        next(iter(trainable(policy).values()))[0, 0] += 1e-3
    keys.add(content_key(policy, rows, ROOM, 1.0))
    assert len(keys) == 8 and key not in keys
    elsewhere = shutil.copytree(folder, tmp_path / "copy")
    assert content_key(tiny.load(elsewhere), rows, ROOM, 1.0) == key, "where the same model lies is no part of it"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_damaged_anywhere_is_noted_and_computed_again(
    data: st.DataObject, policy: Policy, rows: list[Sample]
) -> None:
    right, _ = reference_logprobs(policy, rows, ROOM)
    (path,) = cache.folder("reference").glob("*.safetensors")
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    path.write_bytes(
        whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    )
    values, notes = reference_logprobs(policy, rows, ROOM)
    assert equal(values, right)
    if notes:  # a flipped bit in the padding of the header changes nothing that is read
        assert "were recomputed" in notes[0]
        assert not reference_logprobs(policy, rows, ROOM)[1], "the damaged file was not replaced"


def test_a_file_of_other_rows_under_this_name_is_not_believed(policy: Policy, rows: list[Sample]) -> None:
    right, _ = reference_logprobs(policy, rows, ROOM)
    (mine,) = cache.folder("reference").glob("*.safetensors")
    reference_logprobs(policy, rows[::-1], ROOM)
    (theirs,) = set(cache.folder("reference").glob("*.safetensors")) - {mine}
    shutil.copy(theirs, mine)
    values, notes = reference_logprobs(policy, rows, ROOM)
    assert equal(values, right) and "belongs to other rows or another model" in notes[0]


def test_a_cache_that_cannot_be_written_is_only_noted(
    policy: Policy, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    values, notes = reference_logprobs(policy, rows, ROOM)
    assert equal(values, sample_logprobs(policy, rows, ROOM)) and "could not be cached in" in notes[0]


def test_the_cache_is_in_the_home_folder_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    assert cache.folder("reference") == Path.home() / ".cache" / "posttrain" / "reference"
    monkeypatch.setenv(cache.VARIABLE, "/somewhere")
    assert cache.folder("reference") == Path("/somewhere/reference")
