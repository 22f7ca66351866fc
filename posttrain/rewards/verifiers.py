r"""Pure functions that judge a reply: `(task, text) -> Verdict`. A wrong reply scores 0; it is never an error.

What a reply's answer is: the text after `</think>` where there is thinking; in it, the last of what follows `####`,
stands in `\boxed{}` or follows "the answer is"; else the last number, or the reply itself. A task whose *gold* answer
cannot be read raises RolloutError, because no reply to it could be judged.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import math_verify

from posttrain.data.answers import final_part, marked_answer
from posttrain.types import RolloutError, Task, Verdict

Verifier = Callable[[Task, str], Verdict]

TOLERANCE = Fraction(1, 10**6)
"""Numbers that are not both whole may differ by this much, or by a billionth of the gold."""

_NUMBER = re.compile(
    # A sign counts only where no word or bracket precedes it: `10-5` holds 10 and 5, not 10 and -5.
    r"(?:(?<![\w)])(?P<sign>[-+])\s?)?(?:[$£€]\s?(?P<sign2>[-+])?)?(?<![A-Za-z_\d.])"
    r"(?P<body>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
    r"(?:\s+(?P<part>\d+)\s?/\s?(?P<of>\d+)|\s?/\s?(?P<under>\d+(?:\.\d+)?))?\s?(?P<percent>%)?"
)
_LATEX_FRACTION = re.compile(r"(?<=\d)?\\[dt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}|(\d)(\d))")
_CLEAN = (("{,}", ","), (",\\!", ","), ("\\!", ""), ("\\,", ""), ("\\%", "%"), ("\\$", "$"), ("−", "-"), ("–", "-"))
_INLINE_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_THINKING = re.compile(r"\s*<think>(?P<think>.*?)</think>(?P<answer>.*)", re.DOTALL)
_DIGITS = 400
_BUDGET = 4_000_000  # calls and returns, two to three seconds; ordinary comparisons take 1 to 5 % of it


def exact(task: Task, text: str) -> Verdict:
    """Passes where the final answer, or the whole reply after thinking, is the gold text character for character."""
    gold, final = _gold(task), final_part(text)
    return _verdict(gold in (final, marked_answer(final)), marked_answer(final) or final, gold)


def numeric(task: Task, text: str) -> Verdict:
    """Passes where the last number of the final answer equals the gold number.

    Commas, signs, currency, fractions, mixed numbers and exponents are read; `50%` is both 50 and 0.5. Whole numbers
    are compared exactly, others within TOLERANCE.
    """
    gold = _last_number(_gold(task))
    if not gold:
        raise RolloutError(
            f"task {task.id!r} has the answer {task.answer!r}, which holds no number. Use reward.name = 'exact'.",
            boundary="reward",
        )
    final = final_part(text)
    announced = marked_answer(final)
    found = _last_number(announced) if announced else ()
    found = found or _last_number(final)
    return _verdict(_equal(gold, found), str(found[0]) if found else final, _gold(task))


def math(task: Task, text: str) -> Verdict:
    r"""Passes where the final answer is mathematically the gold answer: LaTeX, sets, intervals, matrices, numbers.

    Callable from any thread, and no clock decides: answers whose evaluation could run away (towers of powers, sums,
    integrals, over 300 characters) are compared as text only, and a comparison that takes more than a fixed number of
    Python calls fails.
    """
    gold, final = _gold(task), final_part(text)
    given = _math_candidate(final, numeric_gold=bool(_whole_number(gold)))
    if not given:
        return _verdict(False, final, gold)
    if _squeeze(given) == _squeeze(gold):
        return _verdict(True, given, gold)
    gold_number, given_number = _whole_number(gold), _whole_number(given)
    if gold_number and given_number:
        return _verdict(_equal(gold_number, given_number), given, gold)
    words = re.compile(r"[A-Za-z][A-Za-z ,.-]+")  # math-verify would read `yes` as y·e·s
    if words.fullmatch(gold) or words.fullmatch(given) or _runs_away(gold) or _runs_away(given):
        return _verdict(False, given, gold)
    return _verdict(_same_mathematics(gold, given), given, gold)


def format(task: Task, text: str) -> Verdict:
    """Passes where the reply is one `<think>…</think>` with thoughts in it, followed by an answer; not what it says."""
    match = _THINKING.fullmatch(text)
    once = text.count("<think>") == 1 and text.count("</think>") == 1
    parts = {
        "tags": float(match is not None and once),
        "thoughts": float(match is not None and bool(match["think"].strip())),
        "answer": float(match is not None and bool(match["answer"].strip())),
    }
    passed = all(parts.values())
    missing = ", ".join(name for name, value in parts.items() if not value)
    detail = "well formed" if passed else f"missing or misplaced: {missing}"
    return Verdict(float(passed), passed, detail, parts)


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "math": math, "format": format}
"""Name in `reward.name` → verifier."""


def is_mathematical(answer: object) -> bool:
    """True for a gold answer that `math` reads better than `exact`: a number, LaTeX, or an expression."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return True
    text = str(answer).strip()
    expression = re.fullmatch(r"[\w\s.,+\-*/^=()\[\]{}<>|!%$]+", text) and re.search(
        r"[\d\w)]\s*[-+*/^=]\s*[\w(]", text
    )
    return bool(_whole_number(text) or "\\" in text or (expression and not re.search(r"[A-Za-z]{2,}", text)))


