"""Games that a small model can learn, each with its own task generator."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

from posttrain.data.answers import final_part
from posttrain.envs.env import Turn
from posttrain.envs.words import WORDS
from posttrain.types import Message, Task

HIGHEST = 15
LONGEST = 100  # maximum length of an expression in characters
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PATIENCE = 1000  # consecutive duplicates after which no more games are generated
LATER = 0.1  # reward lost per earlier try, in countdown and word
RIGHT, ELSEWHERE, ABSENT = "+", "?", "-"


class Number:
    """Guess a number; after each wrong guess the model is told whether the number is higher or lower.

    A correct guess earns 1 minus 0.05 per earlier guess. A reply that is not a number in range ends the game.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.secret, self.guesses = int(task.answer), 0

    def step(self, reply: str) -> Turn:
        match = re.fullmatch(r"\s*(\d{1,3})\s*", final_part(reply))
        guess = int(match[1]) if match else 0
        if not 1 <= guess <= HIGHEST:
            return Turn(done=True, parts={"found": 0.0, "in_range": 0.0})
        self.guesses += 1
        if guess == self.secret:
            parts = {"found": 1.0, "in_range": 1.0, "guesses": float(self.guesses)}
            return Turn(reward=1.0 - 0.05 * (self.guesses - 1), done=True, passed=True, parts=parts)
        answer = "higher" if self.secret > guess else "lower"
        return Turn((Message("user", answer),), parts={"found": 0.0, "in_range": 1.0})

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """`count` games with secrets sampled from 1 to HIGHEST."""
        rng = random.Random(seed)
        question = Message("user", f"Guess my number from 1 to {HIGHEST}.")
        return [Task(f"number-{i}", "number", (question,), rng.randint(1, HIGHEST)) for i in range(count)]


class Countdown:
    """Reach a target from given numbers, each used once, with + - * / and brackets, in `tries` tries (default 4).

    After a wrong try the model is told the value of its expression, or why it could not be parsed. The task's `meta`
    has `numbers` and `target`.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.numbers, self.target = sorted(task.meta["numbers"]), int(task.meta["target"])
        self.tries, self.used, self.readable = int(task.meta.get("tries", 4)), 0, 0

    def step(self, reply: str) -> Turn:
        self.used += 1
        try:
            value, numbers = value_of(final_part(reply))
            self.readable += 1
            found = numbers == self.numbers and value == self.target
            text = f"That is {value}." if numbers == self.numbers else f"Use each of {_listed(self.numbers)} once."
        except ValueError as error:
            found, text = False, f"That cannot be read: {error}."
        parts = {"solved": float(found), "tries": float(self.used), "readable": self.readable / self.used}
        return _turn(found, text, self.used, self.tries, parts)

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """Up to `count` distinct solvable games with four numbers from 1 to 12; the answer is a solution."""
        rng, tasks, stale = random.Random(seed), dict[str, Task](), 0
        while len(tasks) < count and stale < PATIENCE:
            numbers = sorted(rng.randint(1, 12) for _ in range(4))
            answer, target = _random_expression(numbers, rng)
            name = f"countdown:{target}={','.join(map(str, numbers))}"
            question = f"Make {target} from {_listed(numbers)}. Use each number once, with + - * / and brackets."
            meta = {"numbers": numbers, "target": target}
            stale = stale + 1 if name in tasks else 0
            tasks.setdefault(name, Task(name, "countdown", (Message("user", question),), answer, meta))
        return list(tasks.values())


def value_of(text: str) -> tuple[Fraction, list[int]]:
    """Exact value of an expression of whole numbers, + - * / and brackets, and the sorted numbers it uses.

    Raises ValueError with a short reason for anything else and for division by zero.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST} characters")
    tokens = [*re.findall(r"[0-9]+|[-+*/()]", text), ""]
    if "".join(tokens) != "".join(text.split()):
        raise ValueError("only whole numbers, + - * / and brackets may be used")
    at, numbers = 0, list[int]()

    def atom() -> Fraction:
        nonlocal at
        token, at = tokens[at], at + 1
        if token == "(":
            value = chain(("+", "-"))
            if tokens[at] != ")":
                raise ValueError("a bracket is not closed")
            at += 1
            return value
        if not token.isdigit():
            raise ValueError("a number is missing")
        numbers.append(int(token))
        return Fraction(numbers[-1])

    def chain(signs: Sequence[str]) -> Fraction:
        nonlocal at
        operand = partial(chain, ("*", "/")) if "+" in signs else atom
        value = operand()
        while tokens[at] in signs:
            sign, at = tokens[at], at + 1
            value = OPERATORS[sign](value, operand())
        return value

    try:
        value = chain(("+", "-"))
    except ZeroDivisionError:
        raise ValueError("it divides by zero") from None
    if tokens[at]:
        raise ValueError(f"{tokens[at]!r} stands where nothing should follow")
    return value, sorted(numbers)


def _random_expression(numbers: Sequence[int], rng: random.Random) -> tuple[str, int]:
    """A random expression that uses each number once, and its value, a whole number from 1 to 99."""
    while True:
        terms = [str(n) for n in numbers]
        while len(terms) > 1:
            left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
            terms.append(f"({left}{rng.choice('+-*/')}{right})")
        expression = terms[0][1:-1]
        try:
            value, _ = value_of(expression)
        except ValueError:
            continue
        if value.denominator == 1 and 1 <= value <= 99:
            return expression, int(value)


class Word:
    """Guess a five-letter word in six tries.

    After each try every letter is marked: + is in the right place, ? is elsewhere in the word, - is not in the word. A
    letter is marked at most as often as the word contains it. A reply that is not five letters also costs a try.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.secret, self.used, self.valid = str(task.answer), 0, 0

    def step(self, reply: str) -> Turn:
        self.used += 1
        guess = final_part(reply).strip().lower()
        valid = re.fullmatch("[a-z]{5}", guess) is not None
        self.valid += valid
        text = " ".join(map("".join, zip(guess, marks(guess, self.secret), strict=True))) if valid else "Five letters."
        parts = {"solved": float(guess == self.secret), "tries": float(self.used), "valid": self.valid / self.used}
        return _turn(guess == self.secret, text, self.used, 6, parts)

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """Up to `count` games, each with a different word; at most one per word in the list."""
        secrets = random.Random(seed).sample(WORDS, min(count, len(WORDS)))
        question = (
            "Find my word of five letters in six tries. Reply with one word. I mark each letter: "
            f"{RIGHT} right place, {ELSEWHERE} elsewhere in the word, {ABSENT} not in the word."
        )
        return [Task(f"word-{secret}", "word", (Message("user", question),), secret) for secret in secrets]


def marks(guess: str, secret: str) -> str:
    """One mark per letter of a guess; if a letter is guessed too often, the first misplaced ones are marked."""
    left = [s for g, s in zip(guess, secret, strict=True) if g != s]
    out = ""
    for g, s in zip(guess, secret, strict=True):
        if g == s:
            out += RIGHT
        elif g in left:
            left.remove(g)
            out += ELSEWHERE
        else:
            out += ABSENT
    return out


def _turn(found: bool, text: str, used: int, tries: int, parts: dict[str, float]) -> Turn:
    """The turn after try number `used` of `tries`."""
    if found or used >= tries:
        return Turn(reward=(1.0 - LATER * (used - 1)) * found, done=True, passed=found, parts=parts)
    left = tries - used
    return Turn((Message("user", f"{text} {left} {'try' if left == 1 else 'tries'} left."),), parts=parts)


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}"
