"""Loads supervised data from a recipe's data section, and reports every row that is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from posttrain.config import DataConfig, nearest
from posttrain.data.chat import ChatFormat
from posttrain.data.lengths import fitting
from posttrain.data.messages import text_key
from posttrain.data.mixing import parse_mixture
from posttrain.data.reading import read_source, unread_note
from posttrain.data.shown import unread_fields, unread_notes
from posttrain.data.sources import (
    Row,
    data_hash,
    is_file_name,
    is_hub_id,
    row_to_conversation,
    split_by_key,
    usable,
)
from posttrain.data.tasks.load import BUILT_IN, TaskSets, gold_reply, is_generated, load_tasks
from posttrain.types import ConfigError, DataError, Message, Task

Conversation = str | tuple[Message, ...]
Shown = tuple[str, Conversation]
"""A supervised row: its origin, and its text or messages."""


@dataclass(frozen=True)
class Source:
    """Supervised rows of one source, and the source's share of the draws, up to a common factor."""

    name: str
    rows: Sequence[Shown]
    weight: float = 1.0


@dataclass(frozen=True)
class Conversations:
    """Training rows of `data.tasks` and held-out rows, by source."""

    sources: Sequence[Source]
    held_out: Sequence[Source]
    notes: list[str]
    hash: str

    @property
    def train(self) -> list[Shown]:
        """All training rows, in source order."""
        return [row for source in self.sources for row in source.rows]

    @property
    def test(self) -> list[Shown]:
        """All held-out rows, in source order."""
        return [row for source in self.held_out for row in source.rows]


def fit_prompts(
    sets: TaskSets,
    chat: ChatFormat,
    cfg: DataConfig,
    opening: Callable[[Task], Sequence[Message]] = lambda task: task.messages,
) -> TaskSets:
    """Rejects, or drops and counts, tasks whose prompt (`opening`) is longer than `data.max_prompt_tokens`."""
    notes = list(sets.notes)
    if begun := sum(task.messages[-1].role == "assistant" for task in sets.train + sets.test):
        notes.append(f"{begun} tasks end with an assistant message, which the completion continues.")
    unread: Counter[str] = Counter()
    for task in sets.train + sets.test:
        unread.update(unread_fields(task.messages, chat))
    notes += unread_notes(cfg.tasks, unread)
    parts = (("training", sets.train), ("evaluation", sets.test))
    train, test = ([task for task, _ in fitting(tasks, opening, kind, chat, cfg, notes)] for kind, tasks in parts)
    return replace(sets, train=train, test=test, notes=notes)


def load_conversations(cfg: DataConfig, seed: int) -> Conversations:
    """Loads the supervised rows of every source in `data.tasks`, split into training and held-out rows.

    A source is a file, a hub id, or a generated task (its questions with their gold answers). Several sources are a
    mixture, written `a.jsonl*3 + arithmetic*1`. Rows are held out by prompt (`prompt_of`), and training rows whose
    prompt is also held out in any source are dropped and counted. Raises ConfigError for an unknown source and
    DataError for unusable rows.
    """
    if not cfg.tasks:
        raise DataError("there is nothing to train on. Give a file of texts or conversations (--data FILE).")
    notes: list[str] = []
    sources: list[Source] = []
    held_out: list[Source] = []
    for name, weight in parse_mixture(cfg.tasks):
        train, test = (
            _demonstrations(name, cfg, seed, notes) if is_generated(name) else _conversations(name, cfg, seed, notes)
        )
        sources.append(Source(name, train, weight))
        held_out.append(Source(name, test))
    if cfg.eval_tasks:
        held_out = [_evaluation(name, weight, cfg, seed, notes) for name, weight in parse_mixture(cfg.eval_tasks)]
    sources, dropped = _without_leaks(sources, held_out)
    notes += _counts(sources, held_out) + dropped
    parts = [(part, i, value) for part in (sources, held_out) for i, s in enumerate(part) for _, value in s.rows]
    content = data_hash(
        Row("", {"held": part is held_out, "source": i, "row": _hashed(value)}) for part, i, value in parts
    )
    return Conversations(sources, held_out, notes, content)


