"""Worked examples: numbers computed by the library, shown inside their formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from posttrain.types import Json


@dataclass(frozen=True)
class Step:
    """A formula, the formula with numbers, and the result, all in TeX; `says` is a sentence shown before them."""

    tex: str
    filled: str = ""
    result: str = ""
    says: str = ""


@dataclass(frozen=True)
class Worked:
    """A worked example: what is given, the steps, and optionally a table (`head` and `rows` of the same length).

    `calls` names the functions that computed the numbers, such as `objectives.policy.clip`.
    """

    title: str
    given: str
    calls: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    after: str = field(default="")

    def as_dict(self) -> Json:
        """For JSON."""
        steps = [vars(step) for step in self.steps]
        return {**vars(self), "steps": steps, "rows": [list(row) for row in self.rows]}


Example = Callable[[], Worked]


def tensor(*values: float) -> torch.Tensor:
    """A float64 tensor, so that all printed digits are right."""
    return torch.tensor(values, dtype=torch.float64)


def one(value: torch.Tensor | float, digits: int = 3) -> str:
    """A number with `digits` decimals; negative zero loses its sign."""
    text = f"{float(value):.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def many(values: Iterable[torch.Tensor | float], digits: int = 3) -> tuple[str, ...]:
    """Formats each number with `one`."""
    return tuple(one(value, digits) for value in values)
