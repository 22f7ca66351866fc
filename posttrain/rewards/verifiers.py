r"""Verifiers: pure functions `(task, text) -> Verdict`. A wrong reply scores 0; it is never an error.

The answer is extracted from the text after `</think>`, if any: the last text after `####`, in `\boxed{}` or after "the
answer is"; else the last number, or the whole text. A task whose *gold* answer cannot be parsed raises RolloutError,
because no reply to it could be scored.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from functools import cache

import math_verify

from posttrain.data.answers import final_part, marked_answer
from posttrain.data.thoughts import tags_of
from posttrain.rewards import formal, instructions, language, patterns, schema, shaping, units
from posttrain.rewards.code import code
from posttrain.rewards.judging import Verifier, gold_text, number, verdict
from posttrain.rewards.numbers import NUMBER, equal, last_number, plain, tolerance_of, values, whole_number
from posttrain.types import RolloutError, Task, Verdict

_INLINE_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BUDGET = 4_000_000  # Python calls and returns, two to three seconds; ordinary comparisons use 1 to 5 % of it


def exact(task: Task, text: str) -> Verdict:
    """Passes if the final answer, or the whole reply after thinking, equals the gold answer exactly."""
    gold, final = gold_text(task), final_part(text)
    return verdict(gold in (final, marked_answer(final)), marked_answer(final) or final, gold)


def numeric(task: Task, text: str) -> Verdict:
    """Passes if the last number of the final answer equals the gold number.

    Commas, signs, currency, fractions, mixed numbers and exponents are supported; `50%` is both 50 and 0.5. Whole
    numbers are compared exactly, others within TOLERANCE; a column `tolerance` replaces both (`tolerance_of`).
    """
    gold = last_number(gold_text(task))
    if not gold:
        raise RolloutError(
            f"task {task.id!r} has the gold answer {task.answer!r}, which has no number. Use reward.name = 'exact'.",
            boundary="reward",
        )
    final = final_part(text)
    announced = marked_answer(final)
    found = last_number(announced) if announced else ()
    found = found or last_number(final)
    return verdict(equal(gold, found, tolerance_of(task)), str(found[0]) if found else final, gold_text(task))


def math(task: Task, text: str) -> Verdict:
    r"""Passes if the final answer mathematically equals the gold answer: LaTeX, sets, intervals, matrices, numbers.

    Thread-safe and independent of the clock: answers whose evaluation could explode (nested powers, sums, integrals,
    over 300 characters) are compared as text only, and a comparison that needs more than a fixed number of Python calls
    fails.
    """
    gold, final = gold_text(task), final_part(text)
    given = _math_candidate(final, numeric_gold=bool(whole_number(gold)))
    if not given:
        return verdict(False, final, gold)
    if _squeeze(given) == _squeeze(gold):
        return verdict(True, given, gold)
    gold_number, given_number = whole_number(gold), whole_number(given)
    if gold_number and given_number:
        return verdict(equal(gold_number, given_number), given, gold)
    words = re.compile(r"[A-Za-z][A-Za-z ,.-]+")  # math-verify would parse `yes` as y·e·s
    if words.fullmatch(gold) or words.fullmatch(given) or _too_expensive(gold) or _too_expensive(given):
        return verdict(False, given, gold)
    return verdict(_mathematically_equal(gold, given), given, gold)


def format(task: Task, text: str) -> Verdict:
    """Passes if the reply is one non-empty `<think>…</think>` followed by an answer, whatever the answer.

    Other tags of a thought, such as `<thinking>` or `[THINK]`, are as good.
    """
    opening, closing = tags_of(text)
    body, closed, answer = text.lstrip().removeprefix(opening).partition(closing)
    well = text.lstrip().startswith(opening) and bool(closed)
    once = text.count(opening) == 1 and text.count(closing) == 1
    parts = {
        "tags": float(well and once),
        "thoughts": float(well and bool(body.strip())),
        "answer": float(well and bool(answer.strip())),
    }
    passed = all(parts.values())
    missing = ", ".join(name for name, value in parts.items() if not value)
    detail = "well formed" if passed else f"missing or misplaced: {missing}"
    return Verdict(float(passed), passed, detail, parts)


def cosine_length(task: Task, text: str) -> Verdict:
    """Cosine length reward in characters: `shaping.cosine` between two scores that depend on correctness.

    Columns: `limit` (characters; required), `right_short` 1, `right_long` 0.5, `wrong_short` 0, `wrong_long` 0 and
    `exceed` 0, the score of a reply of `limit` characters or more. Correctness is decided by `math` if the gold answer
    is a number or a formula, else by `exact`. Formula: arXiv 2502.03373.
    """
    limit = number(task, "limit", 0.0, "cosine_length")
    if limit <= 0:
        raise RolloutError(
            f"task {task.id!r}: cosine_length needs a limit in characters, e.g. cosine_length(limit=4000).",
            boundary="reward",
        )
    right = (math if is_mathematical(task.answer) else exact)(task, text)
    parts = {"right": right.score, "length": min(1.0, len(text) / limit)}
    if len(text) >= limit:
        detail = f"{len(text)} characters, the limit is {limit:g}"
        return Verdict(number(task, "exceed", 0.0, "cosine_length"), right.passed, detail, parts)
    kind, defaults = ("right", (1.0, 0.5)) if right.passed else ("wrong", (0.0, 0.0))
    short, long = (
        number(task, f"{kind}_{size}", default, "cosine_length")
        for size, default in zip(("short", "long"), defaults, strict=True)
    )
    return Verdict(shaping.cosine(len(text) / limit, short, long), right.passed, right.detail, parts)


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "numeric": numeric,
    "math": math,
    "units": units.units,
    "multiple_choice": patterns.multiple_choice,
    "regex": patterns.regex,
    "json_schema": schema.json_schema,
    "ifeval": instructions.ifeval,
    "ifeval_loose": instructions.ifeval_loose,
    "format": format,
    "code": code,
    "language": language.language,
    "cosine_length": cosine_length,
    "repetition": shaping.repetition,
    "z3": formal.by_z3,
    "lean": formal.by_lean,
}
"""Name in `reward.name` → verifier."""


def is_mathematical(answer: object) -> bool:
    """True for a gold answer that `math` suits better than `exact`: a number, LaTeX, or an expression."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return True
    text = str(answer).strip()
    expression = re.fullmatch(r"[\w\s.,+\-*/^=()\[\]{}<>|!%$]+", text) and re.search(
        r"[\d\w)]\s*[-+*/^=]\s*[\w(]", text
    )
    return bool(whole_number(text) or "\\" in text or (expression and not re.search(r"[A-Za-z]{2,}", text)))


