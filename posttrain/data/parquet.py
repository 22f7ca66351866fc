"""Rows of Parquet files, and the nulls that Arrow adds to nested rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.data.json_rows import texts_in
from posttrain.data.lines import LONGEST_ROW, TOO_LONG, Row
from posttrain.types import DataError, Json, JsonView

OPEN_KEYS = frozenset(("tool_calls", "function_call", "arguments", "tools", "functions"))
"""Columns and keys whose structs have different keys in different rows: tool calls and tool schemas."""


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a file. Raises DataError for a damaged file, or if two columns or fields have one name."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path} needs the pyarrow package: pip install 'posttrain[parquet]', or use JSONL.") from None
    try:
        with parquet.ParquetFile(path) as file:
            if twice := _repeated(file.schema_arrow, pyarrow):
                raise DataError(f"{path} has two columns named {twice!r}. Rename one of them and write the file again.")
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", checked(f"{path}:{number}", values))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not valid Parquet: {reason_of(error)}. Write the file again.") from error


def reason_of(error: Exception) -> str:
    """The first line of another library's message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def checked(where: str, values: JsonView) -> Json:
    """A row of an Arrow table without the nulls that Arrow added. Raises DataError for a row that is not valid text."""
    texts = list(texts_in(values))
    if sum(map(len, texts)) > LONGEST_ROW:
        raise DataError(f"{where}: {TOO_LONG}")
    if any("\0" in text for text in texts):
        raise DataError(f"{where}: contains the NUL character \\u0000. Remove it.")
    return {name: without_added_nulls(value, name in OPEN_KEYS) for name, value in values.items()}


def without_added_nulls(value: Any, inside: bool = False) -> Any:
    """A value of an Arrow table in which the structs of tool calls and tool schemas have no null fields.

    Arrow gives all structs of a column the same fields: a call of `weather(city)` gets the arguments of the other rows'
    calls, all null. Below a key of `OPEN_KEYS` (`inside`), null fields of structs are therefore removed, and so is an
    argument that was null in the first place: Arrow cannot tell the two apart. Everywhere else nulls are kept, among
    them those of the row's own columns and of a message's `content`.
    """
    if isinstance(value, Mapping):
        return {
            name: without_added_nulls(inner, inside or name in OPEN_KEYS)
            for name, inner in value.items()
            if not (inside and inner is None)
        }
    if isinstance(value, list):
        return [without_added_nulls(inner, inside) for inner in value]
    return value


def _repeated(fields: Any, pyarrow: Any) -> str | None:
    """The first name that two fields of a schema or of one of its structs share."""
    names = [field.name for field in fields]
    for field in fields:
        if names.count(field.name) > 1:
            return field.name
        kind = field.type
        while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            kind = kind.value_type
        inner = [kind.field(i) for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
        if name := _repeated(inner, pyarrow):
            return f"{field.name}.{name}"
    return None
