"""Counts in a written-out thought: equations, how many are right, and what looks like self-checking.

A count is not a claim. Reaching a value a second time does not show that the model doubted the first (two steps may
share a value by chance), the word "wait" does not show that anything was re-examined, and a model may check without
writing it down. Only arithmetic on plain numbers is parsed: no words, units, powers or variables.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

OPEN, CLOSE = "<think>", "</think>"
LONGEST = 64
"""Maximum characters of an expression; longer ones are skipped."""
WORDS = {
    "wait": re.compile(r"\bwait\b", re.IGNORECASE),
    "check": re.compile(r"\b(?:double[- ])?(?:check|verif(?:y|ies))(?:s|ed|ing)?\b", re.IGNORECASE),
    "again": re.compile(r"\bagain\b", re.IGNORECASE),
    "let me": re.compile(r"\blet me\b", re.IGNORECASE),
}
"""Words that often accompany self-checking."""
_NUMBER = r"\(*-?\d+(?:\.\d+)?\)*"
_EXPRESSION = rf"{_NUMBER}(?:[ \t]*[-+*/×÷][ \t]*{_NUMBER})*"
_SIDE = re.compile(rf"(?<![\w.]){_EXPRESSION}(?!\w|\.\d)")
_EQUALS = re.compile(r"[ \t]*=[ \t]*")
_CUT_OFF = re.compile(r"[\w)][ \t]*[-+*/×÷^][ \t]*$")  # before a side that continues to the left: x - 3
_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Equation:
    """`left = right` as written, without spaces, and the value of each side."""

    left: str
    right: str
    left_value: Fraction
    right_value: Fraction

    @property
    def right_is_true(self) -> bool:
        """Whether both sides have the same value."""
        return self.left_value == self.right_value


@dataclass(frozen=True)
class Counts:
    """Counts of one text, or of several added together."""

    equations: int = 0
    right: int = 0  # equations that hold
    repeated: int = 0  # both sides as in an earlier equation
    recomputed: int = 0  # the value of an earlier equation, from a different left side
    corrections: int = 0  # the left side of an earlier equation, with a different right side
    corrected: int = 0  # corrections of a wrong equation to one that holds
    words: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(WORDS, 0))

    @property
    def checks(self) -> int:
        """Equations that revisit something: repeated, recomputed and corrections."""
        return self.repeated + self.recomputed + self.corrections


def thought(text: str) -> str:
    """The text between the first `<think>` and the last `</think>`, or the end; "" if there is no `<think>`."""
    _, opened, rest = text.partition(OPEN)
    inside, closed, _ = rest.rpartition(CLOSE)
    return (inside if closed else rest) if opened else ""


@lru_cache(maxsize=65536)  # the same few expressions recur thousands of times
def value_of(expression: str) -> Fraction | None:
    """Exact value of numbers joined by + - * / × ÷ and brackets; None for anything else, and for x/0."""
    if len(expression) > LONGEST:
        return None
    text = expression.replace("×", "*").replace("÷", "/")
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError):  # 007, a bracket alone, x/0
        return None


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.get_source_segment(text, node) or "")  # 0.1 as it is written, not as a float
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, text)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, text), _value(node.right, text))
    raise ValueError(f"{text!r} is not arithmetic on numbers.")


def equations(text: str) -> list[Equation]:
    """All equations of a text in order; `12*4=40+8=48` is two. At least one side must compute something."""
    found: list[Equation] = []
    for one, other in pairwise(_SIDE.finditer(text)):
        if not _EQUALS.fullmatch(text, one.end(), other.start()):
            continue
        if _CUT_OFF.search(text, max(0, one.start() - 8), one.start()):
            continue
        left, right = (_balanced(re.sub(r"\s", "", side.group())) for side in (one, other))
        a, b = value_of(left), value_of(right)
        if a is not None and b is not None and (_computes(left) or _computes(right)):
            found.append(Equation(left, right, a, b))
    return found


def _computes(side: str) -> bool:
    return re.search(r"\d\)*[-+*/×÷]", side) is not None


def _balanced(side: str) -> str:
    """A side without the unbalanced brackets of the surrounding text, as in `(20+5=25)`."""
    extra = side.count("(") - side.count(")")
    return side.removeprefix("(" * extra) if extra > 0 else side.removesuffix(")" * -extra)


def count(text: str) -> Counts:
    """Counts of one text, usually a `thought`. An equation is one of repeated, correction, recomputed or none."""
    sides: dict[str, list[Equation]] = {}
    stated: set[Fraction] = set()
    kinds: Counter[str] = Counter()
    found = equations(text)
    for one in found:
        before = sides.setdefault(one.left, [])
        if any(one.right == other.right for other in before):
            kinds["repeated"] += 1
        elif before:
            kinds["corrections"] += 1
            kinds["corrected"] += one.right_is_true and not before[-1].right_is_true
        elif one.right_value in stated:
            kinds["recomputed"] += 1
        before.append(one)
        stated.add(one.right_value)
    words = {name: len(pattern.findall(text)) for name, pattern in WORDS.items()}
    return Counts(len(found), sum(one.right_is_true for one in found), words=words, **kinds)


def add(counts: Sequence[Counts]) -> Counts:
    """The sum of several counts."""
    names = ("equations", "right", "repeated", "recomputed", "corrections", "corrected")
    totals = {name: sum(getattr(one, name) for one in counts) for name in names}
    return Counts(**totals, words={word: sum(one.words.get(word, 0) for one in counts) for word in WORDS})
