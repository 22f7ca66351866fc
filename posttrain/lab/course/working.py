"""What a worked example is: numbers that the library computed, written into the formula that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Step:
    """A formula, the same with its numbers, and what comes out; all three in TeX. `says` is a sentence before them."""

    tex: str
    filled: str = ""
    result: str = ""
    says: str = ""


@dataclass(frozen=True)
class Worked:
    """A worked example: what is given, the steps, and perhaps a table (a head, then rows as long as it).

    `calls` names the functions that computed the numbers, as `objectives.policy.clip`.
    """

    title: str
    given: str
    calls: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    after: str = field(default="")

    def as_dict(self) -> dict[str, Any]:
        """As JSON wants it."""
        steps = [vars(step) for step in self.steps]
        return {**vars(self), "steps": steps, "rows": [list(row) for row in self.rows]}


Example = Callable[[], Worked]


def tensor(*values: float) -> torch.Tensor:
    """A row of numbers in float64, so that what is printed is right in every digit."""
    return torch.tensor(values, dtype=torch.float64)


def one(value: torch.Tensor | float, digits: int = 3) -> str:
    """A number to `digits` decimals, without a minus before a zero."""
    text = f"{float(value):.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def many(values: Iterable[torch.Tensor | float], digits: int = 3) -> tuple[str, ...]:
    """Each number as `one` writes it."""
    return tuple(one(value, digits) for value in values)
