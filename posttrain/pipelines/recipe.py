"""Pipeline recipes: one TOML file with stages in order, training or data, and the expected results.

A training stage has the settings of its algorithm's recipe. `{name}` in a setting is the product of an earlier stage: a
model's folder or a data file. Everything is checked before the first stage starts.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from posttrain import config
from posttrain.pipelines.card import CardConfig
from posttrain.pipelines.data_stages import DATA_STAGES
from posttrain.pipelines.figures import Figure, read_figure
from posttrain.types import ConfigError, Json, JsonView

GIVEN = "model"
"""Kind of a stage that only names an existing model, so that it is evaluated like the others."""
"""Algorithms that train a model to score completions, not to write them."""
REFERENCE = re.compile(r"\{([A-Za-z0-9_-]+)\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_RESERVED = ("card", "defaults", "figure")
"""Names that a stage cannot have, because settings and results use them."""
TABLES = {
    "pipeline": "The pipeline's name and that of its folder: lower-case letters, digits and hyphens.",
    "about": "One line, printed first and shown in the report.",
    "time": "Measured duration, for readers.",
    "defaults": "[defaults.SECTION]: settings for all training stages whose recipe has them; a stage's own win.",
    "card": "How every model is evaluated.",
    "stage": "[[stage]]: the stages in order.",
    "mini": "Settings of the miniature, as `'STAGE.section.key' = value`; `--mini` applies them and expects nothing.",
    "figure": "[[figure]]: figures drawn at the end.",
    "expect": "Expected results, as `'STAGE.number' = [lowest, highest]`; results outside are reported at the end.",
}
"""Tables of a pipeline's file."""
STAGE = {
    "name": "Name used by later stages: lower-case letters, digits and hyphens.",
    "run": "An algorithm, a data stage, or `model` for an existing model.",
    "card": "Whether its model is evaluated; by default true for models that write completions.",
    "reference": "Reference model for the card's KL; by default the first stage's if its run is `model`, else abacus.",
}
"""Keys of a stage's table besides its settings."""


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline. `settings` are as written; `overrides` have dotted names and win over them."""

    name: str
    run: str
    settings: JsonView
    card: bool = True
    """Whether the stage's model is evaluated."""
    reference: str = ""
    """Reference model for the card's KL; empty is the pipeline's first model."""
    overrides: JsonView = field(default_factory=lambda: {})

    @property
    def is_training(self) -> bool:
        """Whether the stage runs a training algorithm."""
        return self.run in config.RECIPES

    def resolve(self, made: Mapping[str, str]) -> Any:
        """The algorithm's recipe or the data stage's settings, with references filled from `made` (stage → product)."""
        settings, overrides = filled(self.settings, made), filled(self.overrides, made)
        if self.is_training:
            return config.resolve(self.run, settings, overrides)
        cls = GivenModel if self.run == GIVEN else DATA_STAGES[self.run][0]
        return config.settings_from(cls, {**settings, **overrides}, "")

    def described(self, made: Mapping[str, str]) -> Json:
        """What `resolve` gives, for JSON, without the run folder, which does not change the result."""
        resolved = self.resolve(made)
        if not self.is_training:
            return asdict(resolved)
        return config.identity(config.as_dict(replace(resolved, run=replace(resolved.run, out=""))))

    def needs(self) -> set[str]:
        """Names of the stages whose products this one uses."""
        found: set[str] = set()
        _collect([self.settings, self.overrides, self.reference], found)
        return found


