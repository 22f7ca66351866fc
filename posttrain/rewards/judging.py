"""What the verifiers share: the gold answer of a task, the settings in its columns, and the verdict they come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from posttrain.types import RolloutError, Task, Verdict

Verifier = Callable[[Task, str], Verdict]


def gold_text(task: Task) -> str:
    """The gold answer as text; 5.0 is "5". Raises RolloutError where the task has none."""
    answer = task.answer
    gold = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()
    if answer is None or not gold:
        raise RolloutError(f"task {task.id!r} has no answer to compare with. Give it one.", boundary="reward")
    return gold


def verdict(passed: bool, given: str, gold: str) -> Verdict:
    """All or nothing, with a detail that shows what was compared."""
    return Verdict(float(passed), passed, f"{'is' if passed else 'is not'} {gold[:80]}: {given[-80:]}")


def failed(why: str, parts: dict[str, float] | None = None) -> Verdict:
    """A score of 0 and why."""
    return Verdict(0.0, False, why, parts or {})


def column(task: Task, name: str, kinds: type | tuple[type, ...], needed_by: str) -> Any:
    """The column `name` of the task's row. Raises RolloutError where it is missing or of another type."""
    value = task.meta.get(name)
    if value is None or not isinstance(value, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        wanted = " or ".join(kind.__name__ for kind in kinds)
        seen = "has no column" if value is None else f"has {value!r:.60} in the column"
        raise RolloutError(
            f"task {task.id!r} {seen} {name!r}; the verifier {needed_by!r} needs {wanted} there.", boundary="reward"
        )
    return value


def number(task: Task, name: str, default: float, needed_by: str) -> float:
    """A setting that a column may hold, else its default. Raises RolloutError where it is not a finite number."""
    if task.meta.get(name) is None:
        return default
    value = column(task, name, (int, float), needed_by)
    if isinstance(value, bool) or not math.isfinite(value):
        raise RolloutError(
            f"task {task.id!r} has {name}={value!r}; the verifier {needed_by!r} needs a finite number.",
            boundary="reward",
        )
    return float(value)
