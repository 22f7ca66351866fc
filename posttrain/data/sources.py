"""Converts rows into tasks and conversations, splits them, counts duplicates and removes evaluation leaks.

Columns are looked up in the order of `PROMPT_COLUMNS` and `ANSWER_COLUMNS`; the first that a row has is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from posttrain.config import DataConfig
from posttrain.data.answers import split_gold
from posttrain.data.files import SHOWN, Row, data_hash, is_file_name, is_hub_id, read_rows
from posttrain.data.formats import converter_for
from posttrain.data.messages import is_trained
from posttrain.data.row_messages import messages_of, with_context
from posttrain.rng import key
from posttrain.types import DataError, JsonView, Judgement, Message, Preference, Solution, Task

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
    "messages_of",
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
"""An item with a prompt: a task, or a prompt with completions."""

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem", "instruction", "input")
"""Columns for the prompt, in order of precedence. `input` is appended to `instruction` if a row has both."""
ANSWER_COLUMNS = ("answer", "solution", "target", "label")
"""Columns for the gold answer, in order of precedence."""
INPUT_COLUMNS = ("input", "context")
"""Columns that are appended to an `instruction`, after a blank line each."""
PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("problem", "solution"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("question", "response"),
    ("instruction", "response"),
)
"""Column pairs of a supervised row, in order of precedence, after `text` and `messages`."""
TEST_COLUMNS = ("cases", "tests")
"""Columns with tests: a row with one of these asks for a program, which is executed to check it."""


def row_to_task(row: Row, env: str, system: str = "", instruction: str = "", needs_answer: bool = True) -> Task:
    """Converts a row into a task with the id `env:line`.

    `messages` (or a `prompt` that is a list) may end with an assistant turn: the gold answer if there is no answer
    column, else the beginning of the reply, which completions continue. Context columns (`system`, `tools`, …) are part
    of the prompt, and of `meta`. A gold answer such as GSM8K's `… #### 1,072` becomes "1072", and the text before it
    becomes `meta["worked"]`; a program, in a row with tests, is not split. All unused columns go to `meta`. Raises
    DataError naming `file:line`.
    """
    values = dict(row.values)
    column = first_column(values, PROMPT_COLUMNS)
    if column is None:
        raise missing_column(row, "a question", PROMPT_COLUMNS)
    messages = question_of(row, values, column)
    used = {column, *INPUT_COLUMNS} if column == "instruction" else {column}
    answer_column = first_column(values, tuple(c for c in ANSWER_COLUMNS if c not in used))
    answer: Any = None
    if messages[-1].role == "assistant" and answer_column is None:
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
        raise DataError(
            f"{row.where}: column {answer_column!r} gives the answer {answer!r}. Give one that is not empty."
        )
    if messages[-1].role == "assistant":
        _require_beginning(row, messages[-1], answer)
    messages = with_context(row, messages, lenient=True)
    messages = with_system(row.where, with_instruction(messages, instruction), system)
    try:
        columns = {name: value for name, value in values.items() if name in used and value is not None}
        return Task(f"{env}:{row.where.rpartition(':')[2]}", env, messages, answer, meta, columns=columns)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None


def row_to_conversation(row: Row, system: str = "", instruction: str = "") -> str | tuple[Message, ...]:
    """Converts a supervised row into a plain text, or into messages with at least one assistant turn.

    Columns in order of precedence: `text`; `messages`; `prompt` + `completion`; `question` + `answer`; `problem` +
    `solution`; `instruction` (+ `input`) + `output`. Raises DataError naming `file:line` if nothing could be trained.
    """
    values = dict(row.values)
    if values.get("text") is not None:
        if system or instruction:
            raise DataError(f"{row.where}: a `text` row cannot use data.system or data.instruction. Unset them.")
        return text_of(row, values, "text")
    if values.get("messages") is not None:
        messages = messages_of(row, values["messages"], "messages")
    else:
        pair = next((p for p in PAIRS if all(values.get(c) is not None for c in p)), None)
        if pair is None:
            raise missing_column(row, "text to train on", ("text", "messages", *("+".join(p) for p in PAIRS)))
        messages = question_of(row, values, pair[0])
        if isinstance(values[pair[1]], list):
            replies = messages_of(row, values[pair[1]], pair[1])
        else:
            replies = (Message("assistant", text_of(row, values, pair[1])),)
        if messages[-1].role == replies[0].role == "assistant":
            raise DataError(
                f"{row.where}: {pair[0]!r} ends with an assistant message and {pair[1]!r} begins with one, so it is "
                "unclear whether the second continues the first. Join the two or remove the row."
            )
        messages += replies
    if not any(is_trained(m) and (m.content.strip() or m.tool_calls) for m in messages):
        raise DataError(
            f"{row.where}: there is no assistant message with text or a tool call to train on. Remove the row."
        )
    messages = with_context(row, messages)
    return with_system(row.where, with_instruction(messages, instruction), system)


def with_instruction(messages: tuple[Message, ...], instruction: str) -> tuple[Message, ...]:
    """Appends `instruction` to every user message after a blank line."""
    if not instruction:
        return messages
    asked = f"\n\n{instruction}"
    return tuple(replace(m, content=m.content + asked) if m.role == "user" else m for m in messages)


def with_system(where: str, messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """Prepends a system message. Raises DataError if there already is one, because it is unclear which should win."""
    if not system:
        return messages
    if any(m.role == "system" for m in messages):
        raise DataError(f"{where}: the row has its own system message. Remove it, or leave data.system empty.")
    return (Message("system", system), *messages)


def parse_rows(
    rows: Sequence[Row], parse: Callable[[Row], T], bad: Literal["refuse", "drop"] = "refuse"
) -> tuple[list[T], list[str]]:
    """Parses all rows; returns the results and the error messages of the rows that failed.

    With `bad="refuse"`, any bad row raises one DataError that shows the first 20 and counts all; with "drop", bad rows
    are left out, and the caller reports them. Raises DataError if no row is left.
    """
    parsed: list[T] = []
    faults: list[str] = []
    converter = ""
    for row in rows:
        if row.fault:
            faults.append(f"{row.where}: {row.fault}")
            continue
        try:
            parsed.append(parse(row))
        except DataError as error:
            faults.append(str(error))
            converter = converter or converter_for(row.values)
    if faults and (bad == "refuse" or not parsed):
        more = f" ({len(faults) - SHOWN} more not shown)" if len(faults) > SHOWN else ""
        hint = ', or set data.bad_rows = "drop"' if parsed else ""
        raise DataError(
            "\n".join(faults[:SHOWN])
            + f"\n{len(faults)} of {len(rows)} rows cannot be used{more}; no row was used. Fix or remove them{hint}."
            + converter
        )
    return parsed, faults


def usable(rows: Sequence[Row], parse: Callable[[Row], T], cfg: DataConfig, notes: list[str]) -> list[T]:
    """`parse_rows` with the setting `data.bad_rows`; dropped rows are noted in `notes`, with the first reason."""
    if not rows:
        return []
    parsed, faults = parse_rows(rows, parse, cfg.bad_rows)
    if faults:
        notes.append(f"{len(faults)} of {len(rows)} rows were dropped as unusable; the first: {faults[0]}")
    return parsed


def content_key(item: Task | Preference | Judgement | Solution) -> str:
    """Hash of the prompt: equal exactly if the messages before the answer are equal."""
    messages = item.messages if isinstance(item, Task) else item.prompt
    parts = [(m.role, m.content, list(m.tool_calls), *([dict(m.fields)] if m.fields else [])) for m in messages]
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def duplicates(items: Sequence[Task | Preference | Judgement | Solution]) -> int:
    """Number of items whose prompt repeats an earlier one. They are kept, so a file can repeat rows to weight them."""
    return len(items) - len({content_key(item) for item in items})


def split_holdout(items: Sequence[Asked], share: float, seed: int) -> tuple[list[Asked], list[Asked]]:
    """Splits items into (train, held-out) by prompt: all items with the same prompt are on the same side."""
    return split_by_key(items, [content_key(item) for item in items], share, seed)


def split_by_key(items: Sequence[T], names: Sequence[str], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Splits items into (train, held-out): about `share` of the distinct names are held out, but at least one.

    The choice depends only on the names and `seed`, not on the order or number of the items, and all items with one
    name are on the same side. A share of 0 holds nothing out. Raises DataError if there is only one name, which cannot
    be split.
    """
    if share <= 0:
        return list(items), []
    ranked = sorted(set(names), key=lambda name: key("holdout", seed, name))
    if len(ranked) < 2:
        raise DataError(
            f"all {len(items)} rows have the same prompt, so they cannot be split into training and evaluation. "
            "Give more rows, or set data.eval_tasks."
            if len(items) > 1
            else "one row cannot be split into training and evaluation. Give more rows, or set data.eval_tasks."
        )
    held = set(ranked[: min(len(ranked) - 1, max(1, round(share * len(ranked))))])
    train = [item for item, name in zip(items, names, strict=True) if name not in held]
    return train, [item for item, name in zip(items, names, strict=True) if name in held]


