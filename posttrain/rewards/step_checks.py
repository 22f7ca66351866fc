"""Checks the steps of finished and unfinished thoughts about sums, products and countdown with a program.

`step_check` is 1.0 while nothing written so far is wrong, and 0.0 from the first mistake on. It needs no model, so it
is a scorer for search and the ground truth for process reward models.

A thought is equations separated by commas, semicolons or line breaks. An equation is wrong if its sides differ, or if
it uses a number that is not available. The numbers of the problem are available at first, whole or by decimal place
(12, or 10 and 2). An equation takes away the numbers it uses and adds its result, so `10+70+50=130, 2+7+2=11,
130+11=141` is right, and so is the beginning of `10+70+50=130, 130+130=260`, but not its end. In a countdown, an
equation is also wrong if the target cannot be reached with the numbers that it leaves; one with all numbers of the
problem is an attempt at the whole problem and takes nothing away. Words between equations are passed over.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from functools import lru_cache
from itertools import combinations

from posttrain.data.tasks.abacus import evaluate
from posttrain.data.thoughts import tags_of
from posttrain.rewards.skills import reasoning
from posttrain.types import DataError, Task

KINDS = ("sums", "products", "countdown")
"""Kinds of abacus' reasoning problems whose steps can be checked."""
MOST_NUMBERS = 5  # in a countdown: the search for the target grows factorially
LONGEST = 64  # characters of one side of an equation; bounds values and nested brackets
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SEPARATOR = re.compile(r",\s*|;\s*|\n\s*")
_TOKEN = re.compile(r"\d+|[-+*()]")
_RESULT = re.compile(r"-?\d{1,64}")


def has_check(task: Task) -> bool:
    """Whether the steps of this task can be checked: sums, products and countdowns of at most five numbers."""
    kind, numbers = task.meta.get("kind"), task.meta.get("numbers", ())
    return kind in KINDS and (kind != "countdown" or len(numbers) <= MOST_NUMBERS)


def step_check(task: Task, text: str, finished: bool = False) -> float:
    """1.0 if no step of the text is wrong, else 0.0.

    The last step of an unfinished text may be half-written: `10+70+50=13` may still become 130. A `finished` text is a
    whole reply and must pass the task's verifier as well. Raises DataError for a task without a check (`has_check`).
    """
    if finished and has_check(task) and not reasoning(str(task.answer), task.meta, text).passed:
        return 0.0
    return float(first_mistake(task, text) is None)


def first_mistake(task: Task, text: str) -> int | None:
    """Position of the character after the first wrong step of a text; None if nothing is wrong so far.

    Raises DataError for a task without a check.
    """
    if not has_check(task):
        raise DataError(
            f"task {task.id!r} has no step check, which needs meta['kind'] to be one of {', '.join(KINDS)}, and at "
            f"most {MOST_NUMBERS} numbers in a countdown. Use a process reward model."
        )
    opening, closing = tags_of(text)
    start = text.find(opening) + len(opening) if text.lstrip().startswith(opening) else 0
    thought, closed, final = text[start:].partition(closing) if start else ("", "", text)
    begun = max(n for n in range(len(closing)) if thought.endswith(closing[:n]))  # characters of a half-written tag
    wrong = _wrong_equation(task, thought[: len(thought) - begun], bool(closed or begun))
    if wrong is not None:
        return start + wrong
    answered = closed or not (start or opening.startswith(text.strip()))
    return len(text) if answered and not _may_become_right(task, final) else None


def _wrong_equation(task: Task, thought: str, closed: bool) -> int | None:
    """Position of the character after the first wrong equation of a thought."""
    breaks = list(_SEPARATOR.finditer(thought))
    left = _available(task)
    for start, end in zip([0, *(m.end() for m in breaks)], [*(m.start() for m in breaks), len(thought)], strict=True):
        written, _, result = (part.strip() for part in thought[start:end].partition("="))
        read = _read(written)
        if read is None or not _RESULT.fullmatch(result):
            continue  # words, or no result yet
        value, numbers, signs = read
        if result != str(value):
            half = end == len(thought) and not closed
            if not (half and str(value).startswith(result)):
                return end
            continue
        after = _after(task, left, value, numbers, signs)
        if after is None:
            return end
        left = after
    return None


