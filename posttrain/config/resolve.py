"""Resolves recipes: TOML and `--section.key value` overrides become frozen dataclasses.

Settings come from the preset in `algo.preset`, the recipe file and the overrides; later ones take precedence.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from posttrain.config.algorithms import RECIPES
from posttrain.config.choices import FilesIn, KeysOf
from posttrain.config.presets import PRESETS
from posttrain.config.renamed import current_name, current_settings, current_value
from posttrain.types import ConfigError, Json, JsonView

T = TypeVar("T")


def read_toml(path: str | Path) -> tuple[str, Json, Json]:
    """Reads a recipe file: (algorithm, settings by section, the `[expect]` table)."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist.") from None
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}.") from None
    if "pipeline" in raw:
        raise ConfigError(f"{path} is a pipeline of several runs; use `posttrain pipeline {path}`.")
    algorithm, expect = raw.pop("algorithm", None), raw.pop("expect", {})
    if not isinstance(algorithm, str) or algorithm not in RECIPES:
        raise ConfigError(f"{path}: algorithm is {algorithm!r}; expected one of {', '.join(RECIPES)}.")
    return algorithm, raw, expect


SHORT = {"loss": "algo.policy_loss"}
"""Names of settings that are neither `section.key` nor the key, as the commands' options call them."""


def resolve(algorithm: str, settings: JsonView, overrides: JsonView | None = None) -> Any:
    """Builds the recipe of `algorithm` from nested settings and then overrides named `section.key` or just `key`."""
    given = _given(RECIPES[algorithm], settings, overrides or {})
    return _build(_with_preset(RECIPES[algorithm](), algorithm, given.get("algo")), given, "")


def resolve_as(cls: type[T], settings: JsonView, overrides: JsonView | None = None) -> T:
    """Like `resolve`, for a recipe class that does not belong to an algorithm, such as `EvalRecipe`."""
    return _build(cls(), _given(cls, settings, overrides or {}), "")


def _given(cls: type, settings: JsonView, overrides: JsonView) -> Json:
    """Settings and overrides by section, under their current names."""
    given = current_settings(settings, _full_names(cls))
    for name, value in overrides.items():
        section, key = locate(cls, name)
        values = given.setdefault(section, {})
        if isinstance(values, dict):  # _build raises an error for anything else
            values[key] = current_value(name, f"{section}.{key}", value)
    return given


def stored(algorithm: str, settings: JsonView) -> Any:
    """The recipe in a run folder's header, which may use old names of settings."""
    return resolve(algorithm, current_settings(settings, _full_names(RECIPES[algorithm]), warn=False))


def _with_preset(default: Any, algorithm: str, algo: Any) -> Any:
    """The defaults of `algorithm` with the preset in the settings, if any."""
    name = algo.get("preset") if isinstance(algo, Mapping) else None
    if not name:
        return default
    presets = PRESETS.get(algorithm, {})
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}{nearest(str(name), [*presets])}")
    return _build(default, presets[name].settings, "")


def locate(cls: type, name: str) -> tuple[str, str]:
    """Finds the (section, key) for `section.key`, or for a key that only one section has."""
    known = _full_names(cls)
    name = current_name(name.replace("-", "_"), known)
    if name in known:
        return known[name]
    hits = [full for full, (_, key) in known.items() if key == name] or [f for f in known if f == SHORT.get(name)]
    if len(hits) == 1:
        return known[hits[0]]
    if hits:
        raise ConfigError(f"setting {name!r} is ambiguous: it could be {' or '.join(sorted(hits))}. Give the section.")
    raise ConfigError(f"unknown setting {name!r}{nearest(name, [*known, *(k for _, k in known.values())])}")


def nearest(name: str, options: list[str]) -> str:
    """`. Did you mean 'x'?`, or `; known: …` if no option is similar."""
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f". Did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(set(options)))}."


