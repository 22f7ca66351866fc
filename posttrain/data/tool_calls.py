"""Describes tools to a model and parses the tool calls in its replies, in two formats.

    <tool_call>{"name": "calculator", "arguments": {"expression": "12*7"}}</tool_call>
    <calculator>12*7</calculator>

Hermes and Qwen models were trained on the first format. The second has the tool's name as a tag around its only
argument, or around a JSON object with all arguments; it is short enough for a tiny model to learn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain.data.tool_schema import Tool, ToolError, arguments, fit, only_argument
from posttrain.types import Json, JsonView, Message

Syntax = Literal["json", "inline"]


@dataclass(frozen=True)
class Call:
    """One call as written: decoded `arguments` or, in the inline format, `text`. `error` is set if it is invalid."""

    name: str = ""
    arguments: Any = None
    text: str | None = None
    error: str = ""


def describe(schemas: Sequence[JsonView], syntax: Syntax = "json") -> str:
    """System-message text that describes tools with these schemas (`Tool.schema`)."""
    if syntax == "inline":
        lines = [f"<{s['name']}>{_inline_hint(s)}</{s['name']}> {s['description']}" for s in schemas]
        return "\n".join(["Tools:", *lines])
    lines = [json.dumps({"type": "function", "function": s}, ensure_ascii=False) for s in schemas]
    return "\n".join(
        [
            "You have these tools, one a line:",
            *lines,
            "To use one, write",
            '<tool_call>{"name": NAME, "arguments": {NAME OF AN ARGUMENT: VALUE, …}}</tool_call>',
            "You are then shown what it gave. A reply without a call is your answer.",
        ]
    )


def with_system_text(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """Appends a text to the system message, or adds it as the system message if there is none."""
    if messages and messages[0].role == "system":
        return (replace(messages[0], content=f"{messages[0].content}\n\n{text}"), *messages[1:])
    return (Message("system", text), *messages)


def parse_calls(text: str, inline: Sequence[str] = ()) -> list[Call]:
    """Parses the calls in a text, in order; `inline` are the tool names accepted as tags. Never raises.

    A call that cannot be parsed is returned as a Call with an `error`.
    """
    tags = "|".join(map(re.escape, inline)) or r"(?!)"
    pattern = (
        rf"<tool_call>(?P<json>.*?)(?P<end></tool_call>|\Z)|<(?P<name>{tags})>(?P<text>.*?)(?P<close></(?P=name)>|\Z)"
    )
    calls: list[Call] = []
    for found in re.finditer(pattern, text, re.DOTALL):
        name = found["name"] or "tool_call"
        if not (found["end"] or found["close"]):
            calls.append(Call(error=f"the call is not closed; </{name}> is missing."))
        elif found["name"]:
            calls.append(Call(name, text=found["text"]))
        else:
            calls.append(_from_json(found["json"]))
    return calls


def call_arguments(call: Call, tool: Tool) -> Json:
    """The arguments of a call to `tool`, checked and converted. Raises ToolError with a message for the model."""
    if call.text is None:
        return arguments(tool, call.arguments)
    text, only = call.text.strip(), only_argument(tool)
    if only is None:
        return arguments(tool, decode(text, f"the arguments of {tool.name}") if text else {})
    schema = tool.parameters["properties"][only]
    where = f"argument {only!r} of {tool.name}"
    if {"string"} & {option.get("type") for option in (schema, *schema.get("anyOf", ()))}:
        return {only: text}
    if text in schema.get("enum", ()):
        return {only: text}
    return {only: fit(schema, decode(text, where), where)}


def decode(text: str, what: str) -> Any:
    """Decodes a JSON value. Raises ToolError saying where `what` is not valid JSON."""
    try:
        return json.loads(text, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        raise ToolError(f"{what} is not valid JSON: {error.msg} at character {error.pos + 1}.") from None
    except RecursionError:
        raise ToolError(f"{what} is nested too deeply.") from None
    except ValueError:  # NaN or Infinity, or a number with thousands of digits
        raise ToolError(f"{what} is not valid JSON: it holds a number that is not finite, or far too long.") from None


def _from_json(text: str) -> Call:
    try:
        value = decode(text, "the call")
    except ToolError as error:
        return Call(error=str(error))
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call(error='a call is an object {"name": …, "arguments": {…}}; this one has no name.')
    if "arguments" not in value:
        return Call(error=f'the call of {value["name"][:60]} has no "arguments"; give {{}} where there are none.')
    return Call(value["name"], value["arguments"])


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _inline_hint(schema: JsonView) -> str:
    """The hint between the tags: the name of the only argument, or an object with all arguments."""
    only = only_argument(Tool(schema["name"], "", schema["parameters"], dict))
    if only is not None:
        return only
    return "{" + ", ".join(f'"{name}": …' for name in schema["parameters"]["properties"]) + "}"
