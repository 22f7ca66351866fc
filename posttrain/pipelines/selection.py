"""Data stage `selection`: rejection sampling, which keeps the right or the best of several completions of each task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from posttrain.config.sections import require_positive
from posttrain.data.answers import final_part
from posttrain.pipelines.rows import DATA, sampled, share, write_rows
from posttrain.rewards.language import language
from posttrain.rewards.skills import CLOSE, OPEN, thinks
from posttrain.search.best_of_n import ChosenRow, chosen_rows
from posttrain.types import ConfigError, Episode, Json, RolloutError, Task


@dataclass(frozen=True)
class Selection:
    model: str = "abacus"
    """Model that is sampled."""
    tasks: str = "arithmetic"
    """Training tasks, as in `data.tasks`."""
    count: int = 512
    """Number of tasks."""
    samples: int = 4
    """Completions per task."""
    max_tokens: int = 256
    """Maximum tokens per completion; truncated completions are never kept."""
    temperature: float = 1.0
    """Sampling temperature."""
    slots: int = 128
    """Sequences decoded at once."""
    reward: str = "auto"
    """Scorer of the completions, as in `reward.name`."""
    select: Literal["passed", "best"] = "passed"
    """Keep completions that pass, or those with the highest reward, passed or not."""
    max_per_task: int = 1
    """Maximum completions kept per task, all different."""
    keep_language: bool = False
    """Drop completions with less than 90 % of their letters in the prompt's language; without letters they stay."""
    keep_format: bool = False
    """Drop completions whose thought is unclosed, empty or not at the start, or that say nothing after it."""
    longest: int = 0
    """Drop completions with more tokens than this; 0 keeps all lengths."""
    seed: int = 0
    """Seed for tasks and completions."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "samples", "max_tokens", "slots", "max_per_task")
        if self.longest < 0:
            raise ConfigError(f"longest={self.longest} is negative; 0 keeps all lengths.")


def make(cfg: Selection, folder: Path) -> Json:
    """Writes a row for each kept completion.

    Returns the number of completions, the share that `passed`, how many each filter dropped (the first that applies),
    the rows by task, and the shares of completions kept and of tasks with one.
    """
    tasks, groups = sampled(cfg, cfg.samples, cfg.reward)
    dropped: Counter[str] = Counter()
    left: list[list[Episode]] = []
    for task, group in zip(tasks, groups, strict=True):
        faults = [_fault(cfg, task, episode) for episode in group]
        dropped.update(fault for fault in faults if fault)
        left.append([_scored(cfg, e, bool(fault)) for e, fault in zip(group, faults, strict=True)])
    rows: list[ChosenRow] = []
    for _ in range(cfg.max_per_task):
        best = chosen_rows(tasks, left, 1.0 if cfg.select == "passed" else None)
        rows += best
        kept = {row["id"]: row["messages"][-1]["content"] for row in best}
        left = [_without(kept.get(task.id), group) for task, group in zip(tasks, left, strict=True)]
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
    """The episode with the reward that selection uses: none if unfit, 0 or 1 if selection is by passing."""
    if unfit or episode.reward is None:
        return replace(episode, reward=None)
    return replace(episode, reward=float(episode.passed)) if cfg.select == "passed" else episode


def _without(text: str | None, group: list[Episode]) -> list[Episode]:
    return [replace(e, reward=None) if e.text == text else e for e in group]


def _fault(cfg: Selection, task: Task, episode: Episode) -> str:
    """The first filter that a completion fails, or ""."""
    checks: dict[str, Callable[[], bool]] = {
        "truncated": lambda: episode.stop == "length",
        "format": lambda: cfg.keep_format and not well_formed(episode.text),
        "language": lambda: cfg.keep_language and not in_language(task, episode.text),
        "long": lambda: 0 < cfg.longest < episode.length,
    }
    return next((name for name, fails in checks.items() if fails()), "")


def well_formed(text: str) -> bool:
    """Whether a text has an answer, and at most one thought, which comes first, is closed and is not empty."""
    marks = text.count(OPEN), text.count(CLOSE)
    return bool(final_part(text)) and (marks == (0, 0) or (marks == (1, 1) and thinks(text)))


def in_language(task: Task, text: str) -> bool:
    """Whether a text is in its prompt's language (posttrain.rewards.language); bare numbers always are."""
    if not any(char.isalpha() for char in text.replace(OPEN, "").replace(CLOSE, "")):
        return True
    try:
        return language(task, text).passed
    except RolloutError:  # the prompt's language is unclear
        return True
