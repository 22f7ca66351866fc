"""Converts the messages and context columns of a row into `Message`s, and names what nothing reads.

Context columns belong to the conversation as a whole: `system` or `system_prompt`, `history` (earlier exchanges),
`tools` and `chat_template_kwargs` (arguments of the chat template).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from posttrain.data.files import Row
from posttrain.data.messages import ARGUMENTS, THOUGHT, THOUGHT_NAMES, TOOLS, WEIGHT, with_arguments
from posttrain.data.templates import RESERVED
from posttrain.types import DataError, Json, JsonView, Message

SYSTEM_COLUMNS = ("system", "system_prompt")
HISTORY = "history"
CONTEXT_COLUMNS = (*SYSTEM_COLUMNS, HISTORY, TOOLS, ARGUMENTS)
"""Columns that belong to the whole conversation, in any layout of rows with messages."""
_PASSED_ON = ("name", "tool_call_id")
_ROLES = {"function": "tool", "developer": "system"}  # OpenAI's names for the same roles
_TEXT_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv)(\.\w+)?$", re.IGNORECASE)


def messages_of(row: Row, value: Any, column: str) -> tuple[Message, ...]:
    """The messages in a column's list of objects with role and content (and other fields). Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: column {column!r} is not a list of messages with role and content.")
    messages: list[Message] = []
    for number, entry in enumerate(cast("list[Any]", value), 1):
        where = f"{row.where}: message {number} of {column!r}"
        if not isinstance(entry, Mapping) or "role" not in entry:
            raise DataError(f"{where} has no role and content; expected {{'role': 'user', 'content': '…'}}.")
        try:
            messages.append(_message(row, cast(JsonView, entry)))
        except DataError as error:
            raise DataError(
                f"{where}: {error}" if not str(error).startswith("has no") else f"{where} {error}"
            ) from None
    return tuple(messages)


def with_context(row: Row, messages: tuple[Message, ...], lenient: bool = False) -> tuple[Message, ...]:
    """The messages with the row's context columns. With `lenient`, columns of another type are left to the reward.

    Raises DataError if the row gives two system messages, or a column of the wrong type.
    """
    values = row.values
    given = {name: values[name] for name in CONTEXT_COLUMNS if values.get(name) not in (None, "", [], {})}
    found: Json = {}
    for name, value in given.items():
        try:
            found[name] = _CONTEXT[name](row, value)
        except DataError as error:
            if not lenient:
                raise DataError(f"{row.where}: column {name!r} {error}") from None
    begins = 1 if messages and messages[0].role == "system" else 0
    messages = (*messages[:begins], *found.get(HISTORY, ()), *messages[begins:])
    systems = {found[name] for name in SYSTEM_COLUMNS if name in found}
    if begins:
        systems.add(messages[0].content)
    if len(systems) > 1:
        raise DataError(f"{row.where}: the row has two different system messages. Remove one of them.")
    if systems and not begins:
        messages = (Message("system", *systems), *messages)
    return with_arguments(messages, {name: found[name] for name in (TOOLS, ARGUMENTS) if name in found})


def _message(row: Row, entry: JsonView) -> Message:
    calls = tuple(_call(row, call) for call in entry.get("tool_calls") or ())
    if called := entry.get("function_call"):  # OpenAI's older form of a single call
        calls += (_call(row, {"type": "function", "function": called}),)
    fields: Json = {name: entry[name] for name in _PASSED_ON if entry.get(name) not in (None, "")}
    thoughts = {entry[name] for name in THOUGHT_NAMES if isinstance(entry.get(name), str) and entry[name].strip()}
    if len(thoughts) > 1:
        raise DataError(f"the message has {len(thoughts)} different thoughts ({', '.join(THOUGHT_NAMES)}). Keep one.")
    if thoughts:
        fields[THOUGHT] = thoughts.pop()
    weight = entry.get(WEIGHT)
    if weight not in (None, 0, 1):
        raise DataError(f"weight={weight!r}; expected 0 (context only) or 1 (trained).")
    if weight == 0 and entry["role"] == "assistant":
        fields[WEIGHT] = 0
    fields |= {name: check(row, entry[name]) for name, check in _ARGUMENTS.items() if entry.get(name)}
    content = entry.get("content")
    if content is None and entry["role"] == "assistant" and isinstance(entry.get("refusal"), str):
        content = entry["refusal"]  # OpenAI's place for the text of an assistant that declines
    if content is None and not (calls or THOUGHT in fields):
        if "content" not in entry:
            raise DataError("has no role and content; expected {'role': 'user', 'content': '…'}.")
    elif content is None:
        content = ""  # most datasets write a turn that only calls tools with null content, or without it
    role: Any = _ROLES.get(entry["role"], entry["role"]) if isinstance(entry["role"], str) else entry["role"]
    if THOUGHT in fields and role != "assistant":
        raise DataError(f"a {role} message has a thought; only an assistant's can have one.")
    return Message(role, _text(content), calls, fields)