def _math_candidate(final: str, numeric_gold: bool) -> str:
    """The text to compare: the announced answer, else the last formula, else the last number or line."""
    announced = marked_answer(final)
    if announced:
        inline = _INLINE_MATH.findall(announced)
        return next(filter(None, inline[-1])).strip() if inline else announced
    formulas = _INLINE_MATH.findall(final)
    if formulas:
        return next(filter(None, formulas[-1])).strip()
    if numeric_gold:
        numbers = [m for m in NUMBER.finditer(plain(final)) if values(m)]
        return numbers[-1].group().strip() if numbers else ""
    return final.splitlines()[-1].strip() if final else ""


def _squeeze(text: str) -> str:
    return "".join(plain(text).split()).strip("$").rstrip(".").replace("dfrac", "frac").replace("tfrac", "frac")


def _too_expensive(text: str) -> bool:
    """True if evaluating the text could take unbounded time or memory."""
    text = plain(text)
    if len(text) > 300 or re.search(r"\\(?:sum|prod|i*nt|oint|lim|binom|dbinom|tbinom|uparrow)(?![a-z])", text):
        return True
    if "!" in re.sub(r"(?<!\d)\d{1,2}!(?!\s*!)", "", text):
        return True  # a factorial that is not small
    powers = r"(?:\^|\*\*)\s*"
    if re.search(powers + r"(?:\{[^{}]*\}|\w+)\s*(?:\^|\*\*)", text):
        return True  # nested powers
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))
    expanded = [int(n[:9]) for n in re.findall(r"[)}\]]\s*" + powers + r"\{?(\d+)", text)]
    if sum(expanded) * len(letters) > 60:
        return True  # a power of a sum with too many terms
    size = 1
    for exponent in re.findall(powers + r"(\{[^{}]*\}|\([^()]*\)|-?\w+|\\\w+|.)", text):
        if exponent in "{(" or any(c in exponent for c in "^!") or "**" in exponent:
            return True  # an exponent that is itself nested
        for digits in re.findall(r"\d+", exponent):
            size *= max(1, int(digits[:9]))  # powers of powers multiply their exponents
    return size > 1000


_log = logging.getLogger("math_verify")
_log.setLevel(logging.ERROR)  # it warns that timeouts are off; `_too_expensive` and `_BUDGET` replace them


_lock = threading.Lock()  # neither the parser nor sympy is guaranteed to be thread-safe


class _OutOfBudget(BaseException):
    """Not an Exception, because math-verify would catch that and continue."""


def _compare(gold: str, given: str) -> bool:
    left, right = (
        math_verify.parse(f"${text.strip('$')}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        for text in (gold, given)
    )
    return bool(left and right and math_verify.verify(left, right, timeout_seconds=None))


@cache
def _warm_up() -> None:
    """Makes the parser and sympy load their tables, so that verdicts do not depend on the order of calls."""
    for gold, given in (("x^2+2x+1", "(x+1)^2"), ("(1,2]", "[1,2]"), (r"\sin(2x)", r"2\sin(x)\cos(x)")):
        _compare(gold, given)


def _mathematically_equal(gold: str, given: str) -> bool:
    with _lock:
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
    sys.setprofile(count)  # for this thread only
    try:
        return _compare(gold, given)
    except (_OutOfBudget, RecursionError):
        return False
    finally:
        sys.setprofile(profiler)
