"""Reads the rows of one source of a recipe: in this package's columns, with a note on everything that is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from posttrain.config import DataConfig, EvalRecipe, locate
from posttrain.data.files import Row, count_rows, is_file_name, is_hub_id, read_rows
from posttrain.data.formats import standard
from posttrain.data.mixing import parts_of
from posttrain.types import DataError, Json, JsonView, PosttrainError

EXAMPLES = 3
"""Rows in which a column is tried before it counts as unread."""


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
        out.append(Row(row.where, values) if names else row)
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


def unread_columns(rows: Sequence[Row], parse: Callable[[Row], object]) -> list[str]:
    """Names of columns without which `parse` gives the same results: nothing reads them.

    Each column is removed from the first rows that have a value in it. Rows that cannot be parsed are skipped.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        for name, value in row.values.items():
            if value is not None and not row.fault and len(found.setdefault(name, [])) < EXAMPLES:
                found[name].append(row)
    return [name for name, examples in found.items() if not any(_reads(row, name, parse) for row in examples)]


def _reads(row: Row, name: str, parse: Callable[[Row], object]) -> bool:
    """Whether the result for a row, or the error, depends on one of its columns."""
    return _outcome(row, parse) != _outcome(Row(row.where, {k: v for k, v in row.values.items() if k != name}), parse)


def _outcome(row: Row, parse: Callable[[Row], object]) -> tuple[bool, object]:
    try:
        return True, parse(row)
    except PosttrainError as error:
        return False, str(error).partition("the row has")[0]
