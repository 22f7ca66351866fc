"""Tasks that the package reasoning-gym generates (https://github.com/open-thought/reasoning-gym, extra `gym`).

`data.tasks = "gym:chain_sum"`, or `gym:chain_sum+zebra_puzzles` for several in equal parts. Each of its data sets
scores answers by itself, and that score is the reward. Some of them hand the answer to Python's `eval` or to sympy,
which is the same; a model could run what it likes there. So their answers must first look like one, see PLAIN; what
pays without being solved is refused, see UNSOUND.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from posttrain import rng
from posttrain.config import nearest
from posttrain.data.answers import final_part, marked_answer
from posttrain.types import ConfigError, DataError, Message, RolloutError, Task, Verdict

PREFIX = "gym:"
BLOCK = 2**20  # seeds of one draw: a data set makes problem i from seed + i, so draws must not come closer
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ARITHMETIC = re.compile(r"[0-9+\-*/(). ]{1,100}")
_LIST = re.compile(r"""[A-Z0-9_\s,'"\[\]]{0,2000}""")
_FORMULA = re.compile(r"[A-Za-z0-9+\-*/^(). ]{1,300}")
_FUNCTIONS = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs pi".split()
_POWER = re.compile(r"(?:\*\*|\^)\s*(\(\s*-?\d{1,2}(?:/\d{1,2})?\s*\)|-?\d{1,2}(?![\d.])|\(?[a-z]\b|)")


def arithmetic(text: str) -> bool:
    """Whether a text holds nothing but numbers, + - * / and brackets, and no power."""
    return _ARITHMETIC.fullmatch(text.strip()) is not None and "**" not in text and "//" not in text


def listed(text: str) -> bool:
    """Whether a text holds nothing that could be called, looped over or looked up: a board, a matrix or a list."""
    return _LIST.fullmatch(text) is not None


def formula(text: str) -> bool:
    """Whether a text is a short formula of single letters, known functions and small powers, at most two of brackets.

    Towers of powers are not read, because computing one has no bound.
    """
    words = re.findall(r"[A-Za-z_]\w*", text)
    powers = [m[1] for m in _POWER.finditer(text)]
    return (
        _FORMULA.fullmatch(text.strip()) is not None
        and all(len(word) == 1 or word in _FUNCTIONS for word in words)
        and all(powers)
        and not re.search(r"(?:\*\*|\^)\s*[\w.-]+\s*(?:\*\*|\^)", text)
        and len(re.findall(r"\)\s*(?:\*\*|\^)", text)) <= 2
    )


PLAIN: dict[str, Callable[[str], bool]] = {
    "countdown": arithmetic,
    "puzzle24": arithmetic,
    "binary_matrix": listed,
    "spiral_matrix": listed,
    "string_insertion": listed,
    "n_queens": listed,
    "simple_integration": formula,
    "intermediate_integration": formula,
    "polynomial_multiplication": formula,
}
"""Data sets that evaluate an answer → what it must look like; what does not scores 0 and never reaches them."""


UNSOUND = {
    "puzzle24": "pays any four allowed numbers that make 24, whatever the puzzle gives",
    "game_of_life_halting": "pays any answer that is not empty",
}
"""Data sets whose scoring is paid without solving the task (measured at version 0.1.25) → how."""


def gym_tasks(spec: str, count: int, seed: int, split: str) -> list[Task]:
    """`count` tasks of the data sets that `gym:a+b` names, in equal parts.

    Training draws of a seed and the test draw, which is the same for every seed, come from problems of their own.
    Raises ConfigError for an unknown data set or a missing package, DataError where one cannot make its problems.
    """
    names = spec.removeprefix(PREFIX).split("+")
    known = data_sets()
    for name in names:
        if name not in known:
            raise ConfigError(f"reasoning-gym has no data set {name!r}{nearest(name, known)}")
        if name in UNSOUND:
            raise ConfigError(f"reasoning-gym's {name} {UNSOUND[name]}, so a reward would be no sign. Choose another.")
    shares = [count // len(names) + (i < count % len(names)) for i in range(len(names))]
    block = 0 if split == "test" else 1 + rng.key("gym", seed) % 2046
    draws = [(name, block * BLOCK, share) for name, share in zip(names, shares, strict=True)]
    return [_task(*draw, i) for draw in draws for i in range(draw[2])]


def data_sets() -> list[str]:
    """The names of all data sets of the package. Raises ConfigError where it is not installed."""
    return sorted(_package().factory.DATASETS)


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            "data.tasks = gym:… needs the package reasoning-gym, which is not installed. "
            "Install it: pip install 'posttrain[gym]'."
        ) from None
    return reasoning_gym


@cache
def _data_set(name: str, seed: int, size: int) -> Any:
    try:
        return _package().create_dataset(name, seed=seed, size=size)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"reasoning-gym's {name} cannot be made from a seed alone: {error}. Choose another.") from None


@cache
def _entry(name: str, seed: int, size: int, index: int) -> dict[str, Any]:
    data_set = _data_set(name, seed, size)
    with _one_at_a_time:
        try:
            return data_set[index]
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            raise DataError(f"reasoning-gym's {name} cannot make problem {index} of seed {seed}: {error}.") from None


_one_at_a_time = threading.Lock()  # nothing promises that a data set may be used by several threads


def _task(name: str, seed: int, size: int, index: int) -> Task:
    entry = _entry(name, seed, size, index)
    if entry["answer"] is None:
        raise DataError(f"reasoning-gym's {name} gives no answer with its problems, which a gold answer needs.")
    meta = {"data_set": name, "seed": seed, "size": size, "index": index}
    question = Message("user", str(entry["question"]))
    return Task(f"{PREFIX}{name}:{seed + index}", PREFIX + name, (question,), str(entry["answer"]), meta)


def score(task: Task, text: str) -> Verdict:
    """What the task's data set gives for a reply's answer: what stands in the last `<answer>…</answer>`, or else the
    better of all that follows the thinking and what it announces ("the answer is …").

    A full score passes. An answer that the data set cannot read scores 0.
    """
    if "data_set" not in task.meta:
        raise RolloutError(f"task {task.id!r} names no data set of reasoning-gym to score it.", boundary="reward")
    name, seed, size, index = (task.meta[key] for key in ("data_set", "seed", "size", "index"))
    entry, final = _entry(name, seed, size, index), final_part(text)
    tagged = _ANSWER.findall(final)
    answers = [tagged[-1].strip()] if tagged else [final, marked_answer(final) or final]
    if not final:
        return Verdict(0.0, False, "an empty answer")
    value = max(_score(_data_set(name, seed, size), name, entry, answer) for answer in dict.fromkeys(answers))
    return Verdict(value, value >= 1.0, f"{value:g} from {name}: {answers[-1][-80:]}")


def _score(data_set: Any, name: str, entry: dict[str, Any], answer: str) -> float:
    if name in PLAIN and not PLAIN[name](answer):
        return 0.0
    with _one_at_a_time:
        try:
            value = float(data_set.score_answer(answer, entry))
        except Exception:  # whatever a data set cannot read is a wrong answer, not a failed run
            return 0.0
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0
