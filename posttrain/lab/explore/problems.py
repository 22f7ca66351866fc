"""Arithmetic problems of the GRPO explorer: held out from abacus' training, plus one of a kind it never learned.

torch is not imported, so that the list is available before the model is loaded.
"""

from __future__ import annotations

import re

from posttrain.data.tasks.abacus import evaluate, problems
from posttrain.types import ConfigError, Message, Task

FIRST = "98*8"
"""The default problem: its first group has right and wrong answers, with and without thinking."""
BEYOND = "23*17"
"""abacus was only trained on products with a one-digit factor, so no answer is right and nothing can be learned."""
LISTED = 24
_FORM = re.compile(r"[1-9]\d{0,2}(\*[1-9]\d{0,2}|(\+[1-9]\d{0,2}){1,2})")


def listed() -> list[str]:
    """The problems offered: `FIRST`, `BEYOND`, and held-out problems of the built-in task."""
    drawn = problems("arithmetic", LISTED - 2, 0, "test")
    return [FIRST, BEYOND, *(problem.prompt.removeprefix("What is ").removesuffix("?") for problem in drawn)]


def task_of(problem: str) -> Task:
    """The task for `a*b`, `a+b` or `a+b+c` with numbers from 1 to 999. Raises ConfigError for anything else."""
    if not _FORM.fullmatch(problem):
        raise ConfigError(
            f"unsupported problem {problem[:40]!r}; expected a*b, a+b or a+b+c with numbers from 1 to 999."
        )
    value, numbers = evaluate(problem)
    kind = "products" if "*" in problem else "sums"
    meta = {"skill": "reasoning", "kind": kind, "numbers": numbers}
    question = (Message("user", f"What is {problem}?"),)
    return Task(f"{kind}:{problem}", "arithmetic", question, str(value), meta)