def drop_leaks(train: Sequence[Asked], evaluation: Sequence[Asked]) -> tuple[list[Asked], int]:
    """Training items whose prompt is not in the evaluation set, and the number of items dropped.

    Overlaps are dropped from the training side, so that a published benchmark stays complete and its score comparable.
    Raises DataError if nothing would be left to train on.
    """
    asked = {content_key(item) for item in evaluation}
    kept = [item for item in train if content_key(item) not in asked]
    if train and not kept:
        raise DataError(
            f"all {len(train)} training prompts are also in the evaluation set. Set data.eval_tasks to other data."
        )
    return kept, len(train) - len(kept)


def first_column(values: JsonView, names: Sequence[str]) -> str | None:
    """The first of `names` that has a value in the row, or None."""
    return next((name for name in names if values.get(name) is not None), None)


def _require_beginning(row: Row, begun: Message, answer: Any) -> None:
    """Raises DataError if a last assistant turn, which completions would continue, states the answer already."""
    if answer not in (None, "") and re.search(rf"(?<!\w){re.escape(str(answer))}(?!\w)", begun.content):
        raise DataError(
            f"{row.where}: the last message is an assistant's, which the completion would continue, but it states the "
            f"answer {str(answer)[:40]!r} already. Remove that message, or the answer column."
        )


def missing_column(row: Row, what: str, columns: Sequence[str]) -> DataError:
    """The error for a row with no value in any of `columns`."""
    shown = [f"{name} (null)" if value is None else name for name, value in row.values.items()]
    return DataError(
        f"{row.where}: no column holds {what} ({', '.join(columns)}); the row has {', '.join(shown)}. Rename a "
        "column: posttrain data convert FILE --to FILE --rename OLD=NEW."
    )


def question_of(row: Row, values: JsonView, column: str) -> tuple[Message, ...]:
    """The messages in `column`, or its text as one user message; `input` and `context` follow an `instruction`."""
    if column == "messages" or isinstance(values[column], list):
        return messages_of(row, values[column], column)
    text = text_of(row, values, column)
    if column == "instruction":
        for more in INPUT_COLUMNS:
            text += f"\n\n{text_of(row, values, more)}" if values.get(more) else ""
    return (Message("user", text),)


def text_of(row: Row, values: JsonView, column: str) -> str:
    """The text in a column; numbers are converted to text. Raises DataError if it is empty or of another type."""
    value = values[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} holds {type(value).__name__}, expected text.")
    if not value.strip():
        raise DataError(f"{row.where}: column {column!r} is empty. Fill it or remove the row.")
    return value
