"""Reads the rows of one source of a recipe: in this package's columns, with a note on everything that is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from posttrain.config import DataConfig, EvalRecipe, locate
from posttrain.data.files import Row, count_rows, is_file_name, is_hub_id, read_rows
from posttrain.data.formats import MESSAGE_COLUMNS, standard
from posttrain.data.mixing import parts_of
from posttrain.types import DataError, Json, JsonView, PosttrainError

EMPTY = (None, "", [], {})
EXAMPLES = 3
"""Rows with the same columns in which one of them is tried before it counts as unread."""
ODD: tuple[object, ...] = ({"?": "?"}, "?")
"""Values that readers refuse or that change the result: so a column that is at its default shows that it is read."""


def read_source(source: str, cfg: DataConfig, notes: list[str]) -> list[Row]:
    """All rows of a file or hub dataset, or the first `data.count`, in this package's columns (data/formats.py).

    Notes on rows that were not read and on formats are added to `notes`. A row that cannot be converted has a `fault`.
    Raises DataError as `read_rows` does.
    """
    rows = read_rows(source, cfg.count)
    if cfg.count and len(rows) == cfg.count and (total := count_rows(source)) > len(rows):
        notes.append(
            f"{source}: the first {len(rows)} of {total} rows were read (data.count={cfg.count}; 0 reads all)."
        )
    formats: Counter[str] = Counter()
    out: list[Row] = []
    for row in rows:
        try:
            values, names = standard(row.values)
        except DataError as error:
            out.append(Row(row.where, row.values, str(error)))
            continue
        formats.update(names)
        out.append(Row(row.where, values))
    notes += [f"{source}: {count} of {len(rows)} rows were read as {name}." for name, count in formats.items()]
    return out


def evaluation_settings(overrides: JsonView, trained_on: str = "") -> Json:
    """Settings `section.key` of an evaluation in which `data.tasks` names what to evaluate: all rows of a file.

    Nothing of it is held out, because nothing is trained. Tasks that a run was `trained_on` are an exception: their
    held-out side is evaluated, as during training.
    """
    named = {".".join(locate(EvalRecipe, name)): value for name, value in overrides.items()}
    tasks = named.get("data.tasks", trained_on)
    if tasks == trained_on or "data.eval_tasks" in named:
        return named
    stored = any(is_file_name(part) or is_hub_id(part) for part, _ in parts_of(tasks))
    return (
        {"eval.problems": 0, "data.count": 0, **named, "data.eval_tasks": tasks}
        if stored
        else {**named, "data.eval_tasks": tasks}
    )


def unread_columns(rows: Sequence[Row], parse: Callable[[Row], object]) -> dict[str, int]:
    """Columns, and fields of messages as `messages.name`, that nothing reads, with the number of such rows.

    Without one of them, or with an odd value, `parse` gives the same results. That is tried in the first rows of each
    set of columns that occurs together: what is read may depend on what else a row has. Rows that cannot be parsed are
    skipped.
    """
    layouts: dict[frozenset[str], list[Row]] = {}
    sizes: Counter[frozenset[str]] = Counter()
    for row in rows:
        layout = frozenset(_filled(row.values))
        sizes[layout] += 1
        examples = layouts.setdefault(layout, [])
        if len(examples) < EXAMPLES and not row.fault and _outcome(row, parse)[0]:
            examples.append(row)
    unread: Counter[str] = Counter()
    for layout, examples in layouts.items():
        names = dict.fromkeys(name for row in examples for name in _filled(row.values))
        found = [name for name in names if not any(_reads(row, name, parse) for row in examples)]
        whole = {name for name in found if name in MESSAGE_COLUMNS}
        unread.update({name: sizes[layout] for name in found if name.partition(".")[0] not in whole or name in whole})
    return dict(unread)


def unread_note(source: str, rows: Sequence[Row], parse: Callable[[Row], object], others: str = "") -> list[str]:
    """Notes that name and count what nothing reads of a source's rows (`unread_columns`); none if all is read.

    `others` are the readers, such as rewards, that get the columns which are not in the model's prompt.
    """
    columns: list[str] = []
    fields: list[str] = []
    for name, count in unread_columns(rows, parse).items():
        column, _, field = name.partition(".")
        if field and column in MESSAGE_COLUMNS:
            fields.append(f"message field {field!r} ({count} rows)")
        else:
            columns.append(f"column {name!r} ({count} rows)")
    notes = [f"{source}: the model does not see {', '.join(columns)}; {others} can."] if columns and others else []
    unread = fields if others else columns + fields
    return notes + ([f"{source}: nothing reads {', '.join(unread)}."] if unread else [])


def _filled(values: JsonView) -> Iterator[str]:
    """The columns of a row that are not empty, and the fields of their messages."""
    for name, value in values.items():
        if value not in EMPTY:
            yield name
        if name in MESSAGE_COLUMNS and isinstance(value, list):
            fields = {k for entry in value if isinstance(entry, Mapping) for k, v in entry.items() if v not in EMPTY}
            yield from sorted(f"{name}.{field}" for field in fields)


def _changed(values: JsonView, name: str, *put: object) -> Json:
    """A row without a column, or without a field of the messages in a column; or with a value in its place."""
    if name in values:
        return {k: put[0] if k == name else v for k, v in values.items() if k != name or put}
    column, _, field = name.partition(".")
    entries = [_changed(e, field, *put) if isinstance(e, Mapping) and field in e else e for e in values[column]]
    return {**values, column: entries}


def _reads(row: Row, name: str, parse: Callable[[Row], object]) -> bool:
    """Whether the result for a row, or the error, depends on one of its columns."""
    known = _outcome(row, parse)
    if known != _outcome(Row(row.where, _changed(row.values, name)), parse):
        return True
    try:
        return any(known != _outcome(Row(row.where, _changed(row.values, name, odd)), parse) for odd in ODD)
    except Exception:
        return True  # whatever fails on the odd value has read it


def _outcome(row: Row, parse: Callable[[Row], object]) -> tuple[bool, object]:
    try:
        return True, parse(row)
    except PosttrainError as error:
        return False, str(error).partition("the row has")[0]
