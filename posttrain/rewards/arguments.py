"""The arguments of user-defined reward functions, and a check of their names before step 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from posttrain.rewards.judging import Verifier
from posttrain.types import DataError, Task

Check = Callable[[Task], None]
"""Raises DataError if a reward function would get another value for a task than its argument's name says."""


def available(task: Task, text: str) -> dict[str, object]:
    """All arguments that a reward function may ask for by name; the built-in ones take precedence over columns."""
    return {**task.columns, **task.meta, **_built_in(task, text)}


def column_check(name: str, parameters: Sequence[inspect.Parameter]) -> Check:
    """A check of a reward function's named arguments against a task.

    Refused are a row's column with the name of a built-in argument and another value, and a first argument that would
    be a column although functions usually get the completion there. `completion` always is the model's.
    """
    asked = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

    def check(task: Task) -> None:
        built_in = _built_in(task, "")
        for column in (c for c in asked if c in built_in and c != "completion"):
            value = task.meta.get(column)
            if value is not None and value != built_in[column]:
                raise DataError(
                    f"task {task.id!r}: reward {name} has the argument {column!r}, which is {MEANING[column]}, but the "
                    f"row also has a column {column!r}. Rename the column or the argument."
                )
        if asked and asked[0] in task.columns and asked[0] not in built_in and "completion" not in asked:
            raise DataError(
                f"task {task.id!r}: the first argument {asked[0]!r} of reward {name} is also a column of the row, so "
                "it may mean that or the completion. Name the argument completion, or rename the column."
            )

    return check


def with_check(verify: Verifier, check: Check) -> Verifier:
    """The verifier with the check that `check_columns` runs."""
    verify.__dict__["check_columns"] = check
    return verify


def check_of(verify: Verifier) -> Check | None:
    """The check of a verifier that was made from a function, or of rewards combined with one."""
    return getattr(verify, "__dict__", {}).get("check_columns")


def check_columns(verify: Verifier, tasks: Sequence[Task]) -> None:
    """Raises DataError if a column of a task would be hidden from a reward function that asks for it by name."""
    if check := check_of(verify):
        for task in tasks:
            check(task)


MEANING = {
    "completion": "the model's completion",
    "text": "the model's completion",
    "answer": "the gold answer",
    "prompt": "the last user message",
    "messages": "the prompt's messages",
    "task_id": "the task's id",
    "task": "the Task",
}
"""Built-in arguments."""


def _built_in(task: Task, text: str) -> dict[str, object]:
    return {
        "completion": text,
        "text": text,
        "answer": task.answer,
        "prompt": task.prompt,
        "messages": task.messages,
        "task_id": task.id,
        "task": task,
    }
