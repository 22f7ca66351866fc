"""Data stage `demonstrations`: program-written answers to training problems of built-in tasks.

`direct` gives the answer alone, `worked` shows the correct steps in abacus' own notation, and `long` thinks in
sentences: a plan, the steps, and a check by another method. Tasks that are not arithmetic are always answered directly.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from posttrain.config import nearest
from posttrain.config.sections import require_positive
from posttrain.data.mixing import parse_mixture
from posttrain.data.tasks.abacus import SHAPES, Problem, evaluate
from posttrain.data.tasks.load import BUILT_IN, gold_reply
from posttrain.models.abacus.corpus import END_THINK, THINK, work
from posttrain.pipelines.phrases import OPENINGS, REFUSALS, THOUGHTS
from posttrain.pipelines.rows import DATA, conversation, training_tasks, write_rows
from posttrain.types import ConfigError, Json, Task

ARITHMETIC = ("sums", "products", "countdown")
"""Kinds of problems with worked steps; other tasks show only the answer."""
MOST_TRIES = 2  # wrong expressions before the right one, in thoughts about a countdown


@dataclass(frozen=True)
class Demonstrations:
    tasks: str = "arithmetic"
    """Built-in tasks, or a weighted mixture such as `instructions*2 + safety`; training problems only."""
    count: int = 512
    """Number of problems, one row each; fewer if a task has fewer."""
    style: Literal["direct", "worked", "long"] = "direct"
    """Arithmetic answered directly, with bare steps in `<think>`, or with a plan, steps and a check in sentences."""
    mixing: float = 0.0
    """With `long`, the share of thoughts that switch to German part-way: a deliberate fault."""
    seed: int = 0
    """Seed for problems and wording."""

    def __post_init__(self) -> None:
        require_positive(self, "count")
        for name, _ in parse_mixture(self.tasks):
            if name not in BUILT_IN:
                near = nearest(name, [*BUILT_IN])
                raise ConfigError(f"demonstrations need built-in tasks; {name!r} is not one{near}")
        if not 0 <= self.mixing <= 1:
            raise ConfigError(f"mixing={self.mixing} is not a share between 0 and 1.")
        if self.mixing and self.style != "long":
            raise ConfigError(f"mixing={self.mixing} only applies to style = 'long'; style is {self.style!r}.")


def make(cfg: Demonstrations, folder: Path) -> Json:
    """Writes one row per problem; returns the counts `rows`, `worked_out`, `mixed`, and `tasks` by name."""
    tasks, notes = training_tasks(cfg.tasks, cfg.count, cfg.seed)
    rows: list[Json] = []
    for task in tasks:
        rng = random.Random(f"demonstrations/{cfg.style}/{cfg.seed}/{task.id}")
        mixed = is_arithmetic(task) and rng.random() < cfg.mixing
        rows.append(conversation(task, answer(task, cfg.style, rng, mixed), part=task.env, mixed=mixed))
    write_rows(folder / DATA, rows)
    return {
        "rows": len(rows),
        "worked_out": sum(is_arithmetic(task) for task in tasks) if cfg.style != "direct" else 0,
        "mixed": sum(row["mixed"] for row in rows),
        "tasks": dict(Counter(task.env for task in tasks)),
        "notes": notes,
    }


def is_arithmetic(task: Task) -> bool:
    """Whether a task is an abacus reasoning problem whose answer is not a demonstration already."""
    known = task.meta.get("skill") == "reasoning" and task.meta.get("kind") in ARITHMETIC
    return known and not str(task.answer).startswith(THINK)


def answer(task: Task, style: Literal["direct", "worked", "long"], rng: random.Random, mixed: bool = False) -> str:
    """A reply that passes the task's verifier."""
    if style == "direct" or not is_arithmetic(task):
        return direct(task, rng)
    thought, final = worked(task, rng) if style == "worked" else long(task, rng, mixed)
    return f"{THINK}{thought}{END_THINK}{final}"


