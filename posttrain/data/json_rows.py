"""Rows of JSON Lines files and of JSON files that hold one array; anything that JSON leaves open is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.data.lines import LONGEST_ROW, TOO_LONG, BadLines, Row, numbered_lines
from posttrain.types import Json


def json_rows(path: Path, problems: BadLines) -> Iterator[Row]:
    """Yields the rows of a file; bad lines go to `problems`. Only blank lines are skipped."""
    array = ".json" in [suffix.lower() for suffix in path.suffixes[-2:]]
    lines = (
        (number, text.rstrip("\r\n"))
        for number, text in numbered_lines(path, problems, 0 if array else LONGEST_ROW)
        if text.strip()
    )
    first = next(lines, None)
    if first is None:
        return
    if array and first[1].lstrip().startswith("["):
        text = _with_blank_lines(_chain(first, lines))
        if not problems.count:  # an array with a damaged line cannot be parsed
            yield from _array_rows(path, text, problems)
        return
    if first[1].strip() == "{":
        problems.add(
            f"{path}:{first[0]}", "an object over several lines, expected one row a line, or an array of rows."
        )
        return
    for number, text in _chain(first, lines):
        where = f"{path}:{number}"
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            problems.add(where, f"not valid JSON: {_json_reason(error)}.")
            continue
        if reason := row_fault(value, text):
            problems.add(where, reason)
        else:
            yield Row(where, value)


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _with_blank_lines(lines: Iterator[tuple[int, str]]) -> str:
    """Joins numbered lines so that each keeps its line number."""
    parts: list[str] = []
    last = 1
    for number, text in lines:
        parts.append("\n" * (number - last) + text)
        last = number
    return "".join(parts)


def _array_rows(path: Path, text: str, problems: BadLines) -> Iterator[Row]:
    """Yields the objects of a JSON array, decoded one by one to find the line of each."""
    skip = re.compile(r"\s*")

    def past_space(at: int) -> int:
        found = skip.match(text, at)
        return found.end() if found else at

    position, line, counted = past_space(text.index("[") + 1), 1, 0
    if text[position : position + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            problems.add(where, f"not valid JSON: {_json_reason(error)}; the rest of the array was not read.")
            return
        if reason := row_fault(value, text[counted:position]):
            problems.add(where, reason)
        else:
            yield Row(where, value)
        position = past_space(position)
        mark, position = text[position : position + 1], past_space(position + 1)
        if mark == "]":
            if position < len(text):
                problems.add(where, f"text after the end of the array: {text[position : position + 20]!r}.")
            return
        if mark != ",":
            problems.add(where, f"expected ',' or ']' after this row, found {mark or 'the end of the file'!r}.")
            return


def decode(text: str) -> Any:
    """The value of a JSON text, as strictly as rows are read. Raises ValueError."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice in one object")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a number")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_reject_constant, object_pairs_hook=_unique_keys)


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def row_fault(value: Any, text: str) -> str | None:
    """Why a decoded value is not a valid row, or None if it is."""
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
        return f"{kind}, expected an object with named columns."
    if not value:
        return "an object without columns."
    if len(text) > LONGEST_ROW:
        return TOO_LONG
    if "\\u" in text:
        texts = list(texts_in(value))
        if any("\0" in one for one in texts):
            return "contains the NUL character \\u0000."
        try:
            "".join(texts).encode("utf-8")
        except UnicodeEncodeError:
            return "contains an unpaired surrogate (\\ud800-\\udfff), which is not valid text."
    return None


def texts_in(value: Any) -> Iterator[str]:
    """Every string in a decoded row, names of columns included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
