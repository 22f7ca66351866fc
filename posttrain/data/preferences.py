"""Converts rows into preferences, judgements and stepwise solutions, the data of reward models and offline methods.

Every layout is converted to one conversation per answer; the messages before the last one are the prompt. The error
for a bad row starts with `file:line`; `sources.parse_rows` collects these errors over a whole file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal, TypeVar

from posttrain.data.files import Row, is_file_name, read_rows, row_fault
from posttrain.data.messages import Answer, as_json, from_json
from posttrain.data.row_messages import with_context
from posttrain.data.sources import (
    PROMPT_COLUMNS,
    first_column,
    messages_of,
    missing_column,
    question_of,
    text_of,
    with_instruction,
    with_system,
)
from posttrain.types import DataError, Json, Judgement, Message, Preference, Solution

PAIR_COLUMNS = ("chosen", "rejected")
"""Columns for the two answers of a preference: texts, or lists of messages."""
COMPLETION_COLUMNS = ("completion", "response", "output", "answer")
"""Columns for the answer of a judgement, in order of precedence; then the last message of `messages`."""
STEP_COLUMNS = ("steps", "completions")
"""Columns for the steps of a solution, in order of precedence."""
STEP_LABEL_COLUMNS = ("labels", "mistake_index", "label")
"""Columns for the step labels, in order of precedence: one label per step, or the index of the first wrong step."""

# `prompt` first: if a row also has `messages`, they usually repeat the prompt and one of the answers.
_PROMPTS = ("prompt", *(name for name in PROMPT_COLUMNS if name != "prompt"))
_TURN = re.compile(r"\n\n(Human|Assistant):")
SCORE_GAP = "score_chosen − score_rejected"
"""The margin of a pair without the column `margin`."""
VERDICTS = {"desirable": True, "undesirable": False}
"""Texts that a judgement's label can be, in any case."""

AfterMistake = Literal["drop", "wrong"]
T = TypeVar("T", Preference, Judgement, Solution)


def row_to_preference(row: Row, system: str = "", instruction: str = "") -> Preference:
    """Converts a row into a preference; its id is `file:line` without the folder.

    `chosen` and `rejected` are either answers to the prompt column (text, or messages that begin with the assistant)
    or whole conversations: messages that begin with the system or the user, or a text whose turns begin with "Human:"
    or "Assistant:" after a blank line (the layout of Anthropic's HH-RLHF; white space around a turn is removed). The
    last assistant message is the answer, and everything before it must be the same on both sides. If there is a prompt
    column as well, whole conversations must contain it.

    `label` is the probability that chosen is better; without it, `tie: true` means 0.5 and anything else 1. The margin
    is `margin`, else `score_chosen` − `score_rejected`, else 0. Raises DataError naming `file:line`.
    """
    filled = [name for name in PAIR_COLUMNS if row.values.get(name) is not None]
    if not filled:
        raise missing_column(row, "a pair of answers", PAIR_COLUMNS)
    if len(filled) == 1:
        (lacking,) = set(PAIR_COLUMNS) - set(filled)
        raise DataError(f"{row.where}: the row has {filled[0]!r} but no {lacking!r}. Add it or remove the row.")
    question = _optional_prompt(row)
    chosen, rejected = (_conversation(row, name, question) for name in PAIR_COLUMNS)
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{row.where}: chosen ({len(chosen)} messages) and rejected ({len(rejected)}) differ before their last "
            f"message, first in message {_first_difference(chosen, rejected)}. Only the answers may differ."
        )
    prompt = _prompt(row, chosen[:-1], system, instruction)
    margin = next(iter(pair_scores(row).values()), 0.0)
    try:
        return Preference(_id(row), prompt, Answer.of(chosen[-1]), Answer.of(rejected[-1]), pair_label(row), margin)
    except DataError as error:
        raise _with_location(row, error) from None


