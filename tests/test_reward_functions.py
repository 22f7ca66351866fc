"""Rewards that users write: how they are found and called, and that only one finite number is ever a reward."""

from __future__ import annotations

import decimal
import fractions
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.rewards.functions import load_function, reward_from
from posttrain.rewards.scoring import score_safely
from posttrain.rewards.verifiers import VERIFIERS, exact, numeric
from posttrain.types import ConfigError, Message, RolloutError, Task, Verdict

TASK = Task("t:1", "t", (Message("system", "s"), Message("user", "q")), "72", {"level": 3, "tests": ["a"]})


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def make(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(source, encoding="utf-8")
        return str(path)

    return make


def score(function: Any, text: str = "8") -> float:
    return reward_from(function)(TASK, text).score


def test_a_reward_in_a_file_is_found_and_called(write: Callable[[str], str]) -> None:
    head = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n"
    file = write(head + "def brief(completion, answer, **task):\n    return task['level'] / len(completion)\n")
    assert reward_from(f"{file}:brief")(TASK, "12").score == 1.5


@pytest.mark.parametrize(
    ("source", "suffix", "says"),
    [
        ("def good(c): return 1", ":goood", r"mine.py has no function 'goood'. Did you mean 'good'\?"),
        ("good = 5", ":good", "good in .*mine.py is of type int, expected a function"),
        ("x = 1\nimport nowhere_at_all", ":good", "mine.py:2: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 1\n\ndef good(:", ":good", "mine.py:3: SyntaxError"),
        ("def f():\n    return 1 / 0\nf()", ":good", "mine.py:2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)", ":good", "mine.py:2: SystemExit: 3"),
        ("", "", "is not of the form FILE.py:FUNCTION"),
        ("", ":", "is not of the form FILE.py:FUNCTION"),
    ],
)
def test_a_file_at_fault_is_named_with_its_line(
    write: Callable[[str], str], source: str, suffix: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_function(write(source) + suffix)


def test_a_missing_file_and_an_unknown_name_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="reward file nowhere.py does not exist"):
        reward_from("nowhere.py:f")
    with pytest.raises(ConfigError, match=r"unknown reward 'numerc'. Did you mean 'numeric'\?"):
        reward_from("numerc")
    with pytest.raises(ConfigError, match="unknown reward 'auto'"):
        reward_from("auto")


def test_verifiers_are_rewards_by_name_and_by_function() -> None:
    for name, verify in VERIFIERS.items():
        assert reward_from(name) is verify and reward_from(verify) is verify
    per_task = reward_from("auto", auto=lambda task: numeric if task.answer == "72" else exact)
    assert per_task(TASK, "so 72").passed


def everything(completion: str, answer: str, **task: Any) -> float:
    assert (completion, answer) == ("8", "72")
    assert set(task) == {"prompt", "messages", "task_id", "level", "tests"}
    return 0.25


def keywords_only(*, level: int, completion: str) -> float:
    return level + len(completion)


def with_default(completion: str, missing: float = 0.5) -> float:
    return missing


def positional_only(reply: str, gold: str, /) -> float:
    return float(reply == "8" and gold == "72")


class Callable_:
    def __call__(self, completion: str) -> float:
        return 2.0


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (everything, 0.25),
        (keywords_only, 4.0),
        (with_default, 0.5),
        (positional_only, 1.0),
        (lambda completion: 1.0, 1.0),
        (lambda c: float(c == "8"), 1.0),
        (lambda c, a: float((c, a) == ("8", "72")), 1.0),
        (lambda reply, tests, gold: float((reply, tests, gold) == ("8", ["a"], "72")), 1.0),
        (lambda task, text: Verdict(0.5, False), 0.5),
        (lambda prompt: float(prompt == "q"), 1.0),
        (lambda *args: 3.0, 3.0),
        (Callable_(), 2.0),
    ],
)
def test_a_reward_is_called_with_what_it_asks_for(function: Any, expected: float) -> None:
    assert score(function) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (-0.5, -0.5),
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (fractions.Fraction(1, 2), 0.5),
        (Verdict(0.75, True, "why"), 0.75),
    ],
)
def test_one_finite_number_is_a_reward(value: Any, expected: float) -> None:
    assert score(lambda completion: value) == expected


def test_a_number_passes_from_one_upwards_and_a_verdict_says_itself() -> None:
    assert [reward_from(lambda c, v=v: v)(TASK, "").passed for v in (0, 0.99, 1, 2, True)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert reward_from(lambda c: Verdict(0.2, True))(TASK, "").passed


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (np.float32("nan"), "nan"),
        (torch.tensor(float("nan")), "nan"),
        (10**400, "10000"),
        (None, "None"),
        ("1.0", r"'1.0' \(str\)"),
        ([1.0, 2.0, 3.0], r"3 values \(list\)"),
        ((1.0,), r"1 value \(tuple\)"),
        ({"score": 1.0}, r"1 value \(dict\)"),
        (np.ones(3), r"3 values \(ndarray\)"),
        (torch.ones(2, 2), r"4 values \(Tensor\)"),
        (1j, r"1j \(complex\)"),
        (decimal.Decimal("1"), "Decimal"),
        (object, "class 'object'"),
    ],
)
def test_anything_else_is_an_error_naming_function_task_and_value(value: Any, shown: str) -> None:
    def mine(completion: str) -> Any:
        return value

    with pytest.raises(RolloutError, match=f"^reward mine returned .*{shown}.* for task 't:1', expected one") as caught:
        reward_from(mine)(TASK, "8")
    assert caught.value.boundary == "reward"


def test_an_exception_names_its_line() -> None:
    def mine(completion: str) -> float:
        raise KeyError("gold")

    with pytest.raises(RolloutError, match="reward mine raised KeyError for task 't:1' at line .* of test_reward_fun"):
        reward_from(mine)(TASK, "8")


def test_an_argument_no_task_has_is_named() -> None:
    def mine(completion: str, rubric: str) -> float:
        return 1.0

    with pytest.raises(
        RolloutError, match="reward mine has the argument 'rubric', which task 't:1' does not provide; available"
    ):
        reward_from(mine)(TASK, "8")


def test_a_function_without_a_readable_signature_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="cannot inspect the arguments of reward type"):
        reward_from(type)


def test_scoring_safely_marks_and_never_raises() -> None:
    def fails(error: BaseException) -> Any:
        def mine(task: Task, text: str) -> Verdict:
            raise error

        return mine

    assert score_safely(exact, TASK, "72") == (exact(TASK, "72"), None)
    for error in (
        ValueError("bad"),
        RecursionError(),
        MemoryError(),
        AssertionError(),
        RolloutError("down"),
        SystemExit(0),
    ):
        verdict, why = score_safely(fails(error), TASK, "72")
        assert verdict is None and why
    assert score_safely(lambda task, text: 1.0, TASK, "72")[0] is None  # pyright: ignore[reportArgumentType]
    verdict, why = score_safely(reward_from(lambda c: float("nan")), TASK, "72")
    assert verdict is None and why and "returned nan for task 't:1'" in why
    with pytest.raises(KeyboardInterrupt):
        score_safely(fails(KeyboardInterrupt()), TASK, "72")