def _gold(task: Task) -> str:
    answer = task.answer
    gold = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()
    if answer is None or not gold:
        raise RolloutError(f"task {task.id!r} has no answer to compare with. Give it one.", boundary="reward")
    return gold


def _verdict(passed: bool, given: str, gold: str) -> Verdict:
    return Verdict(float(passed), passed, f"{'is' if passed else 'is not'} {gold[:80]}: {given[-80:]}")


def _plain(text: str) -> str:
    for old, new in _CLEAN:
        text = text.replace(old, new)
    return _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text)


def _values(match: re.Match[str]) -> tuple[Fraction, ...]:
    """The values a number may stand for: one, two for a percentage, none for a division by zero."""
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


def _last_number(text: str) -> tuple[Fraction, ...]:
    found: tuple[Fraction, ...] = ()
    for match in _NUMBER.finditer(_plain(text)):
        found = _values(match) or found
    return found


def _whole_number(text: str) -> tuple[Fraction, ...]:
    """The values of a text that is one number and nothing else."""
    match = _NUMBER.fullmatch(_plain(text).strip().strip("$").strip().rstrip(".").strip())
    return _values(match) if match else ()


def _equal(gold: tuple[Fraction, ...], given: tuple[Fraction, ...]) -> bool:
    def same(a: Fraction, b: Fraction) -> bool:
        if a.denominator == b.denominator == 1:
            return a == b
        return abs(a - b) <= max(TOLERANCE, abs(a) / 10**9)

    return any(same(a, b) for a in gold for b in given)


def _math_candidate(final: str, numeric_gold: bool) -> str:
    """The text that is compared: what the reply announces, else its last formula, else its last number or line."""
    announced = marked_answer(final)
    if announced:
        inline = _INLINE_MATH.findall(announced)
        return next(filter(None, inline[-1])).strip() if inline else announced
    formulas = _INLINE_MATH.findall(final)
    if formulas:
        return next(filter(None, formulas[-1])).strip()
    if numeric_gold:
        numbers = [m for m in _NUMBER.finditer(_plain(final)) if _values(m)]
        return numbers[-1].group().strip() if numbers else ""
    return final.splitlines()[-1].strip() if final else ""


def _squeeze(text: str) -> str:
    return "".join(_plain(text).split()).strip("$").rstrip(".").replace("dfrac", "frac").replace("tfrac", "frac")


def _runs_away(text: str) -> bool:
    """True where evaluating the text could take unbounded time or memory."""
    text = _plain(text)
    if len(text) > 300 or re.search(r"\\(?:sum|prod|i*nt|oint|lim|binom|dbinom|tbinom|uparrow)(?![a-z])", text):
        return True
    if "!" in re.sub(r"(?<!\d)\d{1,2}!(?!\s*!)", "", text):
        return True  # only small factorials
    powers = r"(?:\^|\*\*)\s*"
    if re.search(powers + r"(?:\{[^{}]*\}|\w+)\s*(?:\^|\*\*)", text):
        return True  # a tower of powers
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))
    expanded = [int(n[:9]) for n in re.findall(r"[)}\]]\s*" + powers + r"\{?(\d+)", text)]
    if sum(expanded) * len(letters) > 60:
        return True  # a power of a sum with too many terms
    size = 1
    for exponent in re.findall(powers + r"(\{[^{}]*\}|\([^()]*\)|-?\w+|\\\w+|.)", text):
        if exponent in "{(" or any(c in exponent for c in "^!") or "**" in exponent:
            return True  # an exponent that is itself nested
        for number in re.findall(r"\d+", exponent):
            size *= max(1, int(number[:9]))  # powers of powers multiply their exponents
    return size > 1000


_log = logging.getLogger("math_verify")
_log.setLevel(logging.ERROR)  # it warns that timeouts are off; `_runs_away` and `_BUDGET` stand in for them


_one_at_a_time = threading.Lock()  # neither the parser nor sympy promises to be usable from several threads


class _OutOfBudget(BaseException):
    """Not an Exception: math-verify swallows those and would go on."""


def _compare(gold: str, given: str) -> bool:
    left, right = (
        math_verify.parse(f"${text.strip('$')}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        for text in (gold, given)
    )
    return bool(left and right and math_verify.verify(left, right, timeout_seconds=None))


@cache
def _warm_up() -> None:
    """Lets the parser and sympy load their tables, so that no reply's verdict depends on who came first."""
    for gold, given in (("x^2+2x+1", "(x+1)^2"), ("(1,2]", "[1,2]"), (r"\sin(2x)", r"2\sin(x)\cos(x)")):
        _compare(gold, given)


def _same_mathematics(gold: str, given: str) -> bool:
    with _one_at_a_time:
        return _within_budget(gold, given)


def _within_budget(gold: str, given: str) -> bool:
    _warm_up()
    events = 0

    def count(*_: object) -> None:
        nonlocal events
        events += 1
        if events > _BUDGET:
            raise _OutOfBudget

    profiler = sys.getprofile()
    sys.setprofile(count)  # of this thread alone
    try:
        return _compare(gold, given)
    except (_OutOfBudget, RecursionError):
        return False
    finally:
        sys.setprofile(profiler)
