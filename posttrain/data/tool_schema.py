"""Python functions as tools: the signature becomes a JSON schema, and the model's arguments are checked against it.

    def shout(text: str, times: int = 1) -> str:
        "Writes a text in capitals."
        return " ".join([text.upper()] * times)

    tool_from(shout).schema["parameters"]["required"]   # ["text"]

Parameters may be str, int, float, bool, Literal, list, dict with str keys, and unions of these. A mistake by the model
raises ToolError, with a message written for the model; a mistake by the function's author raises ConfigError.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from posttrain.types import ConfigError, Json, JsonView

SIMPLE: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}
"""Python type → JSON schema type."""
WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}
"""Name of each JSON schema type in messages to the model."""
SHOWN = 60


class ToolError(ValueError):
    """A tool call that is invalid or failed; the model reads the message."""


@dataclass(frozen=True)
class Tool:
    """A function the model can call. `parameters` is a JSON schema of type object; `function` takes its properties."""

    name: str
    description: str
    parameters: JsonView
    function: Callable[..., Any]

    @property
    def schema(self) -> Json:
        """The schema shown to the model."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


def tool_from(function: Callable[..., Any]) -> Tool:
    """Makes a tool from a function.

    The description is the docstring's first paragraph; parameters are described by the lines `name: …` of its `Args:`
    section. Raises ConfigError naming the function and the parameter that cannot be described.
    """
    name = getattr(function, "__name__", "")
    if not name.isidentifier() or name == "tool_call":
        raise ConfigError(f"a tool cannot be named {name!r}. Define it with def and give it another name.")
    doc = inspect.getdoc(function)
    if not doc:
        raise ConfigError(f"tool {name} has no docstring. Describe in one line what it does; the model reads it.")
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise ConfigError(
            f"the type hints of tool {name} cannot be resolved: {error}. Import the types they name."
        ) from None
    described = {m[1]: m[2] for m in re.finditer(r"^ {4}(\w+): (.+)", doc.partition("\nArgs:\n")[2], re.MULTILINE)}
    properties: Json = {}
    required: list[str] = []
    for p in inspect.signature(function).parameters.values():
        where = f"parameter {p.name!r} of tool {name}"
        if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            raise ConfigError(
                f"{where} is {p.kind.description}, but calls pass arguments by name. Give it a plain name."
            )
        if p.name not in hints:
            raise ConfigError(f"{where} has no type hint. Add one, e.g. {p.name}: str.")
        schema = schema_of(hints[p.name], where)
        if p.name in described:
            schema["description"] = described[p.name]
        if p.default is p.empty:
            required.append(p.name)
        elif fits(schema, p.default):
            schema["default"] = p.default
        properties[p.name] = schema
    description = " ".join(doc.split("\n\n")[0].split())
    return Tool(name, description, {"type": "object", "properties": properties, "required": required}, function)


def schema_of(kind: Any, where: str) -> Json:
    """The JSON schema of a Python type. Raises ConfigError naming `where` for an unsupported type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and kind in SIMPLE:
        return {"type": SIMPLE[kind]}
    if origin is Literal and all(type(value) in SIMPLE for value in inner):
        return {"enum": list(inner)}
    if kind is list or origin is list:
        return {"type": "array"} | ({"items": schema_of(inner[0], where)} if inner else {})
    if kind is dict or (origin is dict and inner[0] is str):
        return {"type": "object"} | ({"additionalProperties": schema_of(inner[1], where)} if inner else {})
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(option, where) for option in inner]}
    raise ConfigError(
        f"{where} has type {getattr(kind, '__name__', kind)}, expected str, int, float, bool, Literal, list, dict with "
        "str keys, or a union of these."
    )


def fits(schema: JsonView, value: Any) -> bool:
    """Whether a value matches a schema."""
    try:
        fit(schema, value, "it")
    except ToolError:
        return False
    return True


def fit(schema: JsonView, value: Any, where: str) -> Any:
    """Checks a decoded JSON value and converts it for the function: 3 to 3.0 for a float, and 3.0 to 3 for an int.

    Raises ToolError naming `where` and the position inside it.
    """
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            if fits(option, value):
                return fit(option, value, where)
        raise _misfit(schema, value, where)
    if "enum" in schema:
        if any(type(one) is type(value) and one == value for one in schema["enum"]):
            return value
        raise _misfit(schema, value, where)
    kind = schema.get("type")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "integer" and number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if kind == "number" and number and abs(value) < 1e308 and not math.isnan(value):
        return float(value)
    if kind == "array" and isinstance(value, list):
        inner = schema.get("items", {})
        return [fit(inner, entry, f"entry {i} of {where}") for i, entry in enumerate(value)]
    if kind == "object" and isinstance(value, Mapping):
        inner = schema.get("additionalProperties", {})
        return {key: fit(inner, entry, f"{key!r} in {where}") for key, entry in value.items()}
    if kind is None or (kind not in ("integer", "number") and SIMPLE.get(type(value)) == kind):
        return value
    raise _misfit(schema, value, where)


def arguments(tool: Tool, given: Any) -> Json:
    """Checks and converts a call's arguments. Raises ToolError naming one that is wrong, missing or unknown."""
    properties = tool.parameters["properties"]
    if not isinstance(given, Mapping):
        raise ToolError(f"the arguments of {tool.name} are {_show(given)}, expected an object that names each.")
    for name in given:
        if name not in properties:
            known = ", ".join(properties) or "none"
            raise ToolError(f"{tool.name} has no argument {str(name)[:SHOWN]!r}; its arguments are: {known}.")
    if missing := [name for name in tool.parameters["required"] if name not in given]:
        raise ToolError(f"{tool.name} needs the argument {missing[0]!r}, {_expected(properties[missing[0]])}.")
    return {name: fit(properties[name], value, f"argument {name!r} of {tool.name}") for name, value in given.items()}


def only_argument(tool: Tool) -> str | None:
    """The argument that a call may give without a name: the only one, or the only required one; else None."""
    for names in (list(tool.parameters["properties"]), tool.parameters["required"]):
        if len(names) == 1:
            return names[0]
    return None


def _expected(schema: JsonView) -> str:
    if "anyOf" in schema:
        return " or ".join(_expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(json.dumps(value, ensure_ascii=False) for value in schema['enum'])}"
    return WORDS.get(schema.get("type", ""), "any value")


def _misfit(schema: JsonView, value: Any, where: str) -> ToolError:
    return ToolError(f"{where} is {_show(value)}, expected {_expected(schema)}.")


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
