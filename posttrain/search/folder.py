"""Folder of a search: its settings, and the results of the problems that are done, which survive kill -9.

`search.json` has the settings, `results.jsonl` a row and `trees.jsonl` a tree for each problem, `journal/` the
completions. Rows are fsynced as problems are done, in any order; at the end they are sorted, so a search that was
killed and continued has the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from posttrain.search.report import Outcome
from posttrain.store import durable
from posttrain.store.durable import DiskError, FolderLock
from posttrain.types import Json, JsonView, ResumeError

SETTINGS, RESULTS, TREES = "search.json", "results.jsonl", "trees.jsonl"
GROWS = "search.budget"
"""The setting that may be raised in an existing folder."""


class SearchFolder:
    """The results of earlier processes, and what this one adds. `outcomes` and `trees` have the done problems."""

    def __init__(self, folder: Path, about: JsonView) -> None:
        """Opens or creates the folder. `about` are flat settings that results depend on.

        With a larger budget, results are made anew. Raises ResumeError if other settings differ or the folder is in
        use.
        """
        self.folder = folder
        self.outcomes: dict[int, Outcome] = {}
        self.trees: dict[int, Json] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResumeError(f"{folder} is not a folder that a search can write to ({error.strerror}).") from None
        self._lock = FolderLock(folder)
        try:
            if self._continues(about):
                self._read()
            durable.publish_file(folder / SETTINGS, _text(about) + "\n")
            self._write()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.release()

    def add(self, outcome: Outcome, tree: Json) -> None:
        """Stores a problem's result durably. Raises DiskError if the disk is full."""
        self.outcomes[outcome.index], self.trees[outcome.index] = outcome, tree
        try:
            _append(self.folder / TREES, _text({"index": outcome.index, **tree}))
            _append(self.folder / RESULTS, _text(outcome.as_dict()))  # last: with its row, a problem is done
        except OSError as error:
            raise DiskError(
                f"{self.folder} cannot be written ({error.strerror}). Free space, then run the command again."
            ) from None

    def finish(self) -> None:
        """Sorts the rows by problem."""
        self._write()

    def _continues(self, about: JsonView) -> bool:
        """Whether the folder has results of the same settings."""
        path = self.folder / SETTINGS
        if not path.exists():
            if (self.folder / "run.json").exists():
                raise ResumeError(f"{self.folder} holds a training run. Give another folder with --out.")
            return False
        try:
            before: Json = json.loads(path.read_text(encoding="utf-8"))
            budget = int(before[GROWS]) if GROWS in before else 0
        except (OSError, ValueError, TypeError) as error:
            raise ResumeError(f"{path} is damaged ({error}). Give another folder with --out.") from None
        now: Json = json.loads(_text(about))
        for name in sorted({*before, *now}):
            old, new = before.get(name), now.get(name)
            if old != new and not (name == GROWS and int(new or 0) > budget > 0):
                raise ResumeError(
                    f"{self.folder} holds a search with {name} = {old!r}, not {new!r}. Use the same settings (only "
                    f"{GROWS} may grow), or another folder with --out."
                )
        return before.get(GROWS) == now.get(GROWS)

    def _read(self) -> None:
        """Reads the problems that are done; a row that a kill has cut, and all after it, is left out."""
        try:
            trees: dict[int, Json] = {row.pop("index"): row for row in _rows(self.folder / TREES)}
            found = [Outcome.of(row) for row in _rows(self.folder / RESULTS)]
        except (KeyError, TypeError, AttributeError) as error:
            raise ResumeError(f"{self.folder} is damaged ({error!r}). Give another folder with --out.") from None
        self.outcomes = {one.index: one for one in found if one.index in trees}
        self.trees = {index: trees[index] for index in self.outcomes}

    def _write(self) -> None:
        order = sorted(self.outcomes)
        trees = [_text({"index": index, **self.trees[index]}) for index in order]
        rows = [_text(self.outcomes[index].as_dict()) for index in order]
        for name, lines in ((RESULTS, rows), (TREES, trees)):
            durable.publish_file(self.folder / name, "".join(line + "\n" for line in lines))


def flat(sections: JsonView) -> Json:
    """section → key → value as `section.key` → value."""
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _text(value: JsonView) -> str:
    return json.dumps(dict(value), ensure_ascii=True)


def _rows(path: Path) -> Sequence[Any]:
    """The rows up to the first that is not whole."""
    rows: list[Any] = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what has no line break was cut by a kill
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _append(path: Path, line: str) -> None:
    data = line.encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