@cache
def _full_names(cls: type) -> dict[str, tuple[str, str]]:
    """`section.key` → (section, key) of every setting of a recipe class."""
    return {f"{s.name}.{k.name}": (s.name, k.name) for s in fields(cls) for k in fields(_section_type(cls, s.name))}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def choices(hint: Any) -> tuple[str, ...]:
    """The allowed values of a setting of this type, if they are a fixed list; else nothing."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    listed = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, KeysOf | FilesIn)]
    return listed[0].names() if listed else ()


def _section_type(cls: type, name: str) -> type:
    return _hints(cls)[name]


def _build(default: Any, values: JsonView, where: str) -> Any:
    """`default` with the given values; other defaults of a recipe's section, such as sft's steps, are kept."""
    cls = type(default)
    known = {f.name for f in fields(cls)}
    built: dict[str, object] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown setting {where}{name!r}{nearest(name, sorted(known))}")
        hint = _hints(cls)[name]
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} is a section; write [{name}] with settings below it, not a value.")
            built[name] = _build(getattr(default, name), value, f"{name}.")
        else:
            built[name] = coerce(value, hint, f"{where}{name}")
    return replace(default, **built)


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Converts a TOML value or command-line text to the field's type. Raises ConfigError saying what was expected."""
    if callable(value):
        raise _no_function(value, name)
    origin = typing.get_origin(hint)
    extras = getattr(hint, "__metadata__", ())
    if allowed := choices(hint):
        if isinstance(value, str) and ".py:" in value and any(getattr(extra, "or_file", False) for extra in extras):
            return value
        several = any(isinstance(extra, FilesIn) and extra.several for extra in extras)
        chosen = [part.strip() for part in str(value).split(",") if part.strip()] if several else [value]
        for one in chosen:
            if one not in allowed:
                close = difflib.get_close_matches(str(one), [*map(str, allowed)], n=1, cutoff=0.6)
                meant = f" Did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"{name}={one!r} is not one of {', '.join(filter(None, map(str, allowed)))}.{meant}")
        return value
    if origin is tuple:
        return _coerce_list(value, typing.get_args(hint)[0], name)
    if origin in (types.UnionType, typing.Union):
        return coerce(value, next(a for a in typing.get_args(hint) if a is not type(None)), name)
    if origin is dict:
        return _table(value, name)
    if hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if hint in (int, float) and (isinstance(value, str) or value != value):
        try:
            number = hint(value)
        except ValueError:
            number = math.nan
        if number != number:  # NaN would pass every range check and end up in the weights
            raise ConfigError(f"{name}={value!r} is not {'a whole number' if hint is int else 'a number'}.")
        return number
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} is {type(value).__name__}, expected {hint.__name__}.")
    return value


def _no_function(value: Any, name: str) -> ConfigError:
    """The error for a Python object where a setting is text, with the way to give it."""
    own = getattr(value, "__name__", type(value).__name__)
    way = "Pass it as reward=…" if name == "reward.name" else f"Write it in a file and give its name, 'FILE.py:{own}'"
    return ConfigError(
        f"{name} is the Python object {own!r}, but settings are text and numbers, which a resumed run reads again. "
        f"{way}."
    )


def _coerce_list(value: Any, hint: Any, name: str) -> tuple[Any, ...]:
    """A TOML or JSON list of values of one type; text that is not a JSON list is one value."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name}={value!r} is not a JSON list: {error}.") from None
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(coerce(one, hint, name) for one in values)


def _table(value: Any, name: str) -> Json:
    """A table: a mapping, or TOML or JSON text of one from the command line."""
    if isinstance(value, Mapping):
        return dict(typing.cast(JsonView, value))
    try:
        found = tomllib.loads(f"table = {value}")["table"] if isinstance(value, str) else None
    except tomllib.TOMLDecodeError:
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{name}={value!r} is not a table; write it as {{name = value}}, in quotes on a command line."
        )
    return found


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a config dataclass, its own or inherited, by field name."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _own_docs(base) if is_dataclass(base) else {}
    return docs


def _own_docs(cls: type) -> dict[str, str]:
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    docs: dict[str, str] = {}
    for node, after in zip(body, body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            docs[node.target.id] = after.value.value
    return docs


def as_dict(recipe: object) -> dict[str, Json]:
    """The recipe as section → key → value, for JSON."""
    return {name: _members(section) for name, section in _members(recipe).items()}


def as_toml(algorithm: str, recipe: object, explain: bool = True) -> str:
    """The recipe as TOML that resolves to the same recipe, with an explanation of each setting if `explain`."""
    lines = [f'algorithm = "{algorithm}"']
    for name, section in _members(recipe).items():
        docs = field_docs(type(section))
        lines += ["", f"[{name}]"]
        for key, value in _members(section).items():
            if explain:
                lines.append(f"# {docs[key]}")
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _members(of: object) -> Json:
    """Field → value of a dataclass."""
    assert is_dataclass(of)
    return {field.name: getattr(of, field.name) for field in fields(of)}


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes: JSON's and DEL
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        entries = typing.cast(JsonView, value).items()
        return "{" + ", ".join(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in entries) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, typing.cast("list[Any]", value))) + "]"
    return repr(value)
