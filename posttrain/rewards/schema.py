"""Replies that must be JSON of a given form (JSON Schema), read so that no reply can take long or reach further."""

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
"""Characters of JSON that are read; longer replies fail."""
DEEPEST = 64
"""Brackets within brackets that are read; deeper replies fail."""

_FENCED = re.compile(r"```(?:[ \t]*(?:json|JSON))?[ \t]*\n([^`]*)```")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)', re.DOTALL)  # one that never ends is a string too: time stays linear


def json_schema(task: Task, text: str) -> Verdict:
    """Passes where the final answer is JSON that the column `schema` (an object, or its text) allows.

    The answer is all of the reply's final part, or its last ``` block; NaN and Infinity are not JSON. Parts: `parses`
    and `valid`. Raises RolloutError for a schema that cannot be used.
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
            f"task {task.id!r}: its schema refers to {error.ref!r}, which is not in it.", "reward"
        ) from None
    except (OverflowError, RecursionError) as error:
        return failed(f"cannot be checked: {error}", {"parses": 1.0, "valid": 0.0})
    if fault is None:
        return Verdict(1.0, True, "valid", {"parses": 1.0, "valid": 1.0})
    where = "/".join(map(str, fault.absolute_path)) or "the whole"
    return failed(f"{where}: {fault.message[:200]}", {"parses": 1.0, "valid": 0.0})


def read_json(text: str) -> Any:
    """What a text says in JSON. Raises ValueError for anything else, and for what is too long or too deep."""
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters, at most {LONGEST} are read")
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise ValueError(f"{deepest} levels, at most {DEEPEST} are read")
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def _validator(task: Task) -> Any:
    """A validator of the task's schema that fetches nothing and whose patterns are RE2's."""
    schema = column(task, "schema", (Mapping, str), "json_schema")
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        known = validator_for(schema, default=jsonschema.Draft202012Validator)
        known.check_schema(schema)
    except (ValueError, jsonschema.SchemaError) as error:
        said = error.message if isinstance(error, jsonschema.SchemaError) else error
        raise RolloutError(f"task {task.id!r}: its schema cannot be used: {said}.", boundary="reward") from None
    if "patternProperties" in _keys(schema):
        raise RolloutError(
            f"task {task.id!r}: its schema has patternProperties, whose patterns could run away on a reply. Use "
            "properties, or propertyNames with pattern.",
            boundary="reward",
        )
    return extend(known, {"pattern": _pattern, "uniqueItems": _unique})(schema, registry=Registry())


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from value
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _keys(inner)


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not compiled(pattern).search(value.encode("utf-8", "replace").decode()):
        yield jsonschema.ValidationError(f"{value[:80]!r} does not match {pattern!r}")


def _unique(_: Any, wanted: bool, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """In linear time; the package compares every pair where items cannot be sorted."""
    if wanted and isinstance(value, list) and len({_canonical(item) for item in value}) < len(value):
        yield jsonschema.ValidationError("has items that are equal")


def _canonical(value: Any) -> str:
    """Equal exactly for values that JSON Schema calls equal: 1 is 1.0, but not true."""

    def plain(inner: Any) -> Any:
        if isinstance(inner, list):
            return [plain(item) for item in inner]
        if isinstance(inner, dict):
            return {name: plain(item) for name, item in inner.items()}
        return int(inner) if isinstance(inner, float) and inner.is_integer() else inner

    return json.dumps(plain(value), sort_keys=True)
