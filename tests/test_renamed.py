"""Settings under an old name still work and say what to write; a recipe's identity does not depend on names."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from posttrain import api, config
from posttrain.cli.main import main
from posttrain.config.renamed import ADDED, ADDED_SECTIONS, CHANGED, RENAMED, WITHOUT_EFFECT, SettingRenamed
from posttrain.store.run import Run
from tests import tiny

IDENTITIES = {
    "distill": "6e74a83a5052", "dpo": "6b8d04e706c3", "grpo": "107dbdf53379", "online-dpo": "1540b1aeb0e3",
    "ppo": "e0bbe67c24ee", "prm": "f28ea6adf5eb", "raft": "719a5dc9ad45", "reward": "6a572dfa08ae",
    "sft": "95d04bb55d75",
}  # fmt: skip
"""Hashes of the default recipes' identities when pipelines first stored them."""


def owner(setting: str) -> str:
    """An algorithm that has the setting."""
    section, _, key = setting.partition(".")
    return next(name for name, cls in config.RECIPES.items() if key in config.as_dict(cls()).get(section, {}))


def value_of(recipe: Any, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(recipe, section), key)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_sets_the_new_setting_and_says_so(old: str, new: str) -> None:
    algorithm = owner(new)
    value = {int: 7, float: -2.5, bool: True, str: "penalise"}[type(value_of(config.resolve(algorithm, {}), new))]
    section, _, key = old.partition(".")
    for settings, overrides in (({section: {key: value}}, {}), ({}, {old: value}), ({}, {key: value})):
        with pytest.warns(SettingRenamed, match=f"setting {old} was renamed to {new}"):
            assert value_of(config.resolve(algorithm, settings, overrides), new) == value


@pytest.mark.parametrize("algorithm", config.RECIPES)
def test_a_recipe_keeps_its_identity_under_new_names_and_with_later_settings(algorithm: str) -> None:
    recipe = config.resolve(algorithm, {})
    described = config.identity(config.as_dict(recipe))
    names = {f"{section}.{key}" for section, values in described.items() for key in values}
    assert not names & set(ADDED) and not names & set(RENAMED.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SettingRenamed)
        read = config.resolve(algorithm, described)
    assert read == replace(recipe, data=replace(recipe.data, count=CHANGED["data.count", "0"]))
    sections = [s for s in fields(recipe) if s.name not in WITHOUT_EFFECT]
    known = {f"{s.name}.{k.name}" for s in sections for k in fields(getattr(recipe, s.name))}
    added = {f"{s}.{k}" for s, values in ADDED_SECTIONS.items() for k in values if vars(getattr(recipe, s)) == values}
    assert len(names) == len(known - set(ADDED) - added)


def test_a_later_setting_that_is_used_is_part_of_the_identity() -> None:
    recipe = config.resolve("sft", {}, {"run.track": "tensorboard"})
    assert config.identity(config.as_dict(recipe))["run"]["track"] == "tensorboard"


def test_the_command_line_says_what_to_write_and_goes_on() -> None:
    done = CliRunner().invoke(main, ["config", "sft", "--train.tokens_per_pass", "99", "--bare"])
    assert done.exit_code == 0 and "micro_batch_tokens = 99" in done.output
    assert "setting train.tokens_per_pass was renamed to train.micro_batch_tokens" in done.output


def test_a_run_folder_with_old_names_resumes_without_a_word(tmp_path: Path) -> None:
    model = tiny.chatty(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "a", "completion": w}) + "\n" for w in "bcdefg"))
    settings = {"model.path": str(model), "data.tasks": str(tmp_path / "rows.jsonl"), "run.out": str(tmp_path / "run")}
    settings |= {"algo.batch_rows": 2, "data.holdout": 0.0, "train.micro_batch_tokens": 64}
    whole = api.start("sft", config.resolve("sft", {}, settings)).summary
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    header["recipe"] = config.identity(header["recipe"])
    assert "tokens_per_pass" in header["recipe"]["train"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(header))
    assert api.resume(tmp_path / "run").summary == whole
    with Run.read(tmp_path / "run") as run:
        assert run.header["recipe"]["train"]["tokens_per_pass"] == 64


@pytest.mark.parametrize(("algorithm", "stored"), IDENTITIES.items())
def test_settings_added_later_leave_the_identity_of_a_stage_as_stored(algorithm: str, stored: str) -> None:
    identity = config.identity(config.as_dict(config.resolve(algorithm, {})))
    assert hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12] == stored
