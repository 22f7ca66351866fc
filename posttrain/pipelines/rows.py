"""What makers of data share: training tasks, a model's answers to them, and files of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from posttrain import api, config
from posttrain.config import DataConfig
from posttrain.data.files import json_lines
from posttrain.data.tasks.load import load_tasks
from posttrain.types import DataError, Episode, Task

DATA = "data.jsonl"
"""The file in a maker's folder that later stages read."""


class Sampling(Protocol):
    """The settings of a maker that asks a model."""

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
    """Training tasks that `data.tasks` would give, none of which is held out, and notes on what is missing."""
    sets = load_tasks(DataConfig(tasks=tasks, count=count), seed)
    return sets.train, sets.notes


def sampled(
    cfg: Sampling, samples: int, reward: str = "auto", split: Literal["held-out", "train"] = "train"
) -> tuple[list[Task], list[list[Episode]]]:
    """`samples` answers of a model to each of the training or held-out tasks (P lists), scored by a reward."""
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
    return api.sample_many(cfg.model, config.resolve("grpo", {}, settings), split)


def conversation(task: Task, answer: str, **columns: Any) -> dict[str, Any]:
    """A row that `posttrain sft` reads."""
    messages = [{"role": m.role, "content": m.content} for m in task.messages]
    return {"id": task.id, "messages": [*messages, {"role": "assistant", "content": answer}], **columns}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON Lines. Raises DataError where there is no row."""
    if not rows:
        raise DataError(f"no row is left to write to {path}. Give more tasks or samples, or a model that does better.")
    path.write_text(json_lines(rows), encoding="utf-8", newline="\n")


def share(part: int, whole: int) -> float | None:
    """A share, to four places; None of nothing."""
    return round(part / whole, 4) if whole else None
