"""Checkpoints: what comes back, what is refused, and what is kept."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.store import checkpoint, durable
from posttrain.store.checkpoint import Checkpoint, latest, load, save, weights_digest
from posttrain.store.durable import DiskError
from posttrain.types import DataError, ResumeError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def tensors_of(number: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 2), float(number)), "b": torch.arange(5)}, "optim": {"a": torch.ones(2)}}


def saved(run_folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save(run_folder, step, tensors_of(step), {"step": step}, keep)


def newest(run_folder: Path) -> Checkpoint:
    found = latest(run_folder)
    assert found is not None
    return found


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    state = {"step": 3, "kl": 0.1 + 0.2, "big": 2**70, "list": [1, None, True, "é"], "nested": {"a": 1e-310}}
    path = save(tmp_path, 3, tensors_of(3), state, keep=1)
    tensors, loaded = load(newest(tmp_path))
    assert path == tmp_path / "ckpt" / "step_0000003" and loaded == state
    assert {group: weights_digest(named) for group, named in tensors.items()} == {
        group: weights_digest(named) for group, named in tensors_of(3).items()
    }


def test_every_dtype_and_layout_survives_and_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    named = {str(dtype): torch.arange(-2, 4).to(dtype).reshape(2, 3) for dtype in DTYPES}
    named |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "transposed": torch.randn(3, 4).t()}
    named |= {"tied": named["transposed"], "slice": torch.arange(10)[::3], "grad": torch.ones(2, requires_grad=True)}
    path = save(tmp_path, 1, {"model": named, "none": {}}, {}, keep=1)
    loaded = safetensors.torch.load((path / "model.safetensors").read_bytes())
    assert loaded.keys() == named.keys() and load(path)[0]["none"] == {}
    for name, tensor in named.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
    assert weights_digest(loaded) == weights_digest(named) == weights_digest(load(path, ["model"])[0]["model"])


def test_only_the_groups_asked_for_are_loaded(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert load(newest(tmp_path), only=["model"])[0].keys() == {"model"}
    assert load(newest(tmp_path), only=[])[0] == {}
    with pytest.raises(ResumeError, match="has no group 'ref'; it has model, optim"):
        load(newest(tmp_path), only=["ref"])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    saved(tmp_path, 2, 4, 6, 8, keep=keep)
    assert [step for step, _ in checkpoint.folders(tmp_path)] == [8, 6, 4, 2][:keep]


def test_a_damaged_checkpoint_does_not_count_among_the_kept(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    (tmp_path / "ckpt" / "step_0000004" / "model.safetensors").write_bytes(b"")
    saved(tmp_path, 6, keep=2)
    assert [step for step, _ in checkpoint.folders(tmp_path)] == [6, 2]


def test_a_folder_left_by_a_killed_save_is_removed_by_the_next(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / "ckpt" / ".tmp-step_0000004-1").mkdir()
    saved(tmp_path, 4)
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["step_0000002", "step_0000004"]


def test_saving_equal_bytes_again_keeps_the_folder_and_other_bytes_replace_it(tmp_path: Path) -> None:
    first = save(tmp_path, 2, tensors_of(2), {"step": 2}, 2).stat().st_ino
    assert save(tmp_path, 2, tensors_of(2), {"step": 2}, 2).stat().st_ino == first
    assert save(tmp_path, 2, tensors_of(3), {"step": 2}, 2).stat().st_ino != first
    assert load(newest(tmp_path))[0]["model"]["a"][0, 0] == 3
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step_0000002"]


def test_saving_over_a_damaged_checkpoint_repairs_it(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / "ckpt" / "step_0000002" / "state.json").write_bytes(b"{}")
    saved(tmp_path, 2)
    assert newest(tmp_path) == Checkpoint(2, tmp_path / "ckpt" / "step_0000002")


def damage_model(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "bit flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-1], "empty": b"", "longer": data + b"\0"}.get(how, data))


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "empty", "longer", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"])
def test_a_damaged_checkpoint_is_passed_over_and_reported_in_one_line(tmp_path: Path, name: str, how: str) -> None:
    saved(tmp_path, 2, 4)
    damage_model(tmp_path / "ckpt" / "step_0000004" / name, how)
    found = newest(tmp_path)
    assert found.step == 2 and len(found.skipped) == 1
    assert "step_0000004 is damaged" in found.skipped[0] and "\n" not in found.skipped[0]
    with pytest.raises(ResumeError, match="is damaged"):
        load(tmp_path / "ckpt" / "step_0000004")


def test_no_flipped_bit_anywhere_loads_as_something_else(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    folder = tmp_path / "ckpt" / "step_0000004"
    good, expected = 0, weights_digest(tensors_of(4)["model"])
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for bit in range(0, 8 * len(data), 7):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                tensors, state = load(folder)
            except ResumeError:
                continue
            assert state == {"step": 4} and weights_digest(tensors["model"]) == expected
            good += 1  # white space of the manifest
        path.write_bytes(data)
    assert good < 20


def test_only_damaged_checkpoints_are_an_error_and_not_a_silent_new_start(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / "ckpt" / "step_0000002" / "MANIFEST.json").unlink()
    with pytest.raises(ResumeError, match="has no usable checkpoint: .*MANIFEST.json is missing.*start again"):
        latest(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    [b"[]", b"7", b"{}", b'{"format": 1, "step": 2, "files": {}}', b'{"format": 1, "step": 2, "files": []}', b"\xff"]
    + [b'{"format": 1, "step": 3, "files": {}}', b'{"format": 2, "step": 2, "files": {}}']
    + [b'{"format": 1, "step": 2, "files": {"../../secret.json": {"size": 1, "sha256": ""}}}'],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, manifest: bytes) -> None:
    saved(tmp_path, 2)
    (tmp_path / "ckpt" / "step_0000002" / "MANIFEST.json").write_bytes(manifest)
    with pytest.raises(ResumeError, match="has no usable checkpoint"):
        latest(tmp_path)


def test_a_pickle_with_a_sound_manifest_is_not_executed(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    folder = tmp_path / "ckpt" / "step_0000002"
    target = tmp_path / "executed"
    attack = b"cposix\nsystem\n(S'touch " + str(target).encode() + b"'\ntR."
    (folder / "model.safetensors").write_bytes(attack)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    entry = {"size": len(attack), "sha256": hashlib.sha256(attack).hexdigest()}
    manifest["files"]["model.safetensors"] = entry
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(ResumeError, match="cannot be read"):
        load(newest(tmp_path))
    assert not target.exists()
    pickle.loads(attack)
    assert target.exists(), "the attack itself works"


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(DiskError, match=r"step 4 needs .* MB free .*twice its size.*earlier checkpoints are intact"):
        saved(tmp_path, 4)
    assert DiskError.exit_code == 8 and newest(tmp_path).step == 2
    assert durable.free_bytes(tmp_path) == 100


@pytest.mark.parametrize(
    ("state", "message"),
    [({"a": float("nan")}, "not JSON"), ({"a": torch.ones(1)}, "not JSON"), ({"a": (1, 2)}, "'a' would change")]
    + [({"a": {1: 2}}, "'a' would change"), ({1: 2}, "1 would change")],
)
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        save(tmp_path, 1, tensors_of(1), state, 1)
    assert latest(tmp_path) is None


@pytest.mark.parametrize(
    "tensors",
    [
        {"../x": {}},
        {"": {}},
        {"m": {"c": torch.ones(1, dtype=torch.complex64)}},
        {"m": {"__metadata__": torch.ones(1)}},
    ],
)
def test_tensors_and_names_that_a_file_cannot_hold_are_refused_before_writing(tmp_path: Path, tensors: Any) -> None:
    with pytest.raises(DataError, match="cannot be"):
        save(tmp_path, 1, tensors, {}, 1)
    assert not (tmp_path / "ckpt").exists()


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.lists(st.floats(width=32), max_size=4), max_size=4))
def test_the_digest_depends_on_content_and_not_on_order(values: dict[str, list[float]]) -> None:
    named = {name: torch.tensor(row, dtype=torch.float32) for name, row in values.items()}
    assert weights_digest(dict(reversed(named.items()))) == weights_digest(named)
    for name, tensor in named.items():
        changes = [{"renamed" + name: tensor}, {name: tensor.double()}, {name: tensor.reshape(1, -1)}]
        for change in [*changes, {name: torch.cat([tensor, torch.zeros(1)])}]:
            others = {other: value for other, value in named.items() if other != name}
            assert weights_digest(others | change) != weights_digest(named)


def test_two_processes_write_equal_bytes(tmp_path: Path) -> None:
    script = "import sys, pathlib; from tests.test_store_checkpoint import saved; saved(pathlib.Path(sys.argv[1]), 2)"
    root = Path(__file__).parent.parent
    saved(tmp_path, 2)
    (tmp_path / "b").mkdir()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "b")], cwd=root, check=True)
    for path in (tmp_path / "ckpt" / "step_0000002").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "ckpt" / "step_0000002" / path.name).read_bytes()
