"""Rows become tasks and conversations; duplicates are counted and nothing leaks from evaluation into training.

Columns are looked for in the order of `PROMPT_COLUMNS` and `ANSWER_COLUMNS`; the first that a row has is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from posttrain.config import DataConfig
from posttrain.data.answers import split_gold
from posttrain.data.files import SHOWN, Row, data_hash, is_file_name, is_hub_id, read_rows
from posttrain.rng import key
from posttrain.types import DataError, Judgement, Message, Preference, Solution, Task

__all__ = [
    "ANSWER_COLUMNS",
    "PROMPT_COLUMNS",
    "Row",
    "content_key",
    "data_hash",
    "drop_leaks",
    "duplicates",
    "is_file_name",
    "is_hub_id",
    "parse_rows",
    "read_rows",
    "row_to_conversation",
    "row_to_task",
    "split_by_key",
    "split_holdout",
    "usable",
]

T = TypeVar("T")
Asked = TypeVar("Asked", Task, Preference, Judgement, Solution)
"""What is asked of a model: a task, or a prompt with answers to it."""

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem", "instruction", "input")
"""Where a question is looked for, in this order. `input` is appended to `instruction` when a row has both."""
ANSWER_COLUMNS = ("answer", "solution", "target", "label")
"""Where the right answer is looked for, in this order."""
PAIRS = (("prompt", "completion"), ("question", "answer"), ("problem", "solution"), ("instruction", "output"))
"""Column pairs of a supervised row, looked for in this order after `text` and `messages`."""
TEST_COLUMNS = ("cases", "tests")
"""A row that fills one of these asks for a program, which is tested by being executed."""


def row_to_task(row: Row, env: str, system: str = "", instruction: str = "", needs_answer: bool = True) -> Task:
    """The task a row describes; its id is `env:line`.

    `messages` (or a `prompt` that is a list) may end with an assistant turn: that turn is the gold answer when no
    answer column is there. A gold such as GSM8K's `… #### 1,072` becomes "1072" and the text before it
    `meta["worked"]`; a program, where the row has tests, is left whole. Every column that is not used goes to `meta`.
    Raises DataError naming `file:line`.
    """
    values = dict(row.values)
    column = first_column(values, PROMPT_COLUMNS)
    if column is None:
        raise missing_column(row, "a question", PROMPT_COLUMNS)
    messages = question_of(row, values, column)
    used = {column, "input"} if column == "instruction" else {column}
    answer_column = first_column(values, tuple(c for c in ANSWER_COLUMNS if c not in used))
    answer: Any = None
    if messages[-1].role == "assistant":
        answer, messages = messages[-1].content, messages[:-1]
    if answer_column is not None:
        answer = values[answer_column]
        used.add(answer_column)
    if needs_answer and answer is None:
        raise missing_column(row, "an answer", ANSWER_COLUMNS)
    meta = {name: value for name, value in values.items() if name not in used}
    if isinstance(answer, str) and first_column(meta, TEST_COLUMNS) is None:
        answer, worked = split_gold(answer)
        if worked:
            meta["worked"] = worked
    if needs_answer and (answer == "" or (isinstance(answer, float) and not math.isfinite(answer))):
        raise DataError(f"{row.where}: column {answer_column!r} gives the answer {answer!r}. Give a real one.")
    messages = with_system(row.where, with_instruction(messages, instruction), system)
    try:
        return Task(f"{env}:{row.where.rpartition(':')[2]}", env, messages, answer, meta)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None


def row_to_conversation(row: Row, system: str = "", instruction: str = "") -> str | tuple[Message, ...]:
    """What a supervised row teaches: a plain text, or messages with at least one assistant turn.

    Columns in this order: `text`; `messages`; `prompt` + `completion`; `question` + `answer`; `problem` + `solution`;
    `instruction` (+ `input`) + `output`. Raises DataError naming `file:line` where nothing could be trained.
    """
    values = dict(row.values)
    if values.get("text") is not None:
        if system or instruction:
            raise DataError(f"{row.where}: a `text` row has no place for data.system or data.instruction. Unset them.")
        return text_of(row, values, "text")
    if values.get("messages") is not None:
        messages = messages_of(row, values["messages"], "messages")
    else:
        pair = next((p for p in PAIRS if all(values.get(c) is not None for c in p)), None)
        if pair is None:
            raise missing_column(row, "text to learn", ("text", "messages", *("+".join(p) for p in PAIRS)))
        messages = question_of(row, values, pair[0])
        if isinstance(values[pair[1]], list):
            messages += messages_of(row, values[pair[1]], pair[1])
        else:
            messages += (Message("assistant", text_of(row, values, pair[1])),)
    if not any(m.role == "assistant" and (m.content.strip() or m.tool_calls) for m in messages):
        raise DataError(
            f"{row.where}: no assistant message with text or a tool call, so nothing would train. Remove the row."
        )
    return with_system(row.where, with_instruction(messages, instruction), system)


def with_instruction(messages: tuple[Message, ...], instruction: str) -> tuple[Message, ...]:
    """Appends `instruction` to every user message after a blank line."""
    if not instruction:
        return messages
    return tuple(Message("user", f"{m.content}\n\n{instruction}") if m.role == "user" else m for m in messages)


def with_system(where: str, messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """Puts a system message first. Raises DataError where one is there already: which should win is not a guess."""
    if not system:
        return messages
    if any(m.role == "system" for m in messages):
        raise DataError(f"{where}: the row has its own system message. Remove it, or leave data.system empty.")
    return (Message("system", system), *messages)


def parse_rows(
    rows: Sequence[Row], parse: Callable[[Row], T], bad: Literal["refuse", "drop"] = "refuse"
) -> tuple[list[T], list[str]]:
    """What `parse` makes of each row, and the sentences of the rows it refused.

    With `bad="refuse"` any such row raises one DataError that shows the first 20 and counts all; with "drop" they are
    left out, and the caller says how many. Raises DataError where no row is left.
    """
    parsed: list[T] = []
    faults: list[str] = []
    for row in rows:
        try:
            parsed.append(parse(row))
        except DataError as error:
            faults.append(str(error))
    if faults and (bad == "refuse" or not parsed):
        more = f" ({len(faults) - SHOWN} more not shown)" if len(faults) > SHOWN else ""
        hint = ', or set data.bad_rows = "drop"' if parsed else ""
        raise DataError(
            "\n".join(faults[:SHOWN])
            + f"\n{len(faults)} of {len(rows)} rows cannot be used{more}; nothing was. Fix or remove them{hint}."
        )
    return parsed, faults


def usable(rows: Sequence[Row], parse: Callable[[Row], T], cfg: DataConfig, notes: list[str]) -> list[T]:
    """`parse_rows` as `data.bad_rows` says; what is dropped is added to the notes, with the first reason."""
    if not rows:
        return []
    parsed, faults = parse_rows(rows, parse, cfg.bad_rows)
    if faults:
        notes.append(f"{len(faults)} of {len(rows)} rows could not be used and were dropped; the first: {faults[0]}")
    return parsed


def content_key(item: Task | Preference | Judgement | Solution) -> str:
    """A stable name for what is asked: equal exactly when the messages before the answer are."""
    messages = item.messages if isinstance(item, Task) else item.prompt
    text = json.dumps([(m.role, m.content, list(m.tool_calls)) for m in messages], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def duplicates(items: Sequence[Task | Preference | Judgement | Solution]) -> int:
    """How many items ask what an earlier one asked. They are kept: how often a row counts is the file's choice."""
    return len(items) - len({content_key(item) for item in items})


