"""Rows of a data file, and the numbered text lines of JSON Lines, JSON, CSV and TSV files."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.types import DataError, JsonView

SHOWN = 20
"""Bad lines that an error message shows; all are counted."""
LONGEST_ROW = 4_000_000
"""Maximum characters of a row. A tokenizer needs about 300 bytes of memory for each, so longer rows are refused before
they are tokenized."""
TOO_LONG = f"the row has more than {LONGEST_ROW} characters. Split it or remove it."
GZIP_FREE, GZIP_RATIO = 256 * 2**20, 50
"""A .gz file may decompress to GZIP_FREE bytes, or to GZIP_RATIO times its own size if that is more."""


@dataclass(frozen=True)
class Row:
    """One record. `where` is `file:line` (the row number for Parquet and the hub), counted from 1."""

    where: str
    values: JsonView
    fault: str = ""
    """Why the row cannot be used, if that was found before it is converted to a task or a conversation."""


class BadLines:
    """Counts bad lines and keeps the first of them for the error message."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{where}: {reason}")

    def check(self, good: int) -> None:
        """Raises DataError if there were bad lines; `good` is the number of the others."""
        if not self.count:
            return
        more = f" ({self.count - SHOWN} more not shown)" if self.count > SHOWN else ""
        lines = "line" if self.count == 1 else "lines"
        raise DataError(
            "\n".join(self.shown)
            + f"\n{self.count} bad {lines} of {self.count + good}{more}; no row was used. Fix or remove them."
        )


def numbered_lines(path: Path, problems: BadLines, longest: int = 0) -> Iterator[tuple[int, str]]:
    """Yields (number, text with its line end) of every line; lines that are not text go to `problems`.

    With `longest`, a line of more characters is a problem, and is skipped without being held in memory. Raises
    DataError if the file cannot be read.
    """
    number = offset = 0
    compressed = path.name.lower().endswith(".gz")
    try:
        if compressed and (most := _exceeded(path)):
            raise DataError(
                f"{path} decompresses to more than {most} bytes, over {GZIP_RATIO} times its size. Decompress it "
                "yourself if that is right."
            )
        with gzip.open(path, "rb") if compressed else path.open("rb") as file:
            for raw, whole in _raw_lines(file, 4 * longest):
                number, start, offset = number + 1, offset, offset + len(raw)
                if number == 1 and (fault := _wrong_encoding(raw)):
                    problems.add(f"{path}:1", fault)
                    return
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                    start = offset - len(raw)
                text, fault = _decoded(raw, start) if whole else ("", TOO_LONG)
                if longest and len(text) > longest:
                    fault = TOO_LONG
                if fault:
                    problems.add(f"{path}:{number}", fault)
                else:
                    yield number, text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problems.add(f"{path}:{number + 1}", f"the gzip data is damaged or truncated: {error}.")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error


def _exceeded(path: Path) -> int:
    """The limit of a .gz file in bytes if it decompresses to more, else 0. Nothing is held in memory."""
    most, total = max(GZIP_FREE, GZIP_RATIO * path.stat().st_size), 0
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                total += len(chunk)
                if total > most:
                    return most
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return 0  # the damage is reported with its line when the lines are read
    return 0


def _raw_lines(file: io.BufferedIOBase, longest: int) -> Iterator[tuple[bytes, bool]]:
    """Yields (bytes, whole) of each line: of a line over `longest` bytes (0: no limit), only the first are kept."""
    while raw := file.readline(longest + 1 if longest else -1):
        whole = not longest or len(raw) <= longest or raw.endswith(b"\n")
        rest = raw
        while not whole and rest and not rest.endswith(b"\n"):
            rest = file.readline(1 << 20)
        yield raw, whole


def _wrong_encoding(raw: bytes) -> str | None:
    if raw.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "the file is UTF-32. Save it as UTF-8."
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16. Save it as UTF-8."
    if raw.startswith(b"\x1f\x8b"):
        return "the file is gzip data. Rename it to end in .gz."
    return None


def _decoded(raw: bytes, start: int) -> tuple[str, str | None]:
    """(text, None), or ("", why the bytes of a line are not text); `start` is their offset in the file."""
    zero = raw.find(b"\0")
    if zero >= 0:
        return "", f"NUL byte at offset {start + zero} of the file."
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {start + error.start} of the file."
