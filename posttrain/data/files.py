"""Reads rows from JSON Lines, JSON, Parquet or the Hugging Face hub; each row records its `file:line`."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.types import DataError, Json, JsonView

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SHOWN = 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.\-\[\]%]+)?")


@dataclass(frozen=True)
class Row:
    """One record. `where` is `file:line` (the row number for Parquet and the hub), counted from 1."""

    where: str
    values: JsonView


def is_file_name(source: str) -> bool:
    """Whether `source` names a data file, existing or not."""
    return source.lower().endswith(SUFFIXES) or Path(source).is_file()


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form `owner/name`, with an optional `/config` and `:split`."""
    return _HUB_ID.fullmatch(source) is not None


def read_rows(source: str, limit: int = 0) -> list[Row]:
    """Reads all rows of a file or hub dataset, or the first `limit`.

    A hub dataset is `owner/name[/config][:split]`; the default split is `train`. Raises DataError that names the first
    20 bad lines and counts all of them; only blank lines are skipped silently.
    """
    if is_file_name(source):
        rows = _read_file(Path(source), limit)
    elif is_hub_id(source):
        rows = _read_hub(source, limit)
    else:
        raise DataError(
            f"{source!r} is neither a data file ({', '.join(SUFFIXES)}) nor a hub id like owner/name. Give one."
        )
    if not rows:
        raise DataError(f"{source} has no rows. Give a file with at least one row.")
    return rows


def json_lines(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as JSON Lines text. Raises ValueError for a number that JSON cannot represent."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' values in order; independent of the file's location."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
    return digest.hexdigest()


class _BadLines:
    """Counts bad lines and keeps the first of them for the error message."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{where}: {reason}")

    def check(self, good: int) -> None:
        if not self.count:
            return
        more = f" ({self.count - SHOWN} more not shown)" if self.count > SHOWN else ""
        lines = "line" if self.count == 1 else "lines"
        raise DataError(
            "\n".join(self.shown)
            + f"\n{self.count} bad {lines} of {self.count + good}{more}; no row was used. Fix or remove them."
        )


def _read_file(path: Path, limit: int) -> list[Row]:
    if path.is_dir():
        raise DataError(f"{path} is a folder. Give a file inside it.")
    if not path.is_file():
        raise DataError(f"{path} does not exist. Check the path; it is relative to the current directory.")
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path} is not one of {', '.join(SUFFIXES)}. Convert it or rename it.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Give a file with at least one row.")
    if name.endswith(".parquet"):
        return _read_parquet(path, limit)
    problems = _BadLines()
    rows: list[Row] = []
    for row in _read_json(path, problems):
        rows.append(row)
        if limit and len(rows) + problems.count >= limit:
            break
    problems.check(len(rows))
    return rows


def _read_json(path: Path, problems: _BadLines) -> Iterator[Row]:
    lines = _lines(path, problems)
    first = next(lines, None)
    if first is None:
        return
    if ".json" in path.suffixes[-2:] and first[1].lstrip().startswith("["):
        text = _with_blank_lines(_chain(first, lines))
        if not problems.count:  # an array with a damaged line cannot be parsed
            yield from _array_rows(path, text, problems)
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


def _lines(path: Path, problems: _BadLines) -> Iterator[tuple[int, str]]:
    """Yields (number, text) of non-blank lines without line endings; lines that are not text go to `problems`."""
    offset, number = 0, 0
    compressed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path, "rb") if compressed else path.open("rb") as file:
            for raw in file:
                number += 1
                start, offset = offset, offset + len(raw)
                if number == 1:
                    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                        problems.add(f"{path}:1", "the file is UTF-16. Save it as UTF-8.")
                        return
                    if raw.startswith(b"\x1f\x8b"):
                        problems.add(f"{path}:1", "the file is gzip data. Rename it to end in .gz.")
                        return
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                    start = offset - len(raw)
                zero = raw.find(b"\0")
                if zero >= 0:
                    problems.add(f"{path}:{number}", f"NUL byte at offset {start + zero} of the file.")
                    continue
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {start + error.start} of the file."
                    problems.add(f"{path}:{number}", reason)
                    continue
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problems.add(f"{path}:{number + 1}", f"the gzip data is damaged or truncated: {error}.")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error


def _array_rows(path: Path, text: str, problems: _BadLines) -> Iterator[Row]:
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
    if "\\u" in text:
        texts = list(_texts(value))
        if any("\0" in one for one in texts):
            return "contains the NUL character \\u0000."
        try:
            "".join(texts).encode("utf-8")
        except UnicodeEncodeError:
            return "contains an unpaired surrogate (\\ud800-\\udfff), which is not valid text."
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every string in a decoded row, names of columns included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def writable(text: str) -> bool:
    """Whether a sampled completion can be stored in a row and read back: not blank, no NUL, which readers of rows
    reject, and no U+FFFD, which replaces bytes that are not UTF-8 and would be tokenized differently."""
    return bool(text.strip()) and not {"\0", "\ufffd"} & set(text)


def _read_parquet(path: Path, limit: int) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path} needs the pyarrow package: pip install 'posttrain[parquet]', or use JSONL.") from None
    rows: list[Row] = []
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    rows.append(Row(f"{path}:{len(rows) + 1}", values))
                    if limit and len(rows) == limit:
                        return rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not valid Parquet: {_first_line(error)}. Write the file again.") from error
    return rows


def _read_hub(source: str, limit: int) -> list[Row]:
    name, _, split = source.partition(":")
    owner, base, *config = name.split("/")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"dataset {name!r} is on the Hugging Face hub, which needs the datasets package: "
            "pip install 'posttrain[hub]', or give a .jsonl or .parquet file."
        ) from None
    load: Callable[..., Iterable[JsonView]] = datasets.load_dataset
    try:
        rows: list[Row] = []
        for number, values in enumerate(load(f"{owner}/{base}", *config, split=split or "train"), 1):
            rows.append(Row(f"{source}:{number}", dict(values)))
            if limit and number == limit:
                break
    except Exception as error:  # the hub client raises many types; each becomes one line that names the dataset
        raise DataError(
            f"dataset {source!r} could not be loaded: {_first_line(error)}. "
            "Check the name and the network, or give a .jsonl or .parquet file."
        ) from error
    return rows


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
