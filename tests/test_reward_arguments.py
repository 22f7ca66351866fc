"""What a reward function gets under each name, and the names that are refused before step 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import api
from posttrain.data.sources import Row, row_to_task
from posttrain.rewards.arguments import check_columns
from posttrain.rewards.functions import reward_from
from posttrain.types import DataError, Task

ROW = {"question": "6 * 7?", "solution": "6 * 7 is \\boxed{42}", "task": "sum", "text": "the row's", "level": 3}


def task(row: dict[str, Any]) -> Task:
    return row_to_task(Row("f.jsonl:1", row), "f.jsonl")


def score(function: Callable[..., Any], row: dict[str, Any], text: str = "42") -> str:
    """What the function gets, as it returns it in a verdict's detail."""
    found: list[Any] = []

    def record(*positional: Any, **named: Any) -> float:
        found.append(function(*positional, **named))
        return 0.0

    record.__dict__["__signature__"] = inspect.signature(function)
    verify = reward_from(record)
    check_columns(verify, [task(row)])
    verify(task(row), text)
    return found[0]


SEEN: dict[str, tuple[Callable[..., Any], Any]] = {
    "the answer's column under its own name": (
        lambda completion, solution: (completion, solution),
        ("42", ROW["solution"]),
    ),
    "the question's column": (lambda completion, question: question, "6 * 7?"),
    "the extracted answer": (lambda completion, answer: answer, "42"),
    "another column": (lambda completion, level: level, 3),
    "by position": (lambda reply, gold: (reply, gold), ("42", "42")),
    "the row's own columns among all": (lambda completion, **row: (row["task"], row["text"]), ("sum", "the row's")),
    "all columns": (lambda completion, **row: row["solution"], ROW["solution"]),
}


@pytest.mark.parametrize("what", SEEN)
def test_a_function_gets_what_it_names(what: str) -> None:
    function, expected = SEEN[what]
    assert score(function, ROW) == expected


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "task": (
        lambda completion, task: 0,
        ROW,
        "the argument 'task', which is the Task, but the row also has a column 'task'",
    ),
    "text": (lambda completion, text: 0, ROW, "'text', which is the model's completion"),
    "task_id": (lambda completion, task_id: 0, {**ROW, "task_id": "7"}, "'task_id', which is the task's id"),
    "prompt": (
        lambda completion, prompt: 0,
        {"messages": [{"role": "user", "content": "a"}], "prompt": "b", "answer": "1"},
        "'prompt', which is the last user message",
    ),
    "a first argument": (lambda solution, gold: 0, ROW, "first argument 'solution'.*Name the argument completion"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_column_that_means_something_else_is_refused(name: str) -> None:
    function, row, says = REFUSED[name]
    with pytest.raises(DataError, match=says):
        check_columns(reward_from(function), [task(row)])


def test_equal_values_and_columns_that_are_not_asked_for_are_fine() -> None:
    same = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "answer": "1"}
    check_columns(reward_from(lambda completion, prompt: 0), [task(same)])
    check_columns(reward_from(lambda completion, answer: 0), [task(ROW)])


def test_a_clash_inside_an_expression_is_found_for_the_tasks_it_concerns(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def by_task(completion, task):\n    return 1.0\n")
    for spec in ("format + {}", "format & {}", "{}@'f.jsonl' + format", "{}(limit=4)"):
        with pytest.raises(DataError, match="column 'task'"):
            check_columns(reward_from(spec.format(f"{tmp_path}/r.py:by_task")), [task(ROW)])
    check_columns(reward_from(f"{tmp_path}/r.py:by_task@other + format"), [task(ROW)])


@pytest.mark.parametrize("algorithm", ["grpo", "online-dpo"])
def test_a_run_is_refused_before_step_0(algorithm: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        "".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}", "task": "sum"}}\n' for i in range(20))
    )
    (tmp_path / "r.py").write_text("def by_task(completion, task):\n    return float(task == 'sum')\n")
    with pytest.raises(DataError, match="column 'task'"):
        api.train(algorithm, "abacus", str(tmp_path / "t.jsonl"), f"{tmp_path}/r.py:by_task", tmp_path / "run")
    assert not (tmp_path / "run").exists()