@dataclass(frozen=True)
class GivenModel:
    path: str = "abacus"
    """Folder or hub id of an existing model, or `abacus`."""


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline. `expect` maps a result's name to its lowest and highest value; `text` is the file's text."""

    name: str
    about: str
    stages: tuple[Stage, ...]
    card: CardConfig
    figures: tuple[Figure, ...]
    expect: Mapping[str, tuple[float, float]]
    time: str
    text: str
    mini: bool = False

    def missed(self, results: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """The expectations that the results do not meet; a missing result meets none."""
        nothing = float("nan")
        return {
            name: (low, high)
            for name, (low, high) in self.expect.items()
            if not low <= results.get(name, nothing) <= high
        }


def read_pipeline(path: Path, settings: JsonView | None = None, mini: bool = False) -> Pipeline:
    """Reads a pipeline from its file. `settings` are named `stage.section.key`, `card.key` or `defaults.section.key`;
    `mini` applies the `[mini]` table, with lower priority.

    Raises ConfigError naming the file and the stage: for unknown settings, for references that are not to an earlier
    stage, and for anything that a recipe itself rejects.
    """
    text, raw = _read(path)
    try:
        changed = {**(_flat(_table(raw, "mini")) if mini else {}), **(settings or {})}
        given = _tables(raw, "stage")
        names = [str(table.get("name", "")) for table in given]
        per_stage = _overrides(changed, [*names, "card", "defaults"])
        defaults = _defaults(_table(raw, "defaults"), per_stage.get("defaults", {}))
        stages = [_stage(table, defaults, per_stage.get(str(table.get("name")), {})) for table in given]
        card = config.settings_from(CardConfig, {**_table(raw, "card"), **per_stage.get("card", {})}, "card")
        _check(stages)
        figures = _figures(_tables(raw, "figure"), names)
        bounds = {name: _bounds(name, value, names) for name, value in _flat(_table(raw, "expect")).items()}
        expect = {} if mini else bounds
    except ConfigError as error:
        raise ConfigError(f"pipeline {path}: {error}") from None
    about, time = str(raw.get("about", "")), str(raw.get("time", ""))
    return Pipeline(raw["pipeline"], about, tuple(stages), card, figures, expect, time, text, mini)


def _read(path: Path) -> tuple[str, Json]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"pipeline {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"pipeline {path} is not valid TOML: {error}.") from None
    if "algorithm" in raw and "pipeline" not in raw:
        command = f"posttrain {raw['algorithm']} {path}"
        raise ConfigError(f"{path} sets `algorithm`, so it is a single run, not a pipeline; use `{command}`.")
    if not isinstance(raw.get("pipeline"), str) or not _NAME.fullmatch(raw["pipeline"]):
        raise ConfigError(
            f"pipeline {path}: `pipeline = {raw.get('pipeline')!r}` is not a valid name; use lower-case letters, "
            "digits and hyphens."
        )
    for name in raw:
        if name not in TABLES:
            raise ConfigError(f"pipeline {path}: unknown table {name!r}{config.nearest(name, list(TABLES))}")
    return text, raw


def _table(raw: JsonView, name: str) -> Json:
    found = raw.get(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{name}={found!r} is not a table; write [{name}] with settings below it.")
    return found


def _tables(raw: JsonView, name: str) -> list[Json]:
    found = raw.get(name, [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise ConfigError(f"{name} must be written as [[{name}]] tables.")
    return found


def _stage(table: JsonView, defaults: Mapping[str, Json], overrides: JsonView) -> Stage:
    rest = dict(table)
    name, run = str(rest.pop("name", "")), str(rest.pop("run", ""))
    if not _NAME.fullmatch(name):
        raise ConfigError(f"stage name {name!r} is not valid; set `name` to lower-case letters, digits and hyphens.")
    kinds = [*config.RECIPES, *DATA_STAGES, GIVEN]
    if run not in kinds:
        raise ConfigError(f"stage {name!r}: unknown run = {run!r}{config.nearest(run, kinds)}")
    makes_policy = run == GIVEN or (run in config.RECIPES and config.RECIPES[run]().facts().trains == "policy")
    has_card = rest.pop("card", makes_policy)
    if not isinstance(has_card, bool):
        raise ConfigError(f"stage {name!r}: card={has_card!r} is not true or false.")
    reference = str(rest.pop("reference", ""))
    settings = _with_defaults(run, rest, defaults) if run in config.RECIPES else rest
    return Stage(name, run, settings, has_card, reference, overrides)


def _with_defaults(run: str, settings: JsonView, defaults: Mapping[str, Json]) -> Json:
    """A stage's sections merged over the defaults that its recipe knows."""
    known = _settings_of(run)
    found: Json = {
        section: {key: value for key, value in values.items() if f"{section}.{key}" in known}
        for section, values in defaults.items()
    }
    for section, values in settings.items():
        found[section] = {**found.get(section, {}), **values} if isinstance(values, Mapping) else values
    return {section: values for section, values in found.items() if values != {}}


