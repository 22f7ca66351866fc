"""One test case for a reader's code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-6
"""Allowed error of a number, relative or absolute, whichever is larger."""


@dataclass(frozen=True)
class Case:
    """One call of the reader's function; `wrong` lists typical wrong results, each with an explanation."""

    name: str
    entry: str
    args: list[Any]
    expected: Any
    wrong: tuple[tuple[Any, str], ...] = ()
