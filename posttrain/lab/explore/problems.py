"""The arithmetic that the GRPO explorer asks abacus: problems held out from its training, and one that it never learnt.

torch is not imported, so that the list is there before the model is.
"""

from __future__ import annotations

import re

from posttrain.data.tasks.abacus import evaluate, problems
from posttrain.types import ConfigError, Message, Task

FIRST = "98*8"
"""Its first group has right answers and wrong ones, with and without thinking."""
BEYOND = "23*17"
"""abacus was taught products with one digit only, so that no answer to this is right and nothing can be learned."""
LISTED = 24
_FORM = re.compile(r"[1-9]\d{0,2}(\*[1-9]\d{0,2}|(\+[1-9]\d{0,2}){1,2})")


def listed() -> list[str]:
    """What the page offers: `FIRST`, `BEYOND`, and problems held out by the built-in task."""
    drawn = problems("arithmetic", LISTED - 2, 0, "test")
    return [FIRST, BEYOND, *(problem.prompt.removeprefix("What is ").removesuffix("?") for problem in drawn)]


def task_of(problem: str) -> Task:
    """The task that `a*b`, `a+b` or `a+b+c` names, of numbers from 1 to 999. Raises ConfigError for anything else."""
    if not _FORM.fullmatch(problem):
        raise ConfigError(f"{problem[:40]!r} is no problem of this page; ask a*b or a+b+c with numbers from 1 to 999.")
    value, numbers = evaluate(problem)
    kind = "products" if "*" in problem else "sums"
    meta = {"skill": "reasoning", "kind": kind, "numbers": numbers}
    question = (Message("user", f"What is {problem}?"),)
    return Task(f"{kind}:{problem}", "arithmetic", question, str(value), meta)