def row_to_judgement(row: Row, system: str = "", instruction: str = "") -> Judgement:
    """Converts a row into a judgement: a prompt, one answer and whether it is desirable (the data of KTO).

    The answer is text or messages, as in `row_to_preference`. `label` is true or false, 1 or 0, or "desirable" or
    "undesirable". Raises DataError naming `file:line`.
    """
    column = first_column(row.values, COMPLETION_COLUMNS)
    if column is None and row.values.get("messages") is None:
        raise missing_column(row, "an answer", (*COMPLETION_COLUMNS, "messages"))
    conversation = _conversation(row, column, _optional_prompt(row)) if column else _conversation(row, "messages", ())
    label = row.values.get("label")
    if label is None:
        raise missing_column(row, "a label", ("label",))
    verdict = VERDICTS.get(label.strip().lower()) if isinstance(label, str) else label
    if verdict not in (0, 1):
        raise DataError(f"{row.where}: label={label!r}, expected true, 1 or 'desirable', or false, 0 or 'undesirable'.")
    prompt = _prompt(row, conversation[:-1], system, instruction)
    return Judgement(_id(row), prompt, Answer.of(conversation[-1]), bool(verdict))


def judgements_of(preference: Preference) -> tuple[Judgement, ...]:
    """Converts a pair into judgements for KTO: the better answer is desirable, the other undesirable.

    A tie (label 0.5) gives no judgements. The ids are the preference's id with `/chosen` and `/rejected`.
    """
    if preference.label == 0.5:
        return ()
    better = preference.label > 0.5
    return (
        Judgement(f"{preference.id}/chosen", preference.prompt, preference.chosen, better),
        Judgement(f"{preference.id}/rejected", preference.prompt, preference.rejected, not better),
    )


def row_to_solution(
    row: Row, system: str = "", instruction: str = "", after_mistake: AfterMistake = "drop"
) -> Solution:
    """Converts a row into a stepwise solution: a prompt, steps, and one label per step.

    Labels are either one boolean or number in [0, 1] per step, used as given, or the 0-based index of the first wrong
    step, in `mistake_index` (BIG-Bench-Mistake; null if all steps are right) or `label` (ProcessBench; −1 if all are
    right). With an index, the steps before it get label 1 and the wrong step gets label 0. The steps after a mistake
    have no labels; they are dropped, as in Lightman et al. 2023 ("Let's Verify Step by Step"), who supervise up to and
    including the first mistake, while `after_mistake="wrong"` keeps them with label 0. Raises DataError naming
    `file:line`.
    """
    steps = _steps(row)
    column = first_column(row.values, STEP_LABEL_COLUMNS)
    if "mistake_index" in row.values and column != "labels":
        column = "mistake_index"  # null means that every step is right
    if column is None:
        raise missing_column(row, "step labels", STEP_LABEL_COLUMNS)
    if column == "labels":
        labels = _step_labels(row)
    else:
        wrong = _first_mistake(row, column, len(steps))
        labels = [1.0] * len(steps) if wrong is None else [1.0] * wrong + [0.0] * (len(steps) - wrong)
        if wrong is not None and after_mistake == "drop":
            steps, labels = steps[: wrong + 1], labels[: wrong + 1]
    prompt = _prompt(row, _required_prompt(row), system, instruction)
    try:
        return Solution(_id(row), prompt, tuple(steps), tuple(labels))
    except DataError as error:
        raise _with_location(row, error) from None


def row_to_outcome(row: Row, system: str = "", instruction: str = "", separator: str = "\n") -> Judgement:
    """Converts a stepwise row into a judgement: all steps joined, desirable if the final answer is right.

    The final answer is right if `final_answer_correct` is true (ProcessBench), or, without that column, if `answer`
    equals `target` up to surrounding white space (BIG-Bench-Mistake; a null answer is wrong). Raises DataError naming
    `file:line`.
    """
    values = row.values
    right = values.get("final_answer_correct")
    if right is None and "answer" in values and values.get("target") is not None:
        right = values["answer"] is not None and str(values["answer"]).strip() == str(values["target"]).strip()
    if right is None:
        raise missing_column(row, "whether the final answer is right", ("final_answer_correct", "answer+target"))
    if not isinstance(right, bool):
        raise DataError(f"{row.where}: final_answer_correct={right!r}, expected true or false.")
    try:
        prompt = _prompt(row, _required_prompt(row), system, instruction)
        return Judgement(_id(row), prompt, separator.join(_steps(row)), right)
    except DataError as error:
        raise _with_location(row, error) from None