def _defaults(written: JsonView, overrides: JsonView) -> dict[str, Json]:
    """Section → setting → value for all training stages; each setting must belong to some algorithm."""
    known = sorted(set().union(*map(_settings_of, config.RECIPES)))
    found: dict[str, Json] = {}
    for written_name, value in {**_flat(written), **overrides}.items():
        name = config.current_name(written_name, known)
        if name not in known:
            raise ConfigError(f"unknown setting {'defaults.' + name!r}{config.nearest(name, known)}")
        section, _, key = name.partition(".")
        found.setdefault(section, {})[key] = config.current_value(written_name, name, value)
    return found


def _settings_of(algorithm: str) -> set[str]:
    recipe = config.RECIPES[algorithm]()
    return {f"{s.name}.{k.name}" for s in fields(recipe) for k in fields(getattr(recipe, s.name))}


def _flat(values: JsonView, before: str = "") -> Json:
    """Settings by dotted name, so that `sft.train.steps = 2` means the same with and without quotes around the name."""
    found: Json = {}
    for name, value in values.items():
        inner = _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
        found |= inner
    return found


def _overrides(settings: JsonView, names: Sequence[str]) -> dict[str, Json]:
    """stage → setting → value, from `stage.setting` names."""
    found: dict[str, Json] = {}
    for name, value in settings.items():
        stage, _, key = name.partition(".")
        if stage not in names or not key:
            close = config.nearest(stage, list(names))
            raise ConfigError(f"setting {name!r} must be STAGE.SETTING, but no stage is named {stage!r}{close}")
        found.setdefault(stage, {})[key.replace("-", "_")] = value
    return found


def _check(stages: Sequence[Stage]) -> None:
    """Rejects a pipeline whose stages have invalid names, references or settings."""
    if not stages:
        raise ConfigError("there is no [[stage]].")
    before: list[str] = []
    for stage in stages:
        if stage.name in before or stage.name in _RESERVED:
            raise ConfigError(f"the stage name {stage.name!r} is taken; choose another.")
        for name in sorted(stage.needs()):
            if name not in before:
                why = config.nearest(name, before) if before else "; it is the first."
                raise ConfigError(f"stage {stage.name!r} uses {{{name}}}, but no earlier stage has that name{why}")
        try:
            stage.resolve({name: name for name in before})
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}") from None
        before.append(stage.name)


def _figures(tables: Sequence[JsonView], stages: Sequence[str]) -> tuple[Figure, ...]:
    figures = tuple(read_figure(table, stages) for table in tables)
    names = [figure.name for figure in figures]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two figures are named {name!r}; rename one, or its files replace the other's.")
    return figures


def _bounds(name: str, value: Any, stages: Sequence[str]) -> tuple[float, float]:
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(x, int | float) for x in value)
    if not numbers or not value[0] <= value[1]:  # also catches NaN
        raise ConfigError(f"expect.{name}={value!r} is not [lowest, highest].")
    stage = name.partition(".")[0]
    if stage not in [*stages, "figure"]:
        raise ConfigError(f"expect.{name}: {stage!r} is not a stage{config.nearest(stage, [*stages])}")
    return float(value[0]), float(value[1])


def filled(value: Any, made: Mapping[str, str]) -> Any:
    """The value with the `{name}` references in its strings replaced from `made`."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda found: made[found[1]], value)
    if isinstance(value, Mapping):
        return {name: filled(inner, made) for name, inner in value.items()}
    return [filled(inner, made) for inner in value] if isinstance(value, list) else value


def _collect(value: Any, found: set[str]) -> None:
    if isinstance(value, str):
        found.update(REFERENCE.findall(value))
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _collect(inner, found)
