"""Recipes: every setting is checked, named, documented and written back, or refused in a sentence."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain import config
from posttrain.cli.arguments import find_recipe, shipped_recipes
from posttrain.types import ConfigError

RECIPES = [find_recipe(name) for name in shipped_recipes()]
SECTIONS = sorted(
    {get_type_hints(cls)[s.name] for cls in config.RECIPES.values() for s in dataclasses.fields(cls)},
    key=lambda cls: cls.__name__,
)


def grpo(**overrides: Any) -> Any:
    """A GRPO recipe from `section__key=value`."""
    return config.resolve("grpo", {}, {name.replace("__", "."): value for name, value in overrides.items()})


@pytest.mark.parametrize("algorithm", config.RECIPES)
def test_no_settings_at_all_is_a_valid_recipe(algorithm: str) -> None:
    assert config.resolve(algorithm, {}) == config.RECIPES[algorithm]()


def test_overrides_win_over_the_file_and_leave_the_rest() -> None:
    recipe = config.resolve("grpo", {"train": {"lr": 1e-3, "steps": 5}}, {"train.lr": "0.5", "group_size": "4"})
    assert (recipe.train.lr, recipe.train.steps, recipe.algo.group_size) == (0.5, 5, 4)


def test_overrides_do_not_change_the_settings_given() -> None:
    settings = {"train": {"lr": 1e-3}}
    config.resolve("grpo", settings, {"train.lr": "0.5"})
    assert settings == {"train": {"lr": 1e-3}}


def test_dashes_and_underscores_name_the_same_setting() -> None:
    assert grpo(**{"group-size": "16"}).algo.group_size == 16


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("algo.group_sise", "algo.group_size"),
        ("lrr", "lr"),
        ("groupsize", "group_size"),
        ("trian.steps", "train.steps"),
    ],
)
def test_an_unknown_override_names_the_nearest_setting(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown setting '{name}'. Did you mean '{meant}'\?"):
        config.resolve("grpo", {}, {name: 1})


def test_an_unknown_setting_in_a_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting train\.'stesp'. Did you mean 'steps'\?"):
        config.resolve("grpo", {"train": {"stesp": 3}})
    with pytest.raises(ConfigError, match=r"unknown setting 'trian'. Did you mean 'train'\?"):
        config.resolve("grpo", {"trian": {"steps": 3}})


def test_a_setting_like_no_other_lists_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'zzz'; known: .*lora_rank"):
        config.resolve("grpo", {"model": {}}, {"zzz": 1})


def test_a_key_in_several_sections_asks_for_the_section() -> None:
    with pytest.raises(ConfigError, match=r"'max_tokens' is ambiguous|'temperature' is ambiguous") as error:
        config.resolve("grpo", {}, {"temperature": 1})
    assert "eval.temperature or rollout.temperature" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"steps": 2.0}}, "train.steps=2.0 is float, expected int."),
        ({"train": {"steps": True}}, "train.steps=True is bool, expected int."),
        ({"train": {"steps": "many"}}, "train.steps='many' is not a whole number."),
        ({"train": {"lr": "fast"}}, "train.lr='fast' is not a number."),
        ({"train": {"lr": True}}, "train.lr=True is bool, expected float."),
        ({"train": {"lr": [1e-3]}}, "train.lr=[0.001] is list, expected float."),
        ({"algo": {"mask_truncated": "yes"}}, "algo.mask_truncated='yes' is str, expected bool."),
        ({"algo": {"mask_truncated": 1}}, "algo.mask_truncated=1 is int, expected bool."),
        ({"algo": {"policy_loss": "cilp"}}, "algo.policy_loss='cilp' is not one of clip, dual-clip, "),
        ({"model": {"path": 3}}, "model.path=3 is int, expected str."),
        ({"train": 3}, "train is a section; write [train] with settings below it, not a value."),
    ],
)
def test_a_value_of_the_wrong_type_says_what_was_expected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.resolve("grpo", settings)
    assert str(error.value).startswith(message)


def test_a_section_given_as_a_value_is_refused_with_overrides_too() -> None:
    with pytest.raises(ConfigError, match="train is a section"):
        config.resolve("grpo", {"train": 3}, {"train.lr": 1})


def test_whole_numbers_and_text_become_the_fields_type() -> None:
    recipe = grpo(train__lr=1, train__steps="7", algo__mask_truncated="True", train__beta1="0.5")
    assert (recipe.train.lr, recipe.train.steps, recipe.algo.mask_truncated, recipe.train.beta1) == (1.0, 7, True, 0.5)
    assert isinstance(recipe.train.lr, float)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"algo__group_size": 1}, "group_size=1 gives every completion an advantage of 0, so nothing would be trained"),
        ({"algo__minibatches": 3}, "32 prompts × 8 completions do not divide into 3 minibatches"),
        ({"algo__prompts": 0}, "prompts=0 must be 1 or more"),
        ({"algo__max_flat_steps": 0}, "max_flat_steps=0 must be 1 or more"),
        ({"rollout__temperature": 0.0}, "rollout.temperature=0 makes all completions of a group equal"),
        ({"rollout__temperature": -1.0}, "rollout.temperature"),
        ({"rollout__slots": 0}, "slots=0 must be 1 or more"),
        ({"rollout__max_tokens": 0}, "max_tokens=0 must be 1 or more"),
        ({"train__steps": 0}, "steps=0 must be 1 or more"),
        ({"train__lr": -1e-4}, "cannot be negative"),
        ({"train__lr": "nan"}, "train.lr='nan' is not a number"),
        ({"train__lr": math.nan}, "train.lr=nan is not a number"),
        ({"train__warmup_steps": -1}, "cannot be negative"),
        ({"train__weight_decay": -0.1}, "cannot be negative"),
        ({"train__beta1": 1.0}, "train.beta1=1.0 and beta2=0.95 must both be in [0, 1)"),
        ({"eval__temperature": -1.0}, "eval.temperature=-1.0 is negative"),
        ({"algo__clip_low": -0.1}, "algo.clip_low=-0.1 cannot be negative"),
        ({"algo__kl_coef": -1.0}, "algo.kl_coef=-1.0 cannot be negative"),
        ({"algo__is_cap": -2.0}, "algo.is_cap=-2.0 cannot be negative"),
        ({"train__micro_batch_tokens": 0}, "micro_batch_tokens=0 must be 1 or more"),
        ({"run__checkpoint_every": 0}, "checkpoint_every=0 must be 1 or more"),
        ({"run__keep": 0}, "keep=0 must be 1 or more"),
        ({"data__holdout": 1.0}, "data.holdout=1.0 is not in [0, 1)"),
        ({"data__count": -1}, "data.count=-1 is negative"),
        ({"model__lora_rank": -1}, "model.lora_rank=-1 is negative"),
        ({"eval__problems": -1}, "eval.problems=-1 is negative. Use 0 to evaluate all"),
        ({"eval__samples": 0}, "samples=0 must be 1 or more"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_it_starts(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        grpo(**overrides)
    assert words in str(error.value)


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_setting_is_explained_under_its_field(cls: type) -> None:
    docs = config.field_docs(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    assert list(docs) == names
    assert all(text.endswith((".", ")")) for text in docs.values())
    assert all("\n" not in text for text in docs.values())  # each becomes one comment line of the written recipe


@pytest.mark.parametrize("explain", [True, False])
@pytest.mark.parametrize("algorithm", config.RECIPES)
def test_a_written_recipe_resolves_to_itself(tmp_path: Path, algorithm: str, explain: bool) -> None:
    recipe = config.resolve(algorithm, {}, {"train.lr": 3e-5, "run.seed": 9})
    path = tmp_path / "recipe.toml"
    path.write_text(config.as_toml(algorithm, recipe, explain), encoding="utf-8")
    name, settings, expect = config.read_toml(path)
    assert (name, config.resolve(name, settings), expect) == (algorithm, recipe, {})


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    number=st.floats(0, allow_infinity=False),
    whole=st.integers(-(2**63), 2**63 - 1),
)
def test_any_text_and_number_survives_being_written(text: str, number: float, whole: int) -> None:
    recipe = config.resolve("grpo", {"data": {"instruction": text}, "train": {"lr": number}, "run": {"seed": whole}})
    raw = tomllib.loads(config.as_toml("grpo", recipe))
    assert config.resolve(raw.pop("algorithm"), raw) == recipe


def test_as_dict_holds_every_setting_by_section() -> None:
    recipe = config.resolve("sft", {})
    assert config.resolve("sft", config.as_dict(recipe)) == recipe


def test_the_expect_table_is_kept_apart_from_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('algorithm = "sft"\n[train]\nsteps = 3\n[expect]\naccuracy = 0.5\n', encoding="utf-8")
    assert config.read_toml(path) == ("sft", {"train": {"steps": 3}}, {"accuracy": 0.5})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("algorithm = ", "is not valid TOML"),
        ("", "algorithm is None; expected one of grpo, sft"),
        ('pipeline = "rlhf"', "is a pipeline of several runs; use `posttrain pipeline "),
        ('algorithm = "gpro"', "algorithm is 'gpro'; expected one of grpo, sft"),
        ('algorithm = ["grpo"]', "algorithm is ['grpo']; expected one of grpo, sft"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        config.read_toml(path)
    assert words in str(error.value) and "r.toml" in str(error.value)


def test_a_recipe_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        config.read_toml(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_toml(tmp_path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_in_the_package_resolves_and_says_what_to_expect(path: Path) -> None:
    algorithm, settings, expect = config.read_toml(path)
    assert isinstance(config.resolve(algorithm, settings), config.RECIPES[algorithm])
    assert expect and all(isinstance(value, str) and value for value in expect.values())