def write_preferences(path: str | Path, preferences: Sequence[Preference]) -> None:
    """Writes JSON Lines that `read_preferences` reads back unchanged. Raises DataError if JSON cannot represent one."""
    _write(path, preferences)


def read_preferences(path: str | Path) -> list[Preference]:
    """Reads preferences written by `write_preferences`. Raises DataError naming `file:line`."""
    return _read(path, Preference)


def write_judgements(path: str | Path, judgements: Sequence[Judgement]) -> None:
    """Writes JSON Lines that `read_judgements` reads back unchanged. Raises DataError if JSON cannot represent one."""
    _write(path, judgements)


def read_judgements(path: str | Path) -> list[Judgement]:
    """Reads judgements written by `write_judgements`. Raises DataError naming `file:line`."""
    return _read(path, Judgement)


def write_solutions(path: str | Path, solutions: Sequence[Solution]) -> None:
    """Writes JSON Lines that `read_solutions` reads back unchanged. Raises DataError if JSON cannot represent one."""
    _write(path, solutions)


def read_solutions(path: str | Path) -> list[Solution]:
    """Reads solutions written by `write_solutions`. Raises DataError naming `file:line`."""
    return _read(path, Solution)


def _optional_prompt(row: Row) -> tuple[Message, ...]:
    """The messages in the prompt column, or none if there is no such column."""
    column = first_column(row.values, _PROMPTS)
    if column is None:
        return ()
    messages = question_of(row, row.values, column)
    if len(messages) == 1 and _is_dialogue(messages[0].content):
        turns = _parse_dialogue(messages[0].content)
        if turns[-1] == Message("assistant", ""):  # a prompt that ends with "Assistant:"
            return turns[:-1]
    return messages


def _required_prompt(row: Row) -> tuple[Message, ...]:
    prompt = _optional_prompt(row)
    if not prompt:
        raise missing_column(row, "a prompt", _PROMPTS)
    return prompt


