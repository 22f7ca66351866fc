"""The verifier `json_schema`, hardened so that no reply can take long to check or access anything else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from posttrain.data.answers import final_part
from posttrain.rewards.judging import column, failed
from posttrain.rewards.patterns import compiled
from posttrain.types import RolloutError, Task, Verdict

LONGEST = 50_000
"""Maximum length of the JSON in characters; longer replies fail."""
DEEPEST = 64
"""Maximum nesting depth; deeper replies fail."""

_FENCED = re.compile(r"```(?:[ \t]*(?:json|JSON))?[ \t]*\n([^`]*)```")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)', re.DOTALL)  # also matches an unclosed string, to stay linear in time


def json_schema(task: Task, text: str) -> Verdict:
    """Passes if the final answer is JSON that is valid under the column `schema` (an object, or JSON text).

    The answer is the reply's whole final part or its last ``` block; NaN and Infinity are not JSON. Parts: `parses`
    and `valid`. Raises RolloutError for an invalid schema.
    """
    check = _validator(task)
    final = final_part(text)
    blocks = _FENCED.findall(final)
    try:
        value = read_json(blocks[-1] if blocks else final)
    except ValueError as error:
        return failed(f"not JSON: {error}", {"parses": 0.0, "valid": 0.0})
    try:
        fault = next(check.iter_errors(value), None)
    except Unresolvable as error:
        raise RolloutError(
            f"task {task.id!r}: its schema refers to {error.ref!r}, which it does not define.", "reward"
        ) from None
    except (OverflowError, RecursionError) as error:
        return failed(f"cannot be validated: {error}", {"parses": 1.0, "valid": 0.0})
    if fault is None:
        return Verdict(1.0, True, "valid", {"parses": 1.0, "valid": 1.0})
    where = "/".join(map(str, fault.absolute_path)) or "the top level"
    return failed(f"{where}: {fault.message[:200]}", {"parses": 1.0, "valid": 0.0})


def read_json(text: str) -> Any:
    """Parses JSON. Raises ValueError for invalid JSON, and for text that is too long or too deeply nested."""
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters, expected at most {LONGEST}")
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise ValueError(f"{deepest} levels of nesting, expected at most {DEEPEST}")
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def _validator(task: Task) -> Any:
    """A validator for the task's schema that fetches no references and matches patterns with RE2."""
    schema = column(task, "schema", (Mapping, str), "json_schema")
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        base = validator_for(schema, default=jsonschema.Draft202012Validator)
        base.check_schema(schema)
    except (ValueError, jsonschema.SchemaError) as error:
        message = error.message if isinstance(error, jsonschema.SchemaError) else error
        raise RolloutError(f"task {task.id!r}: invalid schema: {message}.", boundary="reward") from None
    if "patternProperties" in _keys(schema):
        raise RolloutError(
            f"task {task.id!r}: its schema has patternProperties, whose patterns could take exponential time on a "
            "reply. Use properties, or propertyNames with pattern.",
            boundary="reward",
        )
    return extend(base, {"pattern": _pattern, "uniqueItems": _unique})(schema, registry=Registry())


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from value
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _keys(inner)


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not compiled(pattern).search(value.encode("utf-8", "replace").decode()):
        yield jsonschema.ValidationError(f"{value[:80]!r} does not match {pattern!r}")


def _unique(_: Any, required: bool, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """Checks `uniqueItems` in linear time; jsonschema compares all pairs if items cannot be sorted."""
    if required and isinstance(value, list) and len({_canonical(item) for item in value}) < len(value):
        yield jsonschema.ValidationError("has duplicate items")


def _canonical(value: Any) -> str:
    """A string that is equal exactly for values that JSON Schema considers equal: 1 equals 1.0, but not true."""

    def plain(inner: Any) -> Any:
        if isinstance(inner, list):
            return [plain(item) for item in inner]
        if isinstance(inner, dict):
            return {name: plain(item) for name, item in inner.items()}
        return int(inner) if isinstance(inner, float) and inner.is_integer() else inner

    return json.dumps(plain(value), sort_keys=True)