def _text(content: Any) -> Any:
    """The text of a list of text parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    parts = cast("list[Any]", content)
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    whole = len(texts) == len(parts) > 0 and all(isinstance(text, str) for text in texts)
    return "".join(cast("list[str]", texts)) if whole else content


def _call(row: Row, call: Any) -> JsonView:
    """A tool call whose arguments are an object: JSON text is parsed, and nulls that Arrow adds are left out."""
    if not isinstance(call, Mapping):
        raise DataError(f"a tool call is {type(call).__name__}, expected an object.")
    found = dict(cast(JsonView, call))
    if isinstance(found.get("function"), Mapping):
        return {**found, "function": _call(row, found["function"])}
    if isinstance(arguments := found.get("arguments"), str):
        try:
            found["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            found["arguments"] = None
        if not isinstance(found["arguments"], dict):
            raise DataError(f"the arguments of a tool call are {arguments[:60]!r}, expected a JSON object.")
    elif "arguments" in found:
        found["arguments"] = _without_added_nulls(row, arguments)
    return found


def _without_added_nulls(row: Row, value: Any) -> Any:
    """The value without the nulls that Arrow, which gives all rows the same keys, puts where a row has no such key."""
    if _TEXT_FILE.search(row.where.rpartition(":")[0]):
        return value
    if isinstance(value, Mapping):
        entries = cast(JsonView, value).items()
        return {name: _without_added_nulls(row, inner) for name, inner in entries if inner is not None}
    if isinstance(value, list):
        return [_without_added_nulls(row, inner) for inner in cast("list[Any]", value)]
    return value


def _system(row: Row, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"is {type(value).__name__}, expected text.")
    return value


def _history(row: Row, value: Any) -> tuple[Message, ...]:
    """Earlier messages: pairs of a question and a reply, or objects with role and content."""
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in cast("list[Any]", value)):
        return messages_of(row, value, HISTORY)
    pairs = cast("list[Any]", value) if isinstance(value, list) else []
    whole = all(isinstance(pair, list | tuple) and [*map(type, cast(Any, pair))] == [str, str] for pair in pairs)
    if not pairs or not whole:
        raise DataError("is not a list of [question, reply] pairs or of messages.")
    return tuple(Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True))


def _tools(row: Row, value: Any) -> list[Json]:
    tools = _parsed(value)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in cast("list[Any]", tools)):
        raise DataError(
            "is not a list of tools (objects with a name, description and parameters), or JSON text of one."
        )
    return _without_added_nulls(row, [dict(_parsed(tool)) for tool in cast("list[Any]", tools)])


def _kwargs(row: Row, value: Any) -> Json:
    found = _parsed(value)
    if not isinstance(found, Mapping):
        raise DataError("is not an object with arguments of the chat template.")
    found = {name: inner for name, inner in cast(JsonView, found).items() if inner is not None}
    if taken := sorted(found.keys() & set(RESERVED)):
        raise DataError(f"sets {', '.join(taken)}, which posttrain sets itself. Remove it.")
    return found


def _parsed(value: Any) -> Any:
    """The value of a JSON text; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


_ARGUMENTS: dict[str, Callable[[Row, Any], Any]] = {TOOLS: _tools, ARGUMENTS: _kwargs}
_CONTEXT: dict[str, Callable[[Row, Any], Any]] = {
    **dict.fromkeys(SYSTEM_COLUMNS, _system),
    HISTORY: _history,
    **_ARGUMENTS,
}
