"""Rejection sampling: several answers of a model to each task, of which the right or the best are kept to imitate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from posttrain.config.sections import require_positive
from posttrain.data.answers import final_part
from posttrain.pipelines.rows import DATA, sampled, share, write_rows
from posttrain.rewards.language import language
from posttrain.rewards.skills import CLOSE, OPEN, thinks
from posttrain.search.best_of_n import chosen_rows
from posttrain.types import ConfigError, Episode, RolloutError, Task


@dataclass(frozen=True)
class Selection:
    model: str = "abacus"
    """Whose answers are kept."""
    tasks: str = "arithmetic"
    """Training tasks, as `data.tasks` names them."""
    count: int = 512
    """Tasks."""
    samples: int = 4
    """Answers to each task."""
    max_tokens: int = 256
    """Longest answer; one that does not end by then is never kept."""
    temperature: float = 1.0
    """Sampling temperature."""
    slots: int = 128
    """Answers written at once."""
    reward: str = "auto"
    """What judges answers, as `reward.name`."""
    select: Literal["passed", "best"] = "passed"
    """Keep answers that pass, or those with the highest reward, passed or not."""
    max_per_task: int = 1
    """Most answers kept of one task, all different."""
    keep_language: bool = False
    """Drop answers with less than 90 % of their letters in the question's language; those without letters stay."""
    keep_format: bool = False
    """Drop answers whose thought is not closed, is empty or does not come first, or that say nothing after it."""
    longest: int = 0
    """Drop answers of more tokens; 0 keeps all lengths."""
    seed: int = 0
    """Which tasks and answers."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "samples", "max_tokens", "slots", "max_per_task")
        if self.longest < 0:
            raise ConfigError(f"longest={self.longest} is negative; 0 keeps all lengths.")


def make(cfg: Selection, folder: Path) -> dict[str, Any]:
    """Writes a row for each answer that is kept.

    Counts the answers, those that `passed`, those dropped by each filter (the first that applies), the rows by task,
    and the shares of answers kept and of tasks with one.
    """
    tasks, groups = sampled(cfg, cfg.samples, cfg.reward)
    dropped: Counter[str] = Counter()
    left: list[list[Episode]] = []
    for task, group in zip(tasks, groups, strict=True):
        faults = [_fault(cfg, task, episode) for episode in group]
        dropped.update(fault for fault in faults if fault)
        left.append([_scored(cfg, e, bool(fault)) for e, fault in zip(group, faults, strict=True)])
    rows: list[dict[str, Any]] = []
    for _ in range(cfg.max_per_task):
        best = chosen_rows(tasks, left, 1.0 if cfg.select == "passed" else None)
        rows += best
        said = {row["id"]: row["messages"][-1]["content"] for row in best}
        left = [_without(said.get(task.id), group) for task, group in zip(tasks, left, strict=True)]
    write_rows(folder / DATA, rows)
    answers = sum(map(len, groups))
    kinds = {task.id: task.env for task in tasks}
    return {
        "tasks": len(tasks),
        "answers": answers,
        "passed": share(sum(e.passed for group in groups for e in group), answers),
        "dropped": dict(sorted(dropped.items())),
        "rows": len(rows),
        "kept": share(len(rows), answers),
        "tasks_kept": share(len({row["id"] for row in rows}), len(tasks)),
        "by_task": dict(Counter(kinds[row["id"]] for row in rows)),
    }


def _scored(cfg: Selection, episode: Episode, unfit: bool) -> Episode:
    """The episode as it is chosen by: unfit ones have no reward, and passing is worth 1 where that is what counts."""
    if unfit or episode.reward is None:
        return replace(episode, reward=None)
    return replace(episode, reward=float(episode.passed)) if cfg.select == "passed" else episode


def _without(text: str | None, group: list[Episode]) -> list[Episode]:
    return [replace(e, reward=None) if e.text == text else e for e in group]


def _fault(cfg: Selection, task: Task, episode: Episode) -> str:
    """The first filter that an answer fails, or ""."""
    checks: dict[str, Callable[[], bool]] = {
        "truncated": lambda: episode.stop == "length",
        "format": lambda: cfg.keep_format and not well_formed(episode.text),
        "language": lambda: cfg.keep_language and not in_language(task, episode.text),
        "long": lambda: 0 < cfg.longest < episode.length,
    }
    return next((name for name, fails in checks.items() if fails()), "")


def well_formed(text: str) -> bool:
    """At most one thought, which comes first, is closed and holds something; and an answer."""
    marks = text.count(OPEN), text.count(CLOSE)
    return bool(final_part(text)) and (marks == (0, 0) or (marks == (1, 1) and thinks(text)))


def in_language(task: Task, text: str) -> bool:
    """Whether a text is in its prompt's language (posttrain.rewards.language); nothing speaks against bare numbers."""
    if not any(char.isalpha() for char in text.replace(OPEN, "").replace(CLOSE, "")):
        return True
    try:
        return language(task, text).passed
    except RolloutError:  # the prompt's own language is not clear
        return True
