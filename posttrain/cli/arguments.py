"""Parses CLI arguments: recipes, a run's settings, and `--section.key value` settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from posttrain import config
from posttrain.config.files import SHIPPED_RECIPES
from posttrain.types import ConfigError, JsonView

FREE = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings of a command that takes `--section.key value` settings besides its own options."""
RECIPE_HELP = "RECIPE is a TOML file or a shipped recipe's name. Override any setting with `--section.key value`."


def split_settings(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates positional arguments from `--key value` and `--key=value` settings."""
    words: list[str] = []
    settings: dict[str, str] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"setting --{key} has no value; write --{key} VALUE.")
            value = rest.pop(0)
        settings[key] = value
    return words, settings


def options_of(algorithm: str) -> list[tuple[str, str, str]]:
    """(option, setting, help) of the options that an algorithm's command has: short names of its most used settings."""
    recipe = config.RECIPES[algorithm]
    sections = {section.name for section in fields(recipe)}
    judged = "reward" in sections
    found = [("--model", "model.path", "Model folder, hub id, or `abacus`.")]
    if judged and "pairs" not in sections:
        found.append(("--tasks", "data.tasks", "Built-in task, JSONL/Parquet file, or dataset id."))
    else:
        found.append(("--data", "data.tasks", "JSONL/Parquet file, dataset id, or task."))
    if judged:
        found.append(
            ("--reward", "reward.name", "`auto`, a verifier, FILE.py:FUNCTION, model:FOLDER, or judge:FILE.toml.")
        )
    if presets := config.PRESETS.get(algorithm):
        found.append(
            ("--preset", "algo.preset", f"Settings of a paper or another implementation: {', '.join(presets)}.")
        )
    if hasattr(recipe().algo, "policy_loss"):
        found.append(("--loss", "algo.policy_loss", "Policy loss: a name, or your own as FILE.py:FUNCTION."))
    return [*found, ("--out", "run.out", "Run folder.")]


def find_recipe(name: str) -> Path:
    """Path of a recipe file, or of a shipped recipe by name."""
    shipped = SHIPPED_RECIPES
    for path in (Path(name), shipped / name, shipped / f"{name}.toml"):
        if path.is_file():
            return path
    known = shipped_recipes() + shipped_recipes("pipeline")
    raise ConfigError(f"recipe {name!r} does not exist{config.nearest(name, known)}")


def shipped_recipes(kind: str = "algorithm") -> list[str]:
    """Names of the shipped recipes, of single runs or of pipelines."""
    found = sorted(SHIPPED_RECIPES.glob("*.toml"))
    return [path.stem for path in found if kind in tomllib.loads(path.read_text(encoding="utf-8"))]


def sections_of(model: str) -> dict[str, dict[str, object]]:
    """The settings of a run, or of a checkpoint's run, that an evaluation has, too; nothing for other models."""
    from posttrain.store.listing import run_of  # listing commands should not wait for SQLite and NumPy
    from posttrain.store.run import Run

    run = run_of(model)
    if run is None:
        return {}
    with Run.read(run) as store:
        recipe = config.as_dict(config.stored(store.header["algorithm"], store.header["recipe"]))
    known = config.as_dict(config.EvalRecipe())
    recipe.pop("cluster")  # who computed the run says nothing about who evaluates it
    return {name: {k: v for k, v in recipe[name].items() if k in known[name]} for name in known if name in recipe}


def read_evaluation(
    args: Sequence[str], given: Mapping[str, str | None], base: Mapping[str, Mapping[str, object]], whole: bool = False
) -> config.EvalRecipe:
    """The resolved settings of an evaluation; options that were not given change nothing.

    With `whole`, all rows of a file in `data.tasks` are evaluated, unless `base` was trained on it.
    """
    words, settings = split_settings(args)
    if words:
        raise ConfigError(f"unexpected argument {words[0]!r}; settings are written --section.key value.")
    overrides = {k: v for k, v in given.items() if v is not None} | settings
    if whole:
        from posttrain.data.reading import evaluation_settings

        overrides = evaluation_settings(overrides, str(base.get("data", {}).get("tasks", "")))
    return config.resolve_as(config.EvalRecipe, base, overrides)


def read_recipe(algorithm: str | None, args: Sequence[str]) -> tuple[str, Any]:
    """Algorithm and resolved recipe from a command's arguments, those of `posttrain ALGORITHM`.

    Options such as `--model` stand for settings (`options_of`). Without `algorithm`, the first argument may also name
    one.
    """
    words, settings = split_settings(args)
    if len(words) > 1:
        raise ConfigError(f"expected one recipe, got {len(words)}: {' '.join(words)}.")
    sections: JsonView = {}
    found = algorithm
    if words and not (words[0] in config.RECIPES and algorithm is None):
        found, sections, _ = config.read_toml(find_recipe(words[0]))
        if algorithm is not None and algorithm != found:
            raise ConfigError(f"recipe {words[0]!r} is for `posttrain {found}`, not `posttrain {algorithm}`.")
    found = found or words[0]
    return found, config.resolve(found, sections, _full_names(found, settings))


def _full_names(algorithm: str, settings: Mapping[str, str]) -> dict[str, str]:
    """The settings by their full names. Raises ConfigError if an option and its setting have different values."""
    names = {option.removeprefix("--"): setting for option, setting, _ in options_of(algorithm)}
    for option, setting in names.items():
        if {option, setting} <= settings.keys() and settings[option] != settings[setting]:
            raise ConfigError(
                f"--{option} {settings[option]} and --{setting} {settings[setting]} contradict each other. Give one."
            )
    return {names.get(name, name): value for name, value in settings.items()}


def resumed(args: Sequence[str]) -> tuple[str, dict[str, object]]:
    """The run and the changed cluster settings of `posttrain resume`. Raises ConfigError for settings of others."""
    words, settings = split_settings(args)
    if len(words) != 1:
        raise ConfigError(f"name one run, got {len(words)}: {' '.join(words) or 'none'}.")
    if other := [name for name in settings if not name.startswith("cluster.")]:
        raise ConfigError(
            f"--{other[0]} cannot be changed when a run is resumed, because the result would. Only --steps and "
            "--cluster settings can; for others start a new run."
        )
    section = config.resolve("grpo", {}, {"train.lanes": 1 << 20, **settings}).cluster
    names = [name.partition(".")[2].replace("-", "_") for name in settings]
    return words[0], {name: getattr(section, name) for name in names}
