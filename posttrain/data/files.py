"""Reads rows from JSON Lines, JSON, CSV, TSV, Parquet or the Hugging Face hub; each row records its `file:line`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from posttrain.data.csv_rows import csv_rows
from posttrain.data.json_rows import json_rows, row_fault
from posttrain.data.lines import SHOWN, BadLines, Row
from posttrain.data.parquet import checked, parquet_rows, reason_of
from posttrain.types import DataError, JsonView

__all__ = [
    "SHOWN",
    "SUFFIXES",
    "Row",
    "count_rows",
    "data_hash",
    "is_file_name",
    "is_hub_id",
    "json_lines",
    "read_rows",
    "row_fault",
    "writable",
]

TEXTS = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXTS, *(f"{suffix}.gz" for suffix in TEXTS), ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.\-\[\]%]+)?")


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
    problems = BadLines()
    rows: list[Row] = []
    for row in _rows_of(source, problems):
        rows.append(row)
        if limit and len(rows) + problems.count >= limit:
            break
    problems.check(len(rows))
    if not rows:
        raise DataError(f"{source} has no rows. Give a file with at least one row.")
    return rows


def count_rows(source: str) -> int:
    """The number of rows of a file or hub dataset, bad ones included."""
    problems = BadLines()
    return sum(1 for _ in _rows_of(source, problems)) + problems.count


def json_lines(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as JSON Lines text. Raises ValueError for a number that JSON cannot represent."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' values in order; independent of the file's location."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def writable(text: str) -> bool:
    """Whether a sampled completion can be stored in a row and read back: not blank, no NUL, which readers of rows
    reject, and no U+FFFD, which replaces bytes that are not UTF-8 and would be tokenized differently."""
    return bool(text.strip()) and not {"\0", "\ufffd"} & set(text)


def _rows_of(source: str, problems: BadLines) -> Iterator[Row]:
    if is_file_name(source):
        return _file_rows(Path(source), problems)
    if is_hub_id(source):
        return _hub_rows(source)
    known = ", ".join(SUFFIXES)
    raise DataError(f"{source!r} is neither a data file ({known}) nor a hub id like owner/name. Give one.")


def _file_rows(path: Path, problems: BadLines) -> Iterator[Row]:
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
        return parquet_rows(path)
    return (json_rows if ".json" in name.removesuffix(".gz")[-6:] else csv_rows)(path, problems)


def _hub_rows(source: str) -> Iterator[Row]:
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
        rows = enumerate(load(f"{owner}/{base}", *config, split=split or "train"), 1)
        yield from (Row(f"{source}:{number}", checked(f"{source}:{number}", values)) for number, values in rows)
    except DataError:
        raise
    except Exception as error:  # the hub client raises many types; each becomes one line that names the dataset
        raise DataError(
            f"dataset {source!r} could not be loaded: {reason_of(error)}. "
            "Check the name and the network, or give a .jsonl or .parquet file."
        ) from error
