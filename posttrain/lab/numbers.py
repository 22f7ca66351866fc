"""Numbers that an address gives. Each raises ConfigError for what is no number of the range, saying which it wants."""

from __future__ import annotations

import math
from collections.abc import Mapping

from posttrain.types import ConfigError


def number(given: Mapping[str, str], name: str, low: float, high: float) -> float:
    """The value of a query's `name`."""
    return in_range(name, given.get(name, ""), low, high)


def whole(given: Mapping[str, str], name: str, low: int, high: int) -> int:
    """The same without a fraction."""
    value = number(given, name, low, high)
    if value != int(value):
        raise ConfigError(f"{name} is {value:g}; give a whole number from {low} to {high}.")
    return int(value)


def in_range(what: str, text: str, low: float, high: float) -> float:
    """The number that a text is."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(f"{what} is {text[:40]!r}; give a number from {low:g} to {high:g}.")
    return value