def prompt_of(value: Conversation) -> str:
    """The prompt of a row: the messages before the assistant's first reply to a user. For a text, or messages without
    such a reply, it is the whole row.

    Rows with the same prompt are always on the same side of a split, however they continue.
    """
    if isinstance(value, str):
        return value
    roles = [m.role for m in value]
    first_user = roles.index("user") if "user" in roles else len(roles)
    return text_key(value[: roles.index("assistant", first_user)] if "assistant" in roles[first_user:] else value)


def _hashed(value: Conversation) -> Conversation:
    """The row as its hash reads it: fields beside the texts count, too."""
    return text_key(value) if not isinstance(value, str) and any(m.fields for m in value) else value


def _demonstrations(name: str, cfg: DataConfig, seed: int, notes: list[str]) -> tuple[list[Shown], list[Shown]]:
    """Training and test problems of a generated task, with their gold answers."""
    sets = load_tasks(replace(cfg, tasks=name, eval_tasks=""), seed)
    notes += sets.notes
    train, test = ([(task.id, _answered(task)) for task in part] for part in (sets.train, sets.test))
    return train, test


def _answered(task: Task) -> Conversation:
    return (*task.messages, Message("assistant", gold_reply(task)))


def _conversations(name: str, cfg: DataConfig, seed: int, notes: list[str]) -> tuple[list[Shown], list[Shown]]:
    """The rows of a file or hub id; `data.holdout` of its prompts are held out unless `data.eval_tasks` is given."""
    if not is_file_name(name) and not is_hub_id(name):
        raise ConfigError(f"unknown source {name!r}{nearest(name, [*BUILT_IN])} A file or owner/name works too.")
    rows = read_source(name, cfg, notes)

    def parse(row: Row) -> Conversation:
        return row_to_conversation(row, cfg.system, cfg.instruction)

    found = usable(rows, lambda row: (row.where, parse(row)), cfg, notes)
    notes += unread_note(name, rows, parse)
    try:
        return split_by_key(found, [prompt_of(v) for _, v in found], 0 if cfg.eval_tasks else cfg.holdout, seed)
    except DataError as error:
        raise DataError(f"{name}: {error} Or set data.holdout = 0 to hold nothing out.") from None


def _evaluation(name: str, weight: float, cfg: DataConfig, seed: int, notes: list[str]) -> Source:
    if weight != 1:
        raise ConfigError(
            f"data.eval_tasks gives {name} the weight {weight}, but evaluation uses every held-out row. "
            "Remove the weight."
        )
    if is_generated(name):
        return Source(name, _demonstrations(name, cfg, seed, [])[1])
    return Source(name, _conversations(name, replace(cfg, holdout=0.0), seed, notes)[0])


def _without_leaks(sources: Sequence[Source], held_out: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """The sources without rows whose prompt is held out, and notes on how many rows were dropped."""
    held_out_prompts = {prompt_of(value) for source in held_out for _, value in source.rows}
    kept: list[Source] = []
    notes: list[str] = []
    for source in sources:
        rows = [row for row in source.rows if prompt_of(row[1]) not in held_out_prompts]
        if not rows:
            raise DataError(
                f"{source.name}: all {len(source.rows)} training rows have a prompt that is held out, so no row is "
                "left to train on. Set data.eval_tasks to other data."
            )
        if dropped := len(source.rows) - len(rows):
            notes.append(f"{source.name}: {dropped} training rows with a held-out prompt were dropped.")
        kept.append(replace(source, rows=rows))
    return kept, notes


def _counts(sources: Sequence[Source], held_out: Sequence[Source]) -> list[str]:
    """Notes on the rows and share of each source, and on the held-out rows."""
    held = sum(len(source.rows) for source in held_out)
    if len(sources) == 1:
        return [f"{len(sources[0].rows)} rows to train on, {held} held out."]
    whole = sum(source.weight for source in sources)
    shares = [f"{s.name}: {len(s.rows)} rows to train on, {s.weight / whole:.1%} of the draws." for s in sources]
    return [*shares, f"{held} rows held out."]
