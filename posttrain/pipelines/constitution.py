"""A constitution: written principles, and a program that finds violations in a completion and revises it.

After Bai et al., "Constitutional AI" (arXiv 2212.08073), where a large model critiques and revises itself. Abacus
cannot, so its critic is a program: each principle names a check, built from the task's verifier and lists of phrases,
and the revision is the task's gold answer or a stock phrase. The program knows the answers: it shows what the method
does to a student, not that a model can judge itself. posttrain/pipelines/critics.py asks a real model instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import nearest, read_settings
from posttrain.data.tasks.abacus import HARMLESS
from posttrain.pipelines.demonstrations import direct
from posttrain.rewards.auto import verifier_for
from posttrain.rewards.scoring import score_safely
from posttrain.rewards.skills import declines, dismisses, final_answer
from posttrain.types import ConfigError, RolloutError, Task

OURS = Path(__file__).with_name("constitution.toml")
LONGEST = 120  # characters that an answer to a short question may have


@dataclass(frozen=True)
class Principle:
    """A rule for the assistant; `check` is a name in CHECKS, `weight` the weight of a violation."""

    id: str = ""
    text: str = ""
    check: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Constitution:
    """Content of a constitution file."""

    principle: tuple[Principle, ...] = ()

    def __post_init__(self) -> None:
        ids = [p.id for p in self.principle]
        if not ids or "" in ids or len({*ids}) < len(ids):
            raise ConfigError("a constitution needs [[principle]] tables, each with a unique `id`.")
        for principle in self.principle:
            if not principle.text.strip() or not principle.weight > 0:
                raise ConfigError(f"principle {principle.id!r} needs a `text`, and a `weight` above 0.")
            if principle.check and principle.check not in CHECKS:
                known = nearest(principle.check, [*CHECKS])
                raise ConfigError(f"principle {principle.id!r}: unknown check {principle.check!r}{known}")


def load_constitution(path: str) -> tuple[Principle, ...]:
    """Loads the principles of a file, or the built-in ones. Raises ConfigError naming the file."""
    return read_settings(Constitution, Path(path) if path else OURS, "constitution", "[[principle]] tables").principle


def violations(principles: Sequence[Principle], task: Task, text: str) -> list[tuple[Principle, str]]:
    """The principles that a completion violates, each with what its check found; those without a check are skipped."""
    found = ((p, CHECKS[p.check](task, final_answer(text))) for p in principles if p.check)
    return [(principle, fault) for principle, fault in found if fault]


def critique(found: Sequence[tuple[Principle, str]]) -> str:
    """The program's critique of a completion, in sentences."""
    if not found:
        return "The answer violates no principle."
    return " ".join(f"{principle.text} But the answer {fault}." for principle, fault in found)


def revised(task: Task, rng: random.Random) -> str:
    """The program's revision: a refusal, help, or the gold answer; "" if the task has no answer."""
    return "" if task.answer in (None, "") else direct(task, rng)


# --- checks: the fault of a final answer (the part after the thought), or "" ----------------------------------------


def goes_along(task: Task, answer: str) -> str:
    """The answer neither declines nor dismisses a harmful request."""
    along = task.meta.get("harmful") and not declines(answer) and not dismisses(answer)
    return "goes along with something that hurts" if along else ""


def declines_harmless(task: Task, answer: str) -> str:
    """The answer declines a harmless request."""
    return "declines what is harmless" if not task.meta.get("harmful") and declines(answer) else ""


def rude(task: Task, answer: str) -> str:
    """The answer dismisses the user or is empty."""
    return "brushes the user off" if dismisses(answer) else ""


def misses_instruction(task: Task, answer: str) -> str:
    """The answer does not follow an instruction exactly."""
    return _fault(task, answer) if task.meta.get("skill") == "instructions" else ""


def miscalculates(task: Task, answer: str) -> str:
    """The answer to a reasoning problem is wrong."""
    return _fault(task, answer) if task.meta.get("skill") == "reasoning" else ""


def off_topic(task: Task, answer: str) -> str:
    """The help does not mention the request's `thing` or, if it has none, the known help for its act."""
    if task.meta.get("harmful") is not False or declines(answer) or dismisses(answer):
        return ""
    wanted = task.meta.get("thing") or HARMLESS[task.meta["act"]].removesuffix(".")
    return "" if wanted.lower() in answer.lower() else "does not help with what was asked"


def rambles(task: Task, answer: str) -> str:
    """The answer is longer than a short question needs."""
    return f"has {len(answer)} characters" if len(answer) > LONGEST else ""


def _fault(task: Task, answer: str) -> str:
    verdict, error = score_safely(verifier_for(task), task, answer)
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
"""Checks that a principle's `check` can name."""
