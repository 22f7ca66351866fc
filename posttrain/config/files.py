"""Reads TOML settings files other than recipes, such as a judge's, into dataclasses."""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config.resolve import coerce, nearest
from posttrain.types import ConfigError

T = TypeVar("T")
SHIPPED_RECIPES = Path(__file__).parent / "recipes"
"""Folder of the recipes that ship with the package."""


def read_settings(cls: type[T], path: Path, what: str, usage: str) -> T:
    """Reads a TOML file into the dataclass `cls`, whose fields may be dataclasses, tuples and mappings.

    Raises ConfigError that begins with `what` (e.g. "judge") and the file; if the file is unreadable, it gives `usage`.
    """
    try:
        return settings_from(cls, tomllib.loads(path.read_text(encoding="utf-8")), "")
    except OSError as error:
        raise ConfigError(f"{what} file {path} cannot be read: {error.strerror}. Write {usage}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} file {path} is not valid TOML: {error}.") from None
    except ConfigError as error:
        raise ConfigError(f"{what} file {path}: {error}") from None


def settings_from(cls: Any, values: Any, where: str) -> Any:
    """Converts a TOML table named `where` into a dataclass. Raises ConfigError, also for unknown names."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}={values!r} is {type(values).__name__}, expected a table of settings.")
    hints, known = typing.get_type_hints(cls), [f.name for f in fields(cls)]
    built: dict[str, object] = {}
    for name, value in values.items():
        at = f"{where}.{name}" if where else name
        if name not in known:
            raise ConfigError(f"unknown setting {at!r}{nearest(name, known)}")
        built[name] = _setting(hints[name], value, at)
    return cls(**built)


def _setting(hint: Any, value: Any, at: str) -> Any:
    if is_dataclass(hint):
        return settings_from(hint, value, at)
    kind = typing.get_origin(hint)
    if kind is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{at}={value!r} is {type(value).__name__}, expected a list.")
        return tuple(_setting(typing.get_args(hint)[0], one, at) for one in value)
    if kind is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{at}={value!r} is {type(value).__name__}, expected a table.")
        return value
    return coerce(value, hint, at)
