"""Products that are too large for abacus, and generated demonstrations of calculator calls that compute them."""

from __future__ import annotations

import random
from typing import Literal

from posttrain.data.tasks.calculator import calculator
from posttrain.data.tool_calls import describe, with_system_text
from posttrain.data.tool_schema import tool_from
from posttrain.rng import key
from posttrain.types import Message, Task

LOW, HIGH = 101, 999
HELD_OUT_PERCENT = 15
MOST = 50_000  # of about 800,000, so that unused products are found quickly
LARGE, CALLS = "large-products", "calculator-calls"


def large_products(count: int, seed: int, split: Literal["train", "test"]) -> list[Task]:
    """Distinct products of two three-digit numbers; a*b and b*a are on the same side of the split."""
    draw = random.Random(f"{LARGE}/{split}/{seed}")
    found: dict[tuple[int, int], Task] = {}
    while len(found) < min(count, MOST):
        a, b = draw.randint(LOW, HIGH), draw.randint(LOW, HIGH)
        held = key(LARGE, min(a, b), max(a, b)) % 100 < HELD_OUT_PERCENT
        if held == (split == "test"):
            question = Message("user", f"What is {a}*{b}?")
            found[a, b] = Task(f"{LARGE}:{a}*{b}", LARGE, (question,), str(a * b), {"numbers": [a, b]})
    return list(found.values())


def calculator_calls(count: int, seed: int, split: Literal["train", "test"]) -> list[Task]:
    """The same products as demonstrations: the prompt holds the calculator call and its result, the answer follows."""
    tool = tool_from(calculator)
    told = describe([tool.schema], "inline")
    tasks: list[Task] = []
    for task in large_products(count, seed, split):
        a, b = task.meta["numbers"]
        asked = with_system_text(task.messages, told)
        called = Message("assistant", f"<{tool.name}>{a}*{b}</{tool.name}>")
        messages = (*asked, called, Message("user", calculator(f"{a}*{b}")))
        tasks.append(Task(f"{CALLS}:{a}*{b}", CALLS, messages, task.answer, task.meta))
    return tasks
