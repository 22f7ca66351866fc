"""How a model is told of its tools, and the calls that a reply holds, in either of two forms.

    <tool_call>{"name": "calculator", "arguments": {"expression": "12*7"}}</tool_call>
    <calculator>12*7</calculator>

The first is what Hermes and Qwen models were trained on. The second names a tool and gives its one argument, or all
of them as a JSON object; it is short enough for a tiny model to learn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.data.tool_schema import Tool, ToolError, arguments, fit, only_argument
from posttrain.types import Message

Syntax = Literal["json", "inline"]


@dataclass(frozen=True)
class Call:
    """One call as it was written: decoded `arguments` or, in the inline form, `text`. `error` says why it is none."""

    name: str = ""
    arguments: Any = None
    text: str | None = None
    error: str = ""


def describe(schemas: Sequence[Mapping[str, Any]], syntax: Syntax = "json") -> str:
    """What a system message says of tools with these schemas (`Tool.schema`)."""
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
    """The messages with a text at the end of their system message, or as the system message where there is none."""
    if messages and messages[0].role == "system":
        return (Message("system", f"{messages[0].content}\n\n{text}"), *messages[1:])
    return (Message("system", text), *messages)


def parse_calls(text: str, inline: Sequence[str] = ()) -> list[Call]:
    """The calls in a text, in their order; `inline` are the names that are read as tags. Never raises.

    A call that cannot be read is a Call with an `error`.
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


def call_arguments(call: Call, tool: Tool) -> dict[str, Any]:
    """The arguments of a call to `tool`, as its function takes them. Raises ToolError, written for the model."""
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
    """A JSON value. Raises ToolError saying where `what` is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ToolError(f"{what} is not valid JSON: {error.msg} at character {error.pos + 1}.") from None
    except RecursionError:
        raise ToolError(f"{what} is nested too deeply.") from None
    except ValueError:  # a constant that is refused, or a number of thousands of digits
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


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _inline_hint(schema: Mapping[str, Any]) -> str:
    """What stands between the tags: the argument's name, or an object of all of them."""
    only = only_argument(Tool(schema["name"], "", schema["parameters"], dict))
    if only is not None:
        return only
    return "{" + ", ".join(f'"{name}": …' for name in schema["parameters"]["properties"]) + "}"
