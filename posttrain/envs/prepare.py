"""From a recipe's data section to what an algorithm trains on, with everything left out counted and said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posttrain import rng
from posttrain.config import DataConfig
from posttrain.data.chat import ChatFormat
from posttrain.data.sources import data_hash, read_rows, row_to_conversation
from posttrain.envs.tasks import BUILT_IN, TaskSets, gold_reply, load_tasks
from posttrain.types import DataError, Message, Task

Conversation = str | tuple[Message, ...]


@dataclass(frozen=True)
class Conversations:
    """Supervised rows: (where it came from, text or messages)."""

    train: Sequence[tuple[str, Conversation]]
    test: Sequence[tuple[str, Conversation]]
    notes: list[str]
    hash: str


def fit_prompts(sets: TaskSets, chat: ChatFormat, cfg: DataConfig) -> TaskSets:
    """Refuses, or drops and counts, tasks whose prompt is over `data.max_prompt_tokens`."""
    kept: list[list[Task]] = []
    notes = list(sets.notes)
    for name, tasks in (("training", sets.train), ("evaluation", sets.test)):
        lengths = [len(chat.prompt_tokens(task.messages)) for task in tasks]
        over = [(n, task) for n, task in zip(lengths, tasks, strict=True) if n > cfg.max_prompt_tokens]
        if over and cfg.overlong == "refuse":
            n, task = max(over, key=lambda pair: pair[0])
            raise DataError(
                f"{len(over)} {name} prompts are longer than data.max_prompt_tokens={cfg.max_prompt_tokens} (longest: "
                f'{n} tokens, task {task.id}). Raise it, or set data.overlong = "drop".'
            )
        if over:
            notes.append(f"{len(over)} {name} prompts over {cfg.max_prompt_tokens} tokens were dropped.")
        kept.append([task for n, task in zip(lengths, tasks, strict=True) if n <= cfg.max_prompt_tokens])
    if not kept[0]:
        raise DataError(f"no training prompt fits data.max_prompt_tokens={cfg.max_prompt_tokens}; raise it.")
    return replace(sets, train=kept[0], test=kept[1], notes=notes)


def load_conversations(cfg: DataConfig, seed: int) -> Conversations:
    """Supervised rows of a file or hub id, or of a built-in task (question and gold answer), with a held-out share."""
    if not cfg.tasks:
        raise DataError("nothing to train on: give a file of texts or conversations (--data FILE).")
    if cfg.tasks in BUILT_IN:
        sets = load_tasks(cfg, seed)
        pairs = [[(t.id, _demonstration(t)) for t in part] for part in (sets.train, sets.test)]
        return Conversations(pairs[0], pairs[1], sets.notes, sets.hash)
    rows = read_rows(cfg.tasks, cfg.count)
    found = [(row.where, row_to_conversation(row, cfg.system, cfg.instruction)) for row in rows]
    if cfg.eval_tasks:
        held = read_rows(cfg.eval_tasks, cfg.count)
        test = [(row.where, row_to_conversation(row, cfg.system, cfg.instruction)) for row in held]
        asked = {repr(value) for _, value in test}
        train = [pair for pair in found if repr(pair[1]) not in asked]
        rows = [*rows, *held]
    else:
        train, test = _split(found, cfg.holdout, seed)
    notes = [f"{len(train)} rows to train on, {len(test)} held out."]
    if len(found) - len(train) - (0 if cfg.eval_tasks else len(test)):
        notes.append(f"{len(found) - len(train)} training rows also in {cfg.eval_tasks} were dropped.")
    if not train:
        raise DataError(f"{cfg.tasks}: no row is left to train on after holding out {len(test)}.")
    return Conversations(train, test, notes, data_hash(rows))


def _demonstration(task: Task) -> tuple[Message, ...]:
    return (*task.messages, Message("assistant", gold_reply(task)))


def _split(
    rows: Sequence[tuple[str, Conversation]], share: float, seed: int
) -> tuple[list[tuple[str, Conversation]], list[tuple[str, Conversation]]]:
    """Holds out `share` of the rows by their content, so that order does not matter and copies stay together."""
    limit = np.uint64(int(share * (1 << 53)) << 11)
    held = [np.uint64(rng.key("holdout", seed, repr(value))) < limit for _, value in rows]
    train = [row for row, out in zip(rows, held, strict=True) if not out]
    return train, [row for row, out in zip(rows, held, strict=True) if out]
