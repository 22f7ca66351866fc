"""Rows of CSV and TSV files (RFC 4180), refused as strictly as JSON Lines.

The first line names the columns. A cell is text, and an empty one is null. In columns that hold another type
(`LITERALS`, `MESSAGES`, `NESTED`), a cell is read as JSON.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.json_rows import decode, row_fault
from posttrain.data.lines import LONGEST_ROW, BadLines, Row, numbered_lines
from posttrain.types import Json

LITERALS = frozenset(
    ("label", "tie", "margin", "score_chosen", "score_rejected", "mistake_index", "final_answer_correct", "weight")
)
"""Columns in which a number, true or false (in any case) is that value, not its text."""
MESSAGES = frozenset(("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected"))
"""Columns in which a cell that begins with `[{` is a JSON list of messages."""
NESTED = frozenset(("tools", "steps", "completions", "labels", "choices", "tests", "cases", "history", "extra_info"))
"""Columns in which a cell that begins with `[` or `{` is JSON."""


def csv_rows(path: Path, problems: BadLines) -> Iterator[Row]:
    """Yields the rows of a file; bad lines go to `problems`. Only blank lines are skipped."""
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]]
    csv.field_size_limit(LONGEST_ROW)
    broken = BadLines()  # lines that are not text: the lines after them would be numbered wrongly
    reader = csv.reader(
        (text for _, text in numbered_lines(path, broken)), delimiter="\t" if tabs else ",", strict=True
    )
    names: list[str] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problems.add(where, f"not valid CSV: {error}; the rest of the file was not read.")
            return
        if broken.count:
            problems.add(*broken.shown[0].split(": ", 1))
            return
        if cells is None:
            return
        if not cells:
            continue  # a blank line
        if not names:
            names = cells
            if fault := _header_fault(names, tabs):
                problems.add(where, fault)
                return
            continue
        values, fault = _values(names, cells)
        if fault := fault or row_fault(values, "".join(cells)):
            problems.add(where, fault)
        else:
            yield Row(where, values)


def _header_fault(names: Sequence[str], tabs: bool) -> str | None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        return f"the header names the column {twice!r} twice. Rename one of them."
    if not all(name.strip() for name in names):
        return f"column {[bool(n.strip()) for n in names].index(False) + 1} of the header has no name. Give it one."
    other = next((mark for mark in (";", "\t", ",") if len(names) == 1 and mark in names[0]), None)
    if other:
        used = "tabs" if tabs else "commas"
        return f"the header is one column, {names[0][:60]!r}. Separate columns by {used}, not by {other!r}."
    return None


def _values(names: Sequence[str], cells: Sequence[str]) -> tuple[Json, str | None]:
    """(values by column, None), or ({}, why the row is bad)."""
    if len(cells) != len(names):
        return {}, f"{len(cells)} cells, but the header names {len(names)} columns. Quote cells that contain commas."
    values: Json = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            values[name] = _value(name, cell)
        except ValueError as error:
            return {}, f"column {name!r} begins like a list, but is not valid JSON: {error}."
    return values, None


def _value(name: str, cell: str) -> Any:
    if not cell:
        return None
    if name in LITERALS:
        try:
            value = decode(cell.strip().lower())
        except ValueError:
            return cell
        return value if isinstance(value, bool | int | float) else cell
    if (name in MESSAGES and cell.lstrip().startswith("[{")) or (name in NESTED and cell.lstrip()[0:1] in ("[", "{")):
        return decode(cell)
    return cell