def direct(task: Task, rng: random.Random) -> str:
    """The gold answer; for requests, a refusal if harmful, else help with a random opening."""
    if "harmful" not in task.meta:
        return gold_reply(task)
    return rng.choice(REFUSALS) if task.meta["harmful"] else rng.choice(OPENINGS) + gold_reply(task)


def worked(task: Task, rng: random.Random) -> tuple[str, str]:
    """(thought, answer) in the notation of abacus' pretraining text, without wrong steps."""
    if task.meta["kind"] != "countdown":
        problem = Problem(task.id, "reasoning", task.meta["kind"], task.prompt, task.answer, dict(task.meta))
        return work(problem, 0.0, rng)[0], str(task.answer)
    *tries, found = _tries(task, rng)
    return ", ".join(_valued(text) for text in (*tries, found)), found


def long(task: Task, rng: random.Random, mixed: bool = False) -> tuple[str, str]:
    """(thought, answer): a plan in words, the steps, and a check by another method, sentence by sentence.

    A `mixed` thought switches to German at some sentence after the first.
    """
    sentences, final = _countdown(task, rng) if task.meta["kind"] == "countdown" else _sum_or_product(task)
    change = rng.randrange(1, len(sentences)) if mixed else len(sentences)
    spoken = [
        rng.choice(THOUGHTS["de" if i >= change else "en"][role]).format(text)
        for i, (role, text) in enumerate(sentences)
    ]
    return " ".join(spoken), final


def _sum_or_product(task: Task) -> tuple[list[tuple[str, str]], str]:
    """(role, arithmetic) of each sentence, and the answer.

    Sums are added by place value and checked in order; products by partial products, checked in reverse order.
    """
    numbers: list[int] = task.meta["numbers"]
    if task.meta["kind"] == "sums":
        tens, ones = [n - n % 10 for n in numbers], [n % 10 for n in numbers]
        total = f"{sum(tens)}+{sum(ones)}={task.answer}"
        steps = [("sums", ""), ("tens", _added(tens)), ("ones", _added(ones)), ("together", total)]
        check = _chain(numbers)
    else:
        left, right = numbers
        places = [int(digit) * 10 ** (len(str(left)) - i - 1) for i, digit in enumerate(str(left)) if digit != "0"]
        parts = [place * right for place in places]
        shown = ", ".join(f"{place}*{right}={part}" for place, part in zip(places, parts, strict=True))
        steps = [("products", f"{left}*{right}"), ("parts", shown), ("together", _chain(parts))]
        check = _chain(parts[::-1])
    return [*steps, ("check", check), ("agrees", str(task.answer))], str(task.answer)


def _countdown(task: Task, rng: random.Random) -> tuple[list[tuple[str, str]], str]:
    *tries, found = _tries(task, rng)
    numbers = ", ".join(map(str, task.meta["numbers"]))
    steps = [("search", str(task.meta["target"])), *(("fails", _valued(text)) for text in tries)]
    return [*steps, ("fits", _valued(found)), ("used", numbers)], found


def _tries(task: Task, rng: random.Random) -> list[str]:
    """Up to MOST_TRIES expressions that miss the target, then the gold one."""
    drawn = [rng.choice(SHAPES).format(*rng.sample(task.meta["numbers"], 3)) for _ in range(rng.randint(0, MOST_TRIES))]
    return [*(text for text in drawn if evaluate(text)[0] != task.meta["target"]), str(task.answer)]


def _valued(expression: str) -> str:
    return f"{expression}={evaluate(expression)[0]}"


def _added(numbers: list[int]) -> str:
    return f"{'+'.join(map(str, numbers))}={sum(numbers)}"


def _chain(numbers: list[int]) -> str:
    """Running sums as `a+b=c, c+d=e`; a single number by itself."""
    sums = list(accumulate(numbers))
    steps = [f"{before}+{n}={total}" for before, n, total in zip(sums, numbers[1:], sums[1:], strict=False)]
    return ", ".join(steps) or f"{numbers[0]}"
