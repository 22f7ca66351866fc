"""Rows from JSON Lines, JSON, Parquet or the Hugging Face hub; every row knows the `file:line` it came from."""

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

from posttrain.types import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SHOWN = 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.\-\[\]%]+)?")


@dataclass(frozen=True)
class Row:
    """One record. `where` is `file:line` (for Parquet and the hub, the row number), counted from 1."""

    where: str
    values: Mapping[str, Any]


def is_file_name(source: str) -> bool:
    """True where `source` names a data file, whether or not it exists."""
    return source.lower().endswith(SUFFIXES) or Path(source).is_file()


def is_hub_id(source: str) -> bool:
    """True for `owner/name`, with an optional `/config` and `:split`."""
    return _HUB_ID.fullmatch(source) is not None


def read_rows(source: str, limit: int = 0) -> list[Row]:
    """All rows of a file or hub data set, or the first `limit`.

    A hub data set is `owner/name[/config][:split]`; the split is `train` unless given. Raises DataError naming the
    first 20 bad lines and counting all of them; nothing is skipped silently except blank lines.
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
        raise DataError(f"{source} holds no rows. Give a file with at least one.")
    return rows


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a file of rows, a line each. Raises ValueError for a number that JSON does not have."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' values in order; the same rows hash alike wherever the file lies."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
    return digest.hexdigest()


class _Problems:
    """Counts bad lines and shows the first of them."""

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
            + f"\n{self.count} bad {lines} of {self.count + good}{more}; nothing was used. Fix or remove them."
        )


def _read_file(path: Path, limit: int) -> list[Row]:
    if path.is_dir():
        raise DataError(f"{path} is a folder. Give a file inside it.")
    if not path.is_file():
        raise DataError(f"{path} does not exist. Check the path; it is taken from where the command runs.")
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path} is not one of {', '.join(SUFFIXES)}. Convert it or rename it.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Give a file with at least one row.")
    if name.endswith(".parquet"):
        return _read_parquet(path, limit)
    problems = _Problems()
    rows: list[Row] = []
    for row in _read_json(path, problems):
        rows.append(row)
        if limit and len(rows) + problems.count >= limit:
            break
    problems.check(len(rows))
    return rows


def _read_json(path: Path, problems: _Problems) -> Iterator[Row]:
    lines = _lines(path, problems)
    first = next(lines, None)
    if first is None:
        return
    if ".json" in path.suffixes[-2:] and first[1].lstrip().startswith("["):
        text = _with_blank_lines(_chain(first, lines))
        if not problems.count:  # an array with a damaged line has no shape to go by
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
    """The text of numbered lines, each on its own line number."""
    parts: list[str] = []
    last = 1
    for number, text in lines:
        parts.append("\n" * (number - last) + text)
        last = number
    return "".join(parts)


def _lines(path: Path, problems: _Problems) -> Iterator[tuple[int, str]]:
    """Numbered non-blank lines without their line ends; what is not text is added to `problems`."""
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
                        problems.add(f"{path}:1", "the file is gzip data. Let its name end in .gz.")
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
        problems.add(f"{path}:{number + 1}", f"the gzip data is damaged or cut short: {error}.")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error


def _array_rows(path: Path, text: str, problems: _Problems) -> Iterator[Row]:
    """Objects of a JSON array, decoded one by one so that each knows its line."""
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
                problems.add(where, f"text after the array's end: {text[position : position + 20]!r}.")
            return
        if mark != ",":
            problems.add(where, f"expected ',' or ']' after this row, found {mark or 'the end of the file'!r}.")
            return


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_distinct)


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def row_fault(value: Any, text: str) -> str | None:
    """Why a decoded value cannot be a row, or None."""
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
        return f"{kind}, expected an object with named columns."
    if not value:
        return "an object without columns."
    if "\\u" in text:
        flat = json.dumps(value, ensure_ascii=False)
        if "\\u0000" in flat:
            return "holds the NUL character \\u0000."
        try:
            flat.encode("utf-8")
        except UnicodeEncodeError:
            return "holds half of a surrogate pair (\\ud800-\\udfff), which is not text."
    return None


def writable(text: str) -> bool:
    """Whether a row can hold a sampled answer and give it back: some text, no NUL, which no reader of rows takes, and
    no U+FFFD, which stands for bytes that are not UTF-8 and would become other tokens than were sampled."""
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
        raise DataError(f"{path} is not readable Parquet: {_first_line(error)}. Write the file again.") from error
    return rows


def _read_hub(source: str, limit: int) -> list[Row]:
    name, _, split = source.partition(":")
    owner, base, *config = name.split("/")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"data set {name!r} is on the Hugging Face hub, which needs the datasets package: "
            "pip install 'posttrain[hub]', or give a .jsonl or .parquet file."
        ) from None
    load: Callable[..., Iterable[Mapping[str, Any]]] = datasets.load_dataset
    try:
        rows: list[Row] = []
        for number, values in enumerate(load(f"{owner}/{base}", *config, split=split or "train"), 1):
            rows.append(Row(f"{source}:{number}", dict(values)))
            if limit and number == limit:
                break
    except Exception as error:  # the hub's client raises many kinds; each becomes one line that names the data set
        raise DataError(
            f"data set {source!r} could not be loaded: {_first_line(error)}. "
            "Check the name and the network, or give a .jsonl or .parquet file."
        ) from error
    return rows


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
