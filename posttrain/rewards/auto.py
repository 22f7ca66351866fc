"""The verifier that `reward.name = "auto"` picks for a task, and a check that every task can be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from posttrain.data.tasks import bfcl, reasoning_gym
from posttrain.data.tasks.abacus import GENERATORS
from posttrain.data.tasks.load import NUMBERS, PROGRAMS, gold_reply
from posttrain.rewards.code import code
from posttrain.rewards.scoring import score_safely
from posttrain.rewards.skills import judge
from posttrain.rewards.verifiers import Verifier, exact, is_mathematical, math, numeric
from posttrain.types import DataError, Task, Verdict

SHOWN = 20  # faulty tasks that an error names


def verifier_for(task: Task) -> Verifier:
    """The verifier that `reward.name = "auto"` picks for a task.

    Abacus problems use their skill's verifier, other built-in tasks `numeric` or `code`, BFCL tasks a comparison of
    tool calls, and reasoning-gym tasks the package's own scoring. All other tasks use `math` if the gold answer is a
    number or a formula, else `exact`.
    """
    if task.env in GENERATORS and "skill" in task.meta:
        return _judge_skill
    if task.env in NUMBERS:
        return numeric
    if task.env in PROGRAMS:
        return code
    if task.env == bfcl.ENV:
        return bfcl.verify
    if task.env.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.score
    return math if is_mathematical(task.answer) else exact


def validate(
    tasks: Sequence[Task],
    verifier: Verifier,
    gold: Literal["always", "where given", "never"] = "always",
    name: str = "the reward",
) -> None:
    """Raises DataError listing tasks whose gold answer fails the verifier, or for which an empty reply passes.

    `gold` selects whose gold answers must pass: all tasks', those of tasks that have one, or none. A task whose empty
    reply cannot be scored is also at fault. `name` is what the verifier is called in the message.
    """
    faults: list[str] = []
    for task in tasks:
        if gold == "always" or (gold == "where given" and task.answer not in (None, "")):
            verdict, error = score_safely(verifier, task, gold_reply(task))
            if verdict is None or not verdict.passed:
                reason = error or "scored as wrong"
                faults.append(f"{task.id}: its gold answer {str(task.answer)[:60]!r} does not pass {name} ({reason}).")
                continue
        empty, error = score_safely(verifier, task, "")
        if empty is None:
            faults.append(f"{task.id}: cannot be scored by {name} ({error}).")
        elif empty.passed:
            faults.append(f"{task.id}: an empty reply passes {name}.")
    if faults:
        more = f" (the first {SHOWN} are shown)" if len(faults) > SHOWN else ""
        raise DataError(
            "\n".join(faults[:SHOWN])
            + f"\n{len(faults)} of {len(tasks)} tasks cannot be used{more}. Fix their answers, or set another reward."
        )


def _judge_skill(task: Task, text: str) -> Verdict:
    return judge(task.answer, task.meta, text)
