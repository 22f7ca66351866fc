"""Converts a data file to JSON Lines in this package's columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from posttrain.data.files import Row, json_lines, read_rows
from posttrain.data.formats import DIRECT, NAMED, standard
from posttrain.data.sources import parse_rows
from posttrain.types import ConfigError, DataError, Json

FORMATS = DIRECT | NAMED
"""Layouts that can be converted, by name."""


def convert_file(source: str, to: str, layout: str = "", rename: Mapping[str, str] | None = None) -> Counter[str]:
    """Writes the rows of a file or hub dataset to the JSON Lines file `to`; returns the rows of each layout converted.

    Columns are renamed first (old → new name). Then rows are converted from `layout`, a name in `FORMATS`; without one,
    from the layouts that are read directly anyway. Rows in no known layout are counted under "". Raises DataError
    naming the rows that cannot be converted, and ConfigError if `to` exists or is not a .jsonl file.
    """
    if not to.endswith(".jsonl"):
        raise ConfigError(f"--to {to} does not end in .jsonl. Rows are written as JSON Lines.")
    if Path(to).exists():
        raise ConfigError(f"{to} exists. Give the name of a new file.")
    if not Path(to).parent.is_dir():
        raise ConfigError(f"{to} cannot be written: the folder {Path(to).parent} does not exist.")
    names: Counter[str] = Counter()

    def parse(row: Row) -> Json:
        try:
            values, found = _converted(_renamed(row, rename or {}), layout)
            names.update(found or [""])
            json_lines([values])
        except (DataError, TypeError, ValueError) as error:
            raise DataError(f"{row.where}: {error}") from None
        return values

    rows, _ = parse_rows(read_rows(source), parse)
    Path(to).write_text(json_lines(rows), encoding="utf-8", newline="\n")
    return names


def _renamed(row: Row, rename: Mapping[str, str]) -> Json:
    for old, new in rename.items():
        if old not in row.values:
            raise DataError(f"the row has no column {old!r}; it has {', '.join(row.values)}.")
        if new in row.values and new not in rename:
            raise DataError(f"the row already has a column {new!r}, to which {old!r} would be renamed.")
    return {rename.get(name, name): value for name, value in row.values.items()}


def _converted(values: Json, layout: str) -> tuple[Json, list[str]]:
    if not layout:
        return standard(values)
    is_one, convert = FORMATS[layout]
    if not is_one(values):
        raise DataError(f"the row is not in the layout {layout!r}; it has the columns {', '.join(values)}.")
    return standard(convert(values))[0], [layout]
