"""Finds, parses and compares numbers in text, as people and models write them."""

from __future__ import annotations

import re
from fractions import Fraction

from posttrain.types import RolloutError, Task

TOLERANCE = Fraction(1, 10**6)
"""Two numbers that are not both whole may differ by this much, or by a billionth of the gold number."""

Values = tuple[Fraction, ...]
"""Possible values of a number: one, two for a percentage, none if there is no number."""
Tolerance = tuple[Fraction, Fraction]
"""Maximum difference: absolute, and relative to the gold number."""

NUMBER = re.compile(
    # A sign counts only if no word or bracket precedes it: `10-5` contains 10 and 5, not 10 and -5.
    r"(?:(?<![\w)])(?P<sign>[-+])\s?)?(?:[$£€]\s?(?P<sign2>[-+])?)?(?<![A-Za-z_\d.])"
    r"(?P<body>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
    r"(?:\s+(?P<part>\d+)\s?/\s?(?P<of>\d+)|\s?/\s?(?P<under>\d+(?:\.\d+)?))?\s?(?P<percent>%)?"
)
_LATEX_FRACTION = re.compile(r"(?<=\d)?\\[dt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}|(\d)(\d))")
_CLEAN = (("{,}", ","), (",\\!", ","), ("\\!", ""), ("\\,", ""), ("\\%", "%"), ("\\$", "$"), ("−", "-"), ("–", "-"))
_DIGITS = 400


def plain(text: str) -> str:
    """Replaces LaTeX spaces, signs and simple fractions by plain characters."""
    for old, new in _CLEAN:
        text = text.replace(old, new)
    return _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text)


def values(match: re.Match[str]) -> Values:
    """Possible values of a match of NUMBER: one, two for a percentage, none for a division by zero."""
    if len(match["body"]) > _DIGITS:
        return ()
    value = Fraction(match["body"].replace(",", "") + (match["exponent"] or ""))
    under = match["under"] or match["of"]
    if under is not None:
        if len(under) > _DIGITS or not Fraction(under):
            return ()
        value = value / Fraction(under) if match["under"] else value + Fraction(int(match["part"]), int(under))
    if "-" in (match["sign"], match["sign2"]):
        value = -value
    return (value, value / 100) if match["percent"] else (value,)


def last_number(text: str) -> Values:
    """The last number in a text."""
    last: Values = ()
    for match in NUMBER.finditer(plain(text)):
        last = values(match) or last
    return last


def whole_number(text: str) -> Values:
    """The values of a text that consists of one number only."""
    match = NUMBER.fullmatch(plain(text).strip().strip("$").strip().rstrip(".").strip())
    return values(match) if match else ()


def equal(gold: Values, given: Values, tolerance: Tolerance | None = None) -> bool:
    """True if any value of one equals any value of the other: whole numbers exactly, others within TOLERANCE.

    An explicit `tolerance` applies to whole numbers too.
    """

    def same(a: Fraction, b: Fraction) -> bool:
        if tolerance is not None:
            return abs(a - b) <= max(tolerance[0], abs(a) * tolerance[1])
        if a.denominator == b.denominator == 1:
            return a == b
        return abs(a - b) <= max(TOLERANCE, abs(a) / 10**9)

    return any(same(a, b) for a in gold for b in given)


def tolerance_of(task: Task) -> Tolerance | None:
    """Parses the task's column `tolerance`: 0.01 is absolute, "1%" relative to the gold answer; None if absent.

    Raises RolloutError for anything else.
    """
    given = task.meta.get("tolerance")
    if given is None:
        return None
    text = str(given).strip()
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,2})?)\s*(%?)", text)
    if match is None or isinstance(given, bool):
        raise RolloutError(
            f"task {task.id!r} has tolerance={given!r}, expected a number such as 0.01 (absolute) or a string such as "
            '"1%" (relative to the gold answer).',
            boundary="reward",
        )
    bound = Fraction(match[1])
    return (Fraction(0), bound / 100) if match[2] else (bound, Fraction(0))