def _conversation(row: Row, column: str, question: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation up to and including the answer in `column`; `question` is the prompt column, if any."""
    if isinstance(row.values[column], list):
        messages = messages_of(row, row.values[column], column)
    else:
        text = text_of(row, row.values, column)
        messages = _parse_dialogue(text) if _is_dialogue(text) else (Message("assistant", text),)
    if messages[0].role in ("assistant", "tool"):
        messages = (*(question or _required_prompt(row)), *messages)
    elif not _user_texts(question) <= _user_texts(messages):
        raise DataError(
            f"{row.where}: {column!r} is a conversation that does not contain the prompt. Remove one of them."
        )
    answer = messages[-1]
    if answer.role != "assistant":
        raise DataError(f"{row.where}: {column!r} ends with a {answer.role} message, expected an assistant message.")
    if answer.tool_calls:
        raise DataError(
            f"{row.where}: the answer in {column!r} calls tools, but only text answers can be compared. Remove the row."
        )
    if not answer.content.strip():
        raise DataError(f"{row.where}: the answer in {column!r} is empty. Fill it or remove the row.")
    return messages


def _user_texts(messages: Sequence[Message]) -> set[str]:
    return {m.content.strip() for m in messages if m.role == "user"}


def _is_dialogue(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _parse_dialogue(text: str) -> tuple[Message, ...]:
    """The turns of a text that begins with `Human:`."""
    _, *pieces = _TURN.split("\n\n" + text.lstrip())
    return tuple(
        Message("user" if name == "Human" else "assistant", content.strip())
        for name, content in zip(pieces[::2], pieces[1::2], strict=True)
    )


def _prompt(row: Row, messages: tuple[Message, ...], system: str, instruction: str) -> tuple[Message, ...]:
    if not any(m.role == "user" for m in messages):
        raise DataError(f"{row.where}: there is no user message before the answer. Add one or remove the row.")
    if messages[-1].role == "assistant":
        raise DataError(
            f"{row.where}: there is an assistant message right before the answer, so it is unclear where the answer "
            "begins. Join the two or remove the row."
        )
    messages = with_context(row, messages)
    return with_system(row.where, with_instruction(messages, instruction), system)


def _first_difference(one: Sequence[Message], other: Sequence[Message]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False), 1) if a != b), min(len(one), len(other)))


def pair_label(row: Row) -> float:
    """The probability that chosen is better: `label`, else 0.5 for a tie, else 1. Raises DataError."""
    tie, label = row.values.get("tie"), _number(row, "label")
    if tie is not None and not isinstance(tie, bool):
        raise DataError(f"{row.where}: tie={tie!r}, expected true or false.")
    if label is None:
        return 0.5 if tie else 1.0
    if tie and label != 0.5:
        raise DataError(f"{row.where}: tie=true contradicts label={label:g}. Remove one of them.")
    return label


def pair_scores(row: Row) -> dict[str, float]:
    """By how much chosen is better, as the row has it: `margin`, the difference of the scores, both, or neither."""
    margin, chosen, rejected = (_number(row, name) for name in ("margin", "score_chosen", "score_rejected"))
    if (chosen is None) != (rejected is None):
        raise DataError(f"{row.where}: the row has only one of score_chosen and score_rejected. Give both or neither.")
    found = {} if margin is None else {"margin": margin}
    return found if chosen is None or rejected is None else {**found, SCORE_GAP: chosen - rejected}


def _number(row: Row, column: str) -> float | None:
    value = row.values.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{row.where}: {column}={value!r} is not a finite number.")
    return float(value)


def _steps(row: Row) -> list[str]:
    column = first_column(row.values, STEP_COLUMNS)
    if column is None:
        raise missing_column(row, "steps", STEP_COLUMNS)
    steps = row.values[column]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise DataError(f"{row.where}: column {column!r} is not a list of texts, one per step.")
    return steps


def _step_labels(row: Row) -> list[float]:
    labels = row.values["labels"]
    if not isinstance(labels, list) or not all(isinstance(label, int | float) for label in labels):
        raise DataError(f"{row.where}: labels={labels!r} is not a list of booleans or numbers from 0 to 1.")
    return [float(label) for label in labels]


def _first_mistake(row: Row, column: str, steps: int) -> int | None:
    value = row.values[column]
    if value is None or (column == "label" and value == -1):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < steps:
        none = "-1" if column == "label" else "null"
        raise DataError(
            f"{row.where}: {column}={value!r} is not the index of one of the {steps} steps; expected 0 to "
            f"{steps - 1}, or {none} if no step is wrong."
        )
    return value


def _id(row: Row) -> str:
    source, _, line = row.where.rpartition(":")
    return f"{Path(source).name if is_file_name(source) else source}:{line}"


def _with_location(row: Row, error: DataError) -> DataError:
    text = str(error)
    return error if text.startswith(f"{row.where}: ") else DataError(f"{row.where}: {text}")


def _write(path: str | Path, items: Sequence[Preference | Judgement | Solution]) -> None:
    lines: list[str] = []
    for item in items:
        values = {f.name: getattr(item, f.name) for f in fields(item)}
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        values["prompt"] = [as_json(m) for m in item.prompt]
        try:
            lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
            lines[-1].encode("utf-8")
            fault = "it would not read back equal." if json.loads(lines[-1]) != values else row_fault(values, lines[-1])
        except (TypeError, ValueError) as error:
            fault = f"{error}."
        if fault:
            raise DataError(f"{type(item).__name__.lower()} {item.id!r} cannot be written as JSON: {fault}")
    Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")


def _read(path: str | Path, kind: type[T]) -> list[T]:
    items: list[T] = []
    for row in read_rows(str(path)):
        values: Json = {k: tuple(v) if isinstance(v, list) else v for k, v in row.values.items()}
        try:
            values["prompt"] = tuple(from_json(m) for m in row.values["prompt"])
            items.append(kind(**values))
        except (KeyError, TypeError, AttributeError, DataError) as error:
            name = kind.__name__.lower()
            raise DataError(f"{row.where}: not a {name} written by write_{name}s: {error}.") from None
    return items
