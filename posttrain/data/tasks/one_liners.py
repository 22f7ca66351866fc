"""One-line functions described in words; the reward `code` checks them by calling them."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from posttrain.rng import key
from posttrain.types import Message, Task

ONE_LINERS = "one-liners"
NAMES = ("a", "b", "c")
CASES = (
    (2, 3, 5), (7, -4, 1), (-6, 9, 8), (0, 12, -3), (13, 1, -10), (-5, -8, 4), (3, 30, 20), (40, 6, -25),
    (4, 6, 3), (50, 33, 61), (-31, -44, -12), (6, 5, 7), (3, 8, 2), (9, 4, 6), (5, 2, 9), (8, 7, 4),
)  # fmt: skip
"""Arguments that every function is called with. They include all orders and signs, which exposes `min` and `max`."""
HELD_OUT_PERCENT = 15
MOST = 4_000  # of about 5,000 held out and 31,000 others, so that unused ones are found quickly


@dataclass(frozen=True)
class Step:
    """An operation on the value v so far and a name or digit x: its phrases, its code and the function itself."""

    said: tuple[str, str]
    written: str
    gives: Callable[[int, int], int]
    binds: bool = False  # needs brackets around v if v is a sum
    sums: bool = False  # the resulting code is a sum


STEPS = (
    Step(("plus {x}", "add {x}"), "{v}+{x}", operator.add, sums=True),
    Step(("minus {x}", "take away {x}"), "{v}-{x}", operator.sub, sums=True),
    Step(("taken from {x}", "{x} minus that"), "{x}-{v}", lambda v, x: x - v, binds=True, sums=True),
    Step(("times {x}", "multiplied by {x}"), "{v}*{x}", operator.mul, binds=True),
    Step(("doubled", "twice that"), "{v}*2", lambda v, _: 2 * v, binds=True),
    Step(("at most {x}", "or {x} if smaller"), "min({v}, {x})", min),
    Step(("at least {x}", "or {x} if larger"), "max({v}, {x})", max),
)


def one_liners(count: int, seed: int, split: Literal["train", "test"]) -> list[Task]:
    """Distinct requests for functions of one or two steps.

    Functions with the same values are on the same side of the split, however they are described or written.
    """
    draw = random.Random(f"{ONE_LINERS}/{split}/{seed}")
    found: dict[str, Task] = {}
    while len(found) < min(count, MOST):
        words, program, values = _random_function(draw)
        held = key(ONE_LINERS, *values) % 100 < HELD_OUT_PERCENT
        if held == (split == "test") and len(set(values)) > 1:  # no function that is constant on CASES
            cases = [{"args": [*args], "expected": value} for args, value in zip(CASES, values, strict=True)]
            meta = {"kind": "call", "entry": "f", "cases": cases}
            found[words] = Task(f"{ONE_LINERS}:{words}", ONE_LINERS, (Message("user", words),), program, meta)
    return list(found.values())


def _random_function(draw: random.Random) -> tuple[str, str, list[int]]:
    """A random request, a program that fulfils it, and the program's values on CASES."""
    said = written = draw.choice(NAMES)
    values, is_sum = [args[NAMES.index(written)] for args in CASES], False
    for _ in range(draw.choice((1, 2))):
        step, x = draw.choice(STEPS), draw.choice((*NAMES, str(draw.randint(2, 9))))
        said += ", " + draw.choice(step.said).format(x=x)
        written = step.written.format(v=f"({written})" if step.binds and is_sum else written, x=x)
        given = [args[NAMES.index(x)] if x in NAMES else int(x) for args in CASES]
        values, is_sum = [*map(step.gives, values, given)], step.sums
    signature = f"f({', '.join(NAMES)})"
    return f"Write {signature}: {said}", f"def {signature}: return {written}", values
