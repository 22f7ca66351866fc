"""A constitution: written principles, and the program that finds where an answer violates one and revises it.

After Bai et al., "Constitutional AI" (arXiv 2212.08073). There a large model criticises and revises itself. Abacus
cannot, so its critic is a program: each principle names a check, made of the task's own checker and lists of phrases,
and the revision is the task's gold answer or a phrase from a bank. The program knows the answers: it shows what the
method does to a student, not that a model can judge itself. posttrain/pipelines/critics.py asks a real model instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import nearest, read_settings
from posttrain.data.tasks.abacus import HARMLESS
from posttrain.data.tasks.load import verifier_for
from posttrain.pipelines.demonstrations import direct
from posttrain.rewards.functions import score_safely
from posttrain.rewards.skills import declines, dismisses, final_answer
from posttrain.types import ConfigError, RolloutError, Task

OURS = Path(__file__).with_name("constitution.toml")
LONGEST = 120  # characters of an answer to a short question


@dataclass(frozen=True)
class Principle:
    """What an assistant should do; `check` is a name in CHECKS, `weight` what a violation counts."""

    id: str = ""
    text: str = ""
    check: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Constitution:
    """The file's content."""

    principle: tuple[Principle, ...] = ()

    def __post_init__(self) -> None:
        ids = [p.id for p in self.principle]
        if not ids or "" in ids or len({*ids}) < len(ids):
            raise ConfigError("a constitution needs [[principle]] tables, each with an `id` of its own.")
        for principle in self.principle:
            if not principle.text.strip() or not principle.weight > 0:
                raise ConfigError(f"principle {principle.id!r} needs a `text`, and a `weight` above 0.")
            if principle.check and principle.check not in CHECKS:
                known = nearest(principle.check, [*CHECKS])
                raise ConfigError(f"principle {principle.id!r}: unknown check {principle.check!r}{known}")


def load_constitution(path: str) -> tuple[Principle, ...]:
    """The principles of a file, or those that ship here. Raises ConfigError naming the file."""
    return read_settings(Constitution, Path(path) if path else OURS, "constitution", "[[principle]] tables").principle


def violations(principles: Sequence[Principle], task: Task, text: str) -> list[tuple[Principle, str]]:
    """The principles that an answer violates, each with what the check found; those without a check are passed over."""
    found = ((p, CHECKS[p.check](task, final_answer(text))) for p in principles if p.check)
    return [(principle, fault) for principle, fault in found if fault]


def critique(found: Sequence[tuple[Principle, str]]) -> str:
    """What the program says of an answer, in sentences."""
    if not found:
        return "The answer violates no principle."
    return " ".join(f"{principle.text} But the answer {fault}." for principle, fault in found)


def revised(task: Task, rng: random.Random) -> str:
    """What the program writes instead: a refusal, help, or the gold answer; "" where the task has none."""
    return "" if task.answer in (None, "") else direct(task, rng)


# --- checks: what an answer (the part after the thought) does wrong, or "" ------------------------------------------


def goes_along(task: Task, said: str) -> str:
    """A harmful request is neither declined nor brushed off."""
    along = task.meta.get("harmful") and not declines(said) and not dismisses(said)
    return "goes along with something that hurts" if along else ""


def declines_harmless(task: Task, said: str) -> str:
    """A request that nothing speaks against is declined."""
    return "declines what is harmless" if not task.meta.get("harmful") and declines(said) else ""


def rude(task: Task, said: str) -> str:
    """The user is brushed off, or gets nothing."""
    return "brushes the user off" if dismisses(said) else ""


def misses_instruction(task: Task, said: str) -> str:
    """An instruction is not followed to the letter."""
    return _fault(task, said) if task.meta.get("skill") == "instructions" else ""


def miscalculates(task: Task, said: str) -> str:
    """The result of a reasoning problem is wrong."""
    return _fault(task, said) if task.meta.get("skill") == "reasoning" else ""


def off_topic(task: Task, said: str) -> str:
    """Help that neither names the thing that it is about nor, where no thing is known, is the help that is known."""
    if task.meta.get("harmful") is not False or declines(said) or dismisses(said):
        return ""
    wanted = task.meta.get("thing") or HARMLESS[task.meta["act"]].removesuffix(".")
    return "" if wanted.lower() in said.lower() else "does not help with what was asked"


def rambles(task: Task, said: str) -> str:
    """More is said than a short question needs."""
    return f"has {len(said)} characters" if len(said) > LONGEST else ""


def _fault(task: Task, said: str) -> str:
    verdict, error = score_safely(verifier_for(task), task, said)
    if verdict is None:
        raise RolloutError(error or "an answer could not be judged.", boundary="reward")
    return "" if verdict.passed else f"is not right ({verdict.detail})"


CHECKS: dict[str, Callable[[Task, str], str]] = {
    "goes_along": goes_along,
    "declines_harmless": declines_harmless,
    "dismisses": rude,
    "misses_instruction": misses_instruction,
    "miscalculates": miscalculates,
    "off_topic": off_topic,
    "rambles": rambles,
}
"""What a principle's `check` may name."""
