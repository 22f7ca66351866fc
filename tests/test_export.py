"""The trained model is written completely or not at all, and a run finishes only with it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from posttrain import api, config
from posttrain.models.export import export
from posttrain.models.load import load_policy
from posttrain.store import durable
from posttrain.store.durable import DiskError
from posttrain.store.run import Run
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model") / "base")


def settings(model: Path, run: Path) -> dict[str, Any]:
    return {"model.path": str(model), "data.tasks": str(model.parent / "rows.jsonl"), "train.steps": 1,
            "data.holdout": 0.5, "run.out": str(run), "train.lr": 1e-3}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_file_is_synced_before_the_folder_gets_its_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    plain, rename = durable.sync_file, durable.rename
    monkeypatch.setattr(durable, "sync_file", lambda path: (synced.append(path), plain(path))[1])

    def renamed(source: Path, target: Path) -> None:
        assert {path.name for path in synced} == {path.name for path in source.iterdir()}
        rename(source, target)

    monkeypatch.setattr(durable, "rename", renamed)
    policy = load_policy(config.ModelConfig(path=str(model)))
    export(policy, tmp_path / "model")
    first = contents(tmp_path / "model")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(first) and all(first.values())
    export(policy, tmp_path / "model")  # replaces it
    assert contents(tmp_path / "model") == first and [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fault", ["sync_file", "sync_folder", "rename"])
def test_a_full_disk_leaves_no_half_model_and_resume_writes_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    rows = "".join(f'{{"prompt": "q{i}", "completion": "a"}}\n' for i in range(8))
    (model.parent / "rows.jsonl").write_text(rows)
    run = tmp_path / "run"
    plain = getattr(durable, fault)

    def full(*paths: Path) -> None:
        if ".tmp-model" in str(paths[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(*paths)

    monkeypatch.setattr(durable, fault, full)
    recipe = config.resolve("sft", {}, settings(model, run))
    with pytest.raises(DiskError, match="writing the trained model .* No space left"):
        api.start("sft", recipe)
    monkeypatch.undo()
    assert not (run / "model").exists() and not list(run.glob(".tmp-model*"))
    with Run.read(run) as store:
        assert store.summary() is None
    assert api.resume(run).summary is not None and (run / "model" / "config.json").stat().st_size
    whole = api.start("sft", config.resolve("sft", {}, settings(model, tmp_path / "whole")))
    assert contents(whole.model) == contents(run / "model")


def test_a_leftover_and_a_file_in_its_place_are_no_silent_fault(model: Path, tmp_path: Path) -> None:
    policy = load_policy(config.ModelConfig(path=str(model)))
    (tmp_path / ".tmp-model").mkdir()
    (tmp_path / ".tmp-model" / "half").write_text("x")
    export(policy, tmp_path / "model")
    assert "half" not in contents(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiskError, match="file failed"):
        export(policy, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
