"""One test of a reader's code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-6
"""How far a number may be off, by its size or absolutely, whichever allows more."""


@dataclass(frozen=True)
class Case:
    """One call of the reader's function: `wrong` are typical wrong results, each with the sentence that explains it."""

    name: str
    entry: str
    args: list[Any]
    expected: Any
    wrong: tuple[tuple[Any, str], ...] = ()