def split_holdout(items: Sequence[Asked], share: float, seed: int) -> tuple[list[Asked], list[Asked]]:
    """(train, held out) by what is asked: all rows with the same prompt fall on the same side (see `split_by_key`)."""
    return split_by_key(items, [content_key(item) for item in items], share, seed)


def split_by_key(items: Sequence[T], names: Sequence[str], share: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out): the items of about `share` of the distinct names are held out, at least one of two or more.

    The choice is a function of each name and `seed`, so neither the order of the items nor their number of copies
    matters, and all items of one name fall on the same side. A share of 0 holds nothing out. Raises DataError where a
    single name would have to be on both sides.
    """
    if share <= 0:
        return list(items), []
    ranked = sorted(set(names), key=lambda name: key("holdout", seed, name))
    if len(ranked) < 2:
        raise DataError(
            f"{len(ranked)} distinct question cannot be split into training and evaluation. "
            "Give more rows, or set data.eval_tasks."
        )
    held = set(ranked[: min(len(ranked) - 1, max(1, round(share * len(ranked))))])
    train = [item for item, name in zip(items, names, strict=True) if name not in held]
    return train, [item for item, name in zip(items, names, strict=True) if name in held]


def drop_leaks(train: Sequence[Asked], evaluation: Sequence[Asked]) -> tuple[list[Asked], int]:
    """Training items whose prompt no evaluation item asks, and how many were dropped.

    The training side loses the row, so that a published benchmark stays whole and its score comparable. Raises
    DataError where nothing would be left to train on.
    """
    asked = {content_key(item) for item in evaluation}
    kept = [item for item in train if content_key(item) not in asked]
    if train and not kept:
        raise DataError(
            f"all {len(train)} training questions are also in the evaluation set. Set data.eval_tasks to other data."
        )
    return kept, len(train) - len(kept)


def first_column(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of `names` that the row fills, or None."""
    return next((name for name in names if values.get(name) is not None), None)


def missing_column(row: Row, what: str, columns: Sequence[str]) -> DataError:
    """The error of a row that fills none of `columns`."""
    shown = [f"{name} (null)" if value is None else name for name, value in row.values.items()]
    return DataError(
        f"{row.where}: no column holds {what} ({', '.join(columns)}); the row has {', '.join(shown)}. Rename one."
    )


def question_of(row: Row, values: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    """The messages that `column` holds, or its text as one user message; `input` follows `instruction`."""
    if column == "messages" or isinstance(values[column], list):
        return messages_of(row, values[column], column)
    text = text_of(row, values, column)
    if column == "instruction" and values.get("input"):
        text = f"{text}\n\n{text_of(row, values, 'input')}"
    return (Message("user", text),)


def text_of(row: Row, values: Mapping[str, Any], column: str) -> str:
    """A column's text; numbers become text. Raises DataError where it is empty or something else."""
    value = values[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} holds {type(value).__name__}, expected text.")
    if not value.strip():
        raise DataError(f"{row.where}: column {column!r} is empty. Fill it or remove the row.")
    return value


def messages_of(row: Row, value: Any, column: str) -> tuple[Message, ...]:
    """The messages in a column's list of objects with role and content (and tool_calls). Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: column {column!r} is not a list of messages with role and content.")
    messages: list[Message] = []
    for number, entry in enumerate(value, 1):
        where = f"{row.where}: message {number} of {column!r}"
        if not isinstance(entry, Mapping) or "role" not in entry or "content" not in entry:
            raise DataError(f"{where} has no role and content; expected {{'role': 'user', 'content': '…'}}.")
        calls = tuple(entry.get("tool_calls") or ())
        # Most data sets write a turn that only calls tools with null content.
        content: Any = (entry["content"] or "") if calls else entry["content"]
        try:
            messages.append(Message(entry["role"], content, calls))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    return tuple(messages)
