"""Data stage `critique`: critique and revision, the first phase of constitutional AI (Bai et al., arXiv 2212.08073).

A model replies, a critic says which principles the completion violates, and the completion is revised. What passes the
critic becomes a demonstration: first completions as they are, revisions after a second critique.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config.sections import require_positive
from posttrain.data.files import json_lines, writable
from posttrain.pipelines.constitution import Principle, load_constitution
from posttrain.pipelines.critics import PROGRAM, Critique, load_critic
from posttrain.pipelines.rows import DATA, conversation, sampled, write_rows
from posttrain.rewards.judge import PREFIX
from posttrain.types import ConfigError, Json, RolloutError, Task

CRITIQUES = "critiques.jsonl"
"""File for reading, beside the data: each prompt with its first completion, the critique and the revision."""


@dataclass(frozen=True)
class Critiques:
    model: str = "abacus"
    """Model that writes the first completions."""
    tasks: str = "instructions + requests*2"
    """Training tasks, as in `data.tasks`."""
    count: int = 512
    """Number of tasks."""
    samples: int = 1
    """Completions per task; distinct ones are critiqued separately."""
    max_tokens: int = 64
    """Maximum tokens of a first completion."""
    temperature: float = 1.0
    """Sampling temperature of the first completions."""
    slots: int = 128
    """Sequences decoded at once."""
    critic: str = PROGRAM
    """What critiques and revises: `program`, or `judge:FILE.toml`, a model behind an OpenAI-compatible endpoint."""
    constitution: str = ""
    """File of principles; empty uses the built-in one."""
    keep_good: bool = True
    """Keep first completions that violate nothing; otherwise keep revisions only."""
    seed: int = 0
    """Seed for tasks, first completions and phrases."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "samples", "max_tokens", "slots")
        if self.critic != PROGRAM and not self.critic.startswith(PREFIX):
            raise ConfigError(f"critic={self.critic!r} is unknown; use {PROGRAM} or {PREFIX}FILE.toml.")


@dataclass(frozen=True)
class Case:
    """A first completion with its critique and revision; `revision` is empty if there is none."""

    task: Task
    answer: str
    before: Critique
    revision: str = ""
    after: Critique | None = None

    @property
    def kept(self) -> str:
        """The text that passes the critic, or ""."""
        if not self.before.violated:
            return self.answer
        return self.revision if self.after is not None and not self.after.violated else ""


def make(cfg: Critiques, folder: Path) -> Json:
    """Samples completions and writes those that pass the critic; see `revised`."""
    groups = zip(*sampled(cfg, cfg.samples), strict=True)
    answers = ((task, dict.fromkeys(e.text for e in group if writable(e.text))) for task, group in groups)
    return revised(cfg, [(task, text) for task, texts in answers for text in texts], folder)


def revised(cfg: Critiques, asked: Sequence[tuple[Task, str]], folder: Path) -> Json:
    """Writes rows for `posttrain sft`, and all critiques for reading; counts violations before and after."""
    principles = load_constitution(cfg.constitution)
    cases, failed = _cases(cfg, principles, asked)
    (folder / CRITIQUES).write_text(json_lines(map(_row, cases)), encoding="utf-8", newline="\n")
    wanted = [case for case in cases if case.kept and (case.before.violated or cfg.keep_good)]
    write_rows(folder / DATA, [conversation(c.task, c.kept, revised=bool(c.before.violated)) for c in wanted])
    before = Counter(name for case in cases for name in case.before.violated)
    after = Counter(name for case in cases for name in (case.after or Critique("", ())).violated)
    faulty = [case for case in cases if case.before.violated]
    return {
        "answers": len(asked),
        "without_a_critique": failed,
        "faulty": len(faulty),
        "revised": sum(case.after is not None for case in faulty),
        "dropped": sum(not case.kept for case in faulty),
        "rows": len(wanted),
        "before": {p.id: before[p.id] for p in principles},
        "after": {p.id: after[p.id] for p in principles},
    }


def _cases(
    cfg: Critiques, principles: Sequence[Principle], asked: Sequence[tuple[Task, str]]
) -> tuple[list[Case], int]:
    """Each completion with its critique and revision, and the number of completions without a critique."""
    criticise, revise = load_critic(cfg.critic, principles, cfg.seed)
    results = list(zip(asked, criticise(asked), strict=True))
    cases = [Case(task, text, found) for (task, text), found in results if isinstance(found, Critique)]
    failures = [found for _, found in results if isinstance(found, RolloutError)]
    if failures and not cases:
        raise failures[0]
    faulty = [case for case in cases if case.before.violated]
    revisions = revise([(case.task, case.answer, case.before) for case in faulty])
    written = [(case, text) for case, text in zip(faulty, revisions, strict=True) if isinstance(text, str)]
    again = criticise([(case.task, text) for case, text in written])
    rewritten = {
        id(case): Case(case.task, case.answer, case.before, text, found if isinstance(found, Critique) else None)
        for (case, text), found in zip(written, again, strict=True)
    }
    return [rewritten.get(id(case), case) for case in cases], len(failures)


def _row(case: Case) -> dict[str, str | tuple[str, ...]]:
    return {
        "id": case.task.id,
        "prompt": case.task.prompt,
        "answer": case.answer,
        "critique": case.before.text,
        "violated": case.before.violated,
        "revision": case.revision,
        "still_violated": case.after.violated if case.after else (),
        "kept": case.kept,
    }