def _available(task: Task) -> Counter[int]:
    """What a thought starts from: numbers of a countdown, decimal places of a sum, partial products of a product."""
    numbers: list[int] = task.meta["numbers"]
    if task.meta["kind"] == "countdown":
        return Counter(numbers)
    if task.meta["kind"] == "sums":
        return Counter(place for n in numbers for place in _places(n))
    return Counter(place * numbers[1] for place in _places(numbers[0]))


def _after(task: Task, left: Counter[int], value: int, numbers: list[int], signs: set[str]) -> Counter[int] | None:
    """The available numbers after a right equation; None if it uses others, or makes the target unreachable."""
    kind, given = task.meta["kind"], task.meta["numbers"]
    if kind == "countdown" and sorted(numbers) == sorted(given):
        return left
    used = numbers
    if kind != "countdown":
        if kind == "products" and signs == {"*"} and len(numbers) == 2 and given[1] in numbers:
            other = numbers[0] if numbers[1] == given[1] else numbers[1]
            used = [place * given[1] for place in _places(other)]
        elif not signs <= {"+"}:
            return None
        used = [part for n in used for part in ([n] if left[n] or kind == "products" else _places(n))]
    need = Counter(n for n in used if n or kind == "countdown")
    if not need <= left:
        return None
    after = left - need + Counter([value])
    if kind == "countdown" and not reachable(tuple(sorted(after.elements())), task.meta["target"]):
        return None
    return after


def _places(number: int) -> list[int]:
    """The decimal places of a number that are not zero: 304 is 300 and 4; a negative number is kept whole."""
    digits = str(number)
    return [number] if number < 0 else [int(d) * 10 ** (len(digits) - i - 1) for i, d in enumerate(digits) if d != "0"]


@lru_cache(maxsize=65536)
def reachable(numbers: tuple[int, ...], target: int) -> bool:
    """Whether the sorted numbers, each used once, give the target with +, - and *; by exhaustive search."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        if any(reachable(tuple(sorted([*rest, value])), target) for value in {a + b, a - b, b - a, a * b}):
            return True
    return False


def _may_become_right(task: Task, final: str) -> bool:
    """Whether an answer is right, or is the beginning of one that may be."""
    text = final.strip()
    if task.meta["kind"] != "countdown":
        return str(task.answer).startswith(text) or reasoning(str(task.answer), task.meta, text).passed
    tokens = _tokens(text)
    if tokens is None:
        return False
    depths = [tokens[:i].count("(") - tokens[:i].count(")") for i in range(len(tokens) + 1)]
    *whole, last = [t for t in tokens if t.isdigit()] or [""]
    if tokens and not tokens[-1].isdigit():
        whole, last = [*whole, *[last] * bool(last)], ""
    left = Counter(map(str, task.meta["numbers"]))
    if min(depths) < 0 or not Counter(whole) <= left:
        return False
    left -= Counter(whole)
    if left != Counter([last] if last else []):  # numbers are left
        return any(n.startswith(last) for n in left)
    try:
        return evaluate(text + ")" * depths[-1])[0] == task.meta["target"]
    except ValueError:
        return False


def _tokens(text: str) -> list[str] | None:
    """Numbers, signs and brackets; None if the text has anything else or is too long."""
    tokens = _TOKEN.findall(text)
    return tokens if len(text) <= LONGEST and "".join(tokens) == text.replace(" ", "") else None


def _read(text: str) -> tuple[int, list[int], set[str]] | None:
    """(value, numbers, operators) of an expression of signed integers, +, -, * and brackets; None if it is none."""
    tokens = _tokens(text)
    if not tokens:
        return None
    numbers: list[int] = []
    signs: set[str] = set()
    at = 0

    def atom() -> int:
        nonlocal at
        token, at = tokens[at], at + 1
        if token == "(":
            value = level(("+", "-"))
            if tokens[at] != ")":
                raise ValueError(text)
            at += 1
            return value
        if token == "-" and tokens[at].isdigit():
            token, at = "-" + tokens[at], at + 1
        numbers.append(int(token))
        return numbers[-1]

    def level(wanted: tuple[str, ...]) -> int:
        nonlocal at
        inner = atom if wanted == ("*",) else lambda: level(("*",))
        value = inner()
        while at < len(tokens) and tokens[at] in wanted:
            sign, at = tokens[at], at + 1
            signs.add(sign)
            value = OPERATORS[sign](value, inner())
        return value

    try:
        value = level(("+", "-"))
    except (ValueError, IndexError):
        return None
    return (value, numbers, signs) if at == len(tokens) else None
