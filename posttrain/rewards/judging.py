"""Helpers shared by the verifiers: gold answers, task columns and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from posttrain.types import RolloutError, Task, Verdict


class Verifier(Protocol):
    """Scores one completion of a task. It may have a batch method: see `BatchVerifier`."""

    def __call__(self, task: Task, text: str, /) -> Verdict:
        """The verdict on `text`. Raises RolloutError if it cannot be scored; a wrong answer is not an error."""
        ...


@runtime_checkable
class BatchVerifier(Verifier, Protocol):
    """A verifier that scores many completions at once, such as a reward model or an LLM judge."""

    def score_all(self, pairs: Sequence[tuple[Task, str]], /) -> Sequence[Verdict | RolloutError]:
        """A verdict for each (task, completion), in order; a RolloutError marks one that cannot be scored."""
        ...


def gold_text(task: Task) -> str:
    """The gold answer as text; 5.0 becomes "5". Raises RolloutError if the task has none."""
    answer = task.answer
    gold = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()
    if answer is None or not gold:
        raise RolloutError(f"task {task.id!r} has no gold answer to compare with. Add one.", boundary="reward")
    return gold


def verdict(passed: bool, given: str, gold: str) -> Verdict:
    """A score of 0 or 1, with a detail that shows what was compared."""
    detail = f"matches {gold[:80]}: {given[-80:]}" if passed else f"expected {gold[:80]}, got {given[-80:]}"
    return Verdict(float(passed), passed, detail)


def failed(reason: str, parts: dict[str, float] | None = None) -> Verdict:
    """A score of 0 with the reason."""
    return Verdict(0.0, False, reason, parts or {})


def column(task: Task, name: str, kinds: type | tuple[type, ...], needed_by: str) -> Any:
    """The task's column `name`. Raises RolloutError if it is missing or has the wrong type."""
    value = task.meta.get(name)
    if value is None or not isinstance(value, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        expected = " or ".join(kind.__name__ for kind in kinds)
        seen = "has no column" if value is None else f"has {value!r:.60} in the column"
        raise RolloutError(
            f"task {task.id!r} {seen} {name!r}; the verifier {needed_by!r} needs {expected} there.", boundary="reward"
        )
    return value


def number(task: Task, name: str, default: float, needed_by: str) -> float:
    """A numeric setting from the task's column, or its default. Raises RolloutError unless it is a finite number."""
    if task.meta.get(name) is None:
        return default
    value = column(task, name, (int, float), needed_by)
    if isinstance(value, bool) or not math.isfinite(value):
        raise RolloutError(
            f"task {task.id!r} has {name}={value!r}; the verifier {needed_by!r} needs a finite number.",
            boundary="reward",
        )
    return float(value)
