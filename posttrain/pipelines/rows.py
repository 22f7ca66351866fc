"""Helpers shared by data stages: training tasks, sampled completions and JSON Lines files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from posttrain import api, config
from posttrain.config import DataConfig
from posttrain.data.files import json_lines
from posttrain.data.tasks.load import load_tasks
from posttrain.types import DataError, Episode, Json, Task

DATA = "data.jsonl"
"""The file in a data stage's folder that later stages read."""


class Sampling(Protocol):
    """Settings of a data stage that samples from a model."""

    @property
    def model(self) -> str: ...
    @property
    def tasks(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def slots(self) -> int: ...
    @property
    def seed(self) -> int: ...


def training_tasks(tasks: str, count: int, seed: int) -> tuple[list[Task], list[str]]:
    """The training tasks that `data.tasks` would load (none held out), and notes on missing ones."""
    sets = load_tasks(DataConfig(tasks=tasks, count=count), seed)
    return sets.train, sets.notes


def sampled(
    cfg: Sampling, samples: int, reward: str = "auto", split: Literal["held-out", "train"] = "train"
) -> tuple[list[Task], list[list[Episode]]]:
    """`samples` scored completions for each training or held-out task: P tasks and P lists of episodes."""
    settings = {
        "data.tasks": cfg.tasks,
        "data.count": cfg.count,
        "eval.problems": cfg.count,
        "eval.samples": samples,
        "eval.temperature": cfg.temperature,
        "rollout.max_tokens": cfg.max_tokens,
        "rollout.slots": cfg.slots,
        "reward.name": reward,
        "run.seed": cfg.seed,
    }
    return api.sample_many(cfg.model, config.resolve_as(config.EvalRecipe, {}, settings), split)


def conversation(task: Task, answer: str, **columns: object) -> Json:
    """A row in the format that `posttrain sft` reads."""
    messages = [{"role": m.role, "content": m.content} for m in task.messages]
    return {"id": task.id, "messages": [*messages, {"role": "assistant", "content": answer}], **columns}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes JSON Lines. Raises DataError if there are no rows."""
    if not rows:
        raise DataError(f"no rows left to write to {path}. Use more tasks or samples, or a better model.")
    path.write_text(json_lines(rows), encoding="utf-8", newline="\n")


def share(part: int, whole: int) -> float | None:
    """part / whole, rounded to four decimals; None if `whole` is 0."""
    return round(part / whole, 4) if whole else None
