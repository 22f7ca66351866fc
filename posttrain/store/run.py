"""Run folder: `run.json` with the recipe, `LOCK` for the single writer, `run.db` for everything the run measured.

Each step is one transaction, so readers, and a process that resumes after kill -9, see a step completely or not at all.
Rows have natural keys, so a replayed step overwrites itself with equal bytes, and a run that was killed and resumed has
the same `digest` as one that was not. torch is not imported, so listing runs is fast.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from posttrain.store import durable
from posttrain.store.database import connect, explained
from posttrain.store.durable import DiskError, FolderLock
from posttrain.store.failpoints import failpoint
from posttrain.types import DataError, Episode, Json, JsonView, PosttrainError, ResumeError

Kind = Literal["train", "eval"]
Level = Literal["info", "warning", "error"]
Order = Literal["step", "-step", "reward", "-reward", "length", "-length"]
Status = Literal["running", "finished", "interrupted", "damaged"]

_ARRAYS = (("tokens", np.int32), ("loss_mask", np.bool_), ("logprobs", np.float32))
_DIGESTED = (
    "SELECT * FROM metrics ORDER BY step, name",
    "SELECT * FROM episodes ORDER BY kind, step, grp, idx",
    "SELECT step, kind, message, level, detail FROM events WHERE exact ORDER BY step, kind, message",
)


@dataclass(frozen=True, eq=False)
class EpisodeRow:
    """One stored episode of L tokens, prompt included; `length` counts the tokens the model generated.

    `reward` is None if the episode could not be scored. Durations are not stored, because they are not reproducible.
    """

    kind: Kind
    step: int
    group: int
    index: int
    task_id: str
    prompt: str
    text: str
    reward: float | None
    passed: bool
    stop: str
    length: int
    parts: Mapping[str, float]
    error: str | None
    tokens: np.ndarray  # [L] int32
    loss_mask: np.ndarray  # [L] bool
    logprobs: np.ndarray  # [L] float32, from the sampler; 0 on tokens the model did not generate
    advantage: float | None

    @staticmethod
    def of(kind: Kind, step: int, episode: Episode, prompt: str, advantage: float | None) -> EpisodeRow:
        """The row for an episode sampled at `step`, with the `prompt` the model saw."""
        e = episode
        sequence = (e.tokens.astype(np.int32), e.loss_mask, e.behaviour_logp)
        scored = (e.reward, e.passed, e.stop, e.length, e.parts, e.error)
        return EpisodeRow(kind, step, e.group, e.index, e.task_id, prompt, e.text, *scored, *sequence, advantage)

    @property
    def values(self) -> tuple[Any, ...]:
        """The row as SQLite stores it, in column order; equal rows have equal values."""
        where = f"{self.kind} episode {self.group}.{self.index} of step {self.step}"
        cells = {f.name: getattr(self, f.name) for f in fields(self)}
        cells |= {name: _text(cells[name]) for name in ("task_id", "prompt", "text")}
        cells |= {name: int(cells[name]) for name in ("step", "group", "index", "passed", "length")}
        cells |= {name: _finite(cells[name], f"{name} of {where}") for name in ("reward", "advantage")}
        cells |= {name: np.asarray(cells[name], dtype).tobytes() for name, dtype in _ARRAYS}
        cells |= {"parts": _json(self.parts, where), "error": None if self.error is None else _text(self.error)}
        return tuple(cells.values())

    @staticmethod
    def from_values(values: Sequence[Any]) -> EpisodeRow:
        """The inverse of `values`."""
        cells = dict(zip((f.name for f in fields(EpisodeRow)), values, strict=True))
        cells |= {"passed": bool(cells["passed"]), "parts": json.loads(cells["parts"])}
        cells |= {name: np.frombuffer(cells[name], dtype) for name, dtype in _ARRAYS}
        return EpisodeRow(**cells)


@dataclass(frozen=True)
class Event:
    """A log entry, unique per (step, kind, message). The store sets `step` when it writes the event."""

    level: Level
    kind: str
    message: str
    detail: JsonView = field(default_factory=lambda: {})
    step: int = 0


OnWrite = Callable[
    [int, Mapping[str, float], Mapping[str, float], Sequence[EpisodeRow], Sequence[Event]],
    None,
]
"""Callback with (step, metrics, timings, episodes, events)."""


class Run:
    """A run folder, opened by its single writer or by any number of readers."""

    def __init__(self, folder: Path, lock: FolderLock | None, database: sqlite3.Connection, header: Any) -> None:
        """Use `create`, `open` or `read`."""
        self.folder = folder
        self.header: Json = header
        self.on_write: OnWrite | None = None  # called after each `write` with its arguments (store/tracker.py)
        self._lock = lock
        self._db = database

    @staticmethod
    def create(folder: Path, header: JsonView) -> Run:
        """Creates a run with a fixed JSON `header` in a new folder. Raises ResumeError if the folder holds a run."""
        try:
            text = json.dumps(dict(header), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"the header of run {folder} is not JSON: {error}.") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as undo:
                lock = FolderLock(folder)
                undo.callback(lock.release)
                if (folder / "run.json").exists():
                    raise ResumeError(f"{folder} already holds a run. Resume it, or set run.out to another folder.")
                database = connect(folder, "rwc")
                undo.callback(database.close)
                durable.publish_file(folder / "run.json", text)  # last, so that a folder with run.json is complete
                durable.sync_folder(folder.parent)
                undo.pop_all()
        except OSError as error:
            raise DiskError(f"run folder {folder} cannot be created: {error.strerror or error}.") from error
        return Run(folder, lock, database, json.loads(text))

    @staticmethod
    def open(folder: Path) -> Run:
        """Opens a run for writing. Raises ResumeError if it is locked, damaged or from a newer version."""
        header = _header(folder)
        lock = FolderLock(folder)
        try:
            return Run(folder, lock, connect(folder, "rw"), header)
        except PosttrainError:
            lock.release()
            raise

    @staticmethod
    def read(folder: Path) -> Run:
        """Opens a run read-only, even while another process writes it. Takes no lock; writing raises ResumeError."""
        header = _header(folder)
        return Run(folder, None, connect(folder, "ro"), header)

    def close(self) -> None:
        """Closes the database and releases the lock; safe to call twice."""
        self._db.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        episodes: Sequence[EpisodeRow] = (),
        events: Sequence[Event] = (),
    ) -> None:
        """Stores one step in one transaction; writing a step again replaces it.

        Metrics and timings replace those of the same name, episodes replace all of that step and kind, and events
        replace those of the same kind and message. `timings` are wall-clock values and not part of `digest`. SQLite
        stores a NaN metric as NULL; it is read back as NaN. Raises DataError for invalid rows and DiskError if the disk
        is full or failing; in either case nothing from this call is stored.
        """
        numbers = {
            "metrics": [(step, name, _number(name, value)) for name, value in metrics.items()],
            "timings": [(step, name, _number(name, value)) for name, value in timings.items()],
        }
        rows = [row.values for row in episodes]
        for row in rows:
            if row[1] != step:
                raise DataError(
                    f"{row[0]} episode {row[2]}.{row[3]} has step {row[1]}, but the write is for step {step}."
                )
        with self._transaction() as db:
            for table, values in numbers.items():
                db.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", values)
            for kind in {row[0] for row in rows}:
                db.execute("DELETE FROM episodes WHERE kind = ? AND step = ?", (kind, step))
            db.executemany(f"INSERT INTO episodes VALUES ({', '.join('?' * 17)})", rows)
            _put_events(db, step, events, exact=True)
            db.execute("DELETE FROM meta WHERE key = 'finished'")
        if self.on_write:
            self.on_write(step, metrics, timings, episodes, events)

    def note(self, step: int, event: Event) -> None:
        """Stores an event about the process rather than the training (resumed, stopped); not part of `digest`."""
        with self._transaction() as db:
            _put_events(db, step, [event], exact=False)

    def rewind(self, step: int) -> None:
        """Deletes all rows of steps >= `step`, for a resume whose replay may differ (changed settings or machine)."""
        with self._transaction() as db:
            for table in ("metrics", "timings", "episodes"):
                db.execute(f"DELETE FROM {table} WHERE step >= ?", (step,))
            db.execute("DELETE FROM events WHERE step >= ? AND exact", (step,))

    def finish(self, summary: JsonView) -> None:
        """Marks the run as finished, with a JSON summary. A later `write` marks it as unfinished again."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('finished', ?)", (_json(summary, "the summary"),))

    def extend(self, header: JsonView) -> None:
        """Replaces the header of a run that is to train further than it planned, and marks it as unfinished."""
        with self._transaction() as db:
            db.execute("DELETE FROM meta WHERE key = 'finished'")
        durable.publish_file(self.folder / "run.json", json.dumps(dict(header), indent=2, allow_nan=False) + "\n")
        self.header = dict(header)

    def metrics(self, name: str | None = None) -> list[tuple[int, str, float]]:
        """(step, name, value) of one metric or all metrics, in step order."""
        return self._numbers("metrics", name)

    def at(self, step: int) -> dict[str, float]:
        """All metrics of one step, by name."""
        return {name: value for when, name, value in self.metrics() if when == step}

    def timings(self, name: str | None = None) -> list[tuple[int, str, float]]:
        """(step, name, value) of one timing or all timings, in step order."""
        return self._numbers("timings", name)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, ready to plot."""
        rows = self.metrics(name)
        return [step for step, _, _ in rows], [value for _, _, value in rows]

    def episodes(
        self, kind: Kind, step: int | None = None, limit: int | None = None, order: Order = "step", offset: int = 0
    ) -> list[EpisodeRow]:
        """Stored episodes of one step or of all. A leading - in `order` means descending; unscored ones come last."""
        if order not in ("step", "-step", "reward", "-reward", "length", "-length"):
            raise DataError(f"episodes cannot be ordered by {order!r}. Use step, reward or length, with - to reverse.")
        direction = "DESC" if order.startswith("-") else "ASC"
        rows = self._query(
            f"SELECT * FROM episodes WHERE kind = ? AND {'step = ?' if step is not None else '? IS NULL'} "
            f"ORDER BY {order.removeprefix('-')} {direction} NULLS LAST, step, grp, idx LIMIT ? OFFSET ?",
            (kind, step, -1 if limit is None else limit, offset),
        )
        return [EpisodeRow.from_values(row) for row in rows]

    def events(self) -> list[Event]:
        """All events, ordered by step and then by when they were first written."""
        rows = self._query("SELECT level, kind, message, detail, step FROM events ORDER BY step, id")
        return [Event(level, kind, message, json.loads(detail), step) for level, kind, message, detail, step in rows]

    def last_step(self) -> int | None:
        """The newest step with a metric, or None."""
        return next(iter(self._query("SELECT max(step) FROM metrics")))[0]

    def status(self) -> Status:
        """`running` while a live process holds the lock, then `finished` or `interrupted`."""
        if self._lock is not None or durable.is_locked(self.folder):
            return "running"
        return "interrupted" if self.summary() is None else "finished"

    def summary(self) -> Json | None:
        """The summary stored by `finish`, or None."""
        rows = list(self._query("SELECT value FROM meta WHERE key = 'finished'"))
        return json.loads(rows[0][0]) if rows else None

    def digest(self) -> str:
        """sha256 over metrics, episodes and events in key order; timings and process events are not part of it."""
        digest = hashlib.sha256()
        for query in _DIGESTED:
            digest.update(query.encode())
            for row in self._query(query):
                digest.update(b"".join(_canonical(value) for value in row))
        return digest.hexdigest()

    def _numbers(self, table: str, name: str | None) -> list[tuple[int, str, float]]:
        query = f"SELECT step, name, value FROM {table} WHERE ? IS NULL OR name = ? ORDER BY step, name"
        return [(s, n, math.nan if v is None else float(v)) for s, n, v in self._query(query, (name, name))]

    def _query(self, query: str, values: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._db.execute(query, values)
        except sqlite3.Error as error:
            raise explained(self.folder, error) from error

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        if self._lock is None:
            raise ResumeError(f"run {self.folder} is not open for writing; use Run.open, not Run.read.")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            failpoint("store:in-transaction")
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise explained(self.folder, error) from error
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        failpoint("store:committed")


def _header(folder: Path) -> Json:
    try:
        header = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        run = next((above for above in folder.parents[:2] if (above / "run.json").is_file()), None)
        hint = f" It belongs to the run {run}: give that." if run else ""
        raise ResumeError(f"{folder} holds no run: it has no run.json.{hint}") from None
    except ValueError as error:
        raise ResumeError(f"run {folder} is damaged: run.json is not JSON ({error}). Restore it from a copy.") from None
    if not isinstance(header, dict):
        raise ResumeError(f"run {folder} is damaged: run.json holds a {type(header).__name__}, expected an object.")
    return cast(Json, header)


def _put_events(db: sqlite3.Connection, step: int, events: Iterable[Event], exact: bool) -> None:
    for event in events:
        detail = _json(event.detail, f"detail of event {event.kind!r}")
        db.execute(
            "INSERT INTO events(step, level, kind, message, detail, exact) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET level = excluded.level, detail = excluded.detail",
            (step, event.level, event.kind, _text(event.message), detail, exact),
        )


def _number(name: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"metric {name!r} is {value!r}, expected a number.") from None


def _finite(value: float | None, what: str) -> float | None:
    if value is not None and not math.isfinite(value):
        raise DataError(f"{what} is {value}, expected a finite number or None.")
    return None if value is None else float(value)


def _json(value: JsonView, where: str) -> str:
    try:
        return json.dumps(dict(value), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} cannot be stored as JSON: {error}.") from None


def _text(value: str) -> str:
    """Makes text encodable as UTF-8: lone surrogates are written out as \\udxxx."""
    return value.encode("utf-8", "backslashreplace").decode()


def _canonical(value: Any) -> bytes:
    """Encodes a value with its type and length, so that different rows never give the same bytes."""
    if isinstance(value, float):
        data = struct.pack("<d", value)
    else:
        data = value if isinstance(value, bytes) else str(value).encode()
    return f"{type(value).__name__}:{len(data)}:".encode() + data
