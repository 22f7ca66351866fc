"""A labelling queue, its pairs and its labels, in one SQLite file: FOLDER/labels/QUEUE.db.

The pairs are copied into the file when labelling starts, so that labels stay readable whatever happens to the run or
file they came from. A label is one transaction and is acknowledged only once it is on disk. The client chooses its id,
so sending the same label again changes nothing. Nothing is ever overwritten: a second label of the same pair by the
same person takes precedence because it is newer, and undone labels are only marked.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast

from posttrain import rng
from posttrain.data.messages import as_json, from_json
from posttrain.store.durable import DiskError, make_folder
from posttrain.types import ConfigError, Json, JsonView, Message, PosttrainError, Preference, ResumeError, Role

FOLDER = "labels"
VERSION = 1
TABLES = (
    "CREATE TABLE about(key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    "CREATE TABLE pairs(position INTEGER PRIMARY KEY, id TEXT UNIQUE, prompt TEXT, a TEXT, b TEXT)",
    "CREATE TABLE labels(arrived INTEGER PRIMARY KEY, id TEXT UNIQUE, pair TEXT, annotator TEXT, preferred TEXT, "
    "left TEXT, seconds REAL, at TEXT, undone INTEGER DEFAULT 0)",
    "CREATE INDEX labels_by_pair ON labels(pair, annotator, arrived)",
)
CURRENT = (
    "SELECT id, pair, annotator, preferred, left, seconds, at FROM labels WHERE arrived IN "
    "(SELECT max(arrived) FROM labels WHERE NOT undone GROUP BY pair, annotator) ORDER BY arrived"
)
LONGEST_NAME = 60
Side = Literal["a", "b"]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, under neutral names."""

    id: str
    prompt: tuple[Message, ...]
    a: str
    b: str


@dataclass(frozen=True)
class Label:
    """One person's label of one pair. `preferred` is a, b or tie; `left` is the answer shown on the left."""

    id: str
    pair: str
    annotator: str
    preferred: str
    left: str
    seconds: float
    at: str = ""


class MessageRow(TypedDict):
    """A message in the format of a data file; it may have other fields (posttrain/data/messages.py)."""

    role: Role
    content: str
    tool_calls: list[Json]


def left_of(queue: str, annotator: str, pair: str) -> Side:
    """Which answer an annotator sees on the left: random, but always the same for the same annotator and pair."""
    return "ab"[rng.key("sides", queue, annotator, pair) & 1]  # pyright: ignore[reportReturnType]


def queues(root: Path) -> dict[str, Path]:
    """Name → file of every queue in the folder."""
    return {name: path for name, path in _files(root).items() if _is_whole(path)}


def _files(root: Path) -> dict[str, Path]:
    """Name → file of every database in the folder, unopened; only listed names are found, so none leaves the folder."""
    return {path.stem: path for path in sorted((root / FOLDER).glob("*.db"))}


def create(root: Path, name: str, source: str, pairs: Sequence[Preference]) -> None:
    """Creates a queue durably and atomically. Raises ConfigError if another source already has the name."""
    make_folder(root / FOLDER)
    path = root / FOLDER / f"{name}.db"
    with _opened(path, "rwc") as database, _transaction(database):
        if database.execute("PRAGMA user_version").fetchone()[0]:  # another process was faster
            (found,) = database.execute("SELECT value FROM about WHERE key = 'source'").fetchone()
            if found != source:
                raise ConfigError(f"a queue named {name!r} already exists, from {found}. Rename the file or run.")
            return
        for statement in TABLES:
            database.execute(statement)
        made = {"source": source, "created": _now()}
        database.executemany("INSERT INTO about VALUES (?, ?)", made.items())
        rows = [(i, p.id, json.dumps(prompt_rows(p.prompt)), p.chosen, p.rejected) for i, p in enumerate(pairs)]
        database.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?, ?)", rows)
        database.execute(f"PRAGMA user_version = {VERSION}")


class Queue:
    """One queue; every call reopens the file, so that any number of threads and processes can share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem

    @staticmethod
    def find(root: Path, name: str) -> Queue:
        """The queue of that name. Raises ResumeError if it does not exist."""
        path = _files(root).get(name)
        if path is None or not _is_whole(path):
            raise ResumeError(f"{root} contains no queue named {name!r}. Start one on the Label page.")
        return Queue(path)

    def about(self) -> dict[str, str]:
        """`source` and `created`."""
        with _opened(self.path, "ro") as database:
            return dict(database.execute("SELECT key, value FROM about"))

    def pairs(self) -> list[Pair]:
        """All pairs in labelling order."""
        with _opened(self.path, "ro") as database:
            rows = database.execute("SELECT id, prompt, a, b FROM pairs ORDER BY position").fetchall()
        return [_pair(row) for row in rows]

    def labels(self) -> list[Label]:
        """The latest label of each pair by each person, without undone ones, in order of arrival."""
        with _opened(self.path, "ro") as database:
            return [Label(*row) for row in database.execute(CURRENT)]

    def waiting(self, annotator: str, limit: int) -> list[Pair]:
        """The next pairs that a person has not labelled."""
        with _opened(self.path, "ro") as database:
            rows = database.execute(
                "SELECT id, prompt, a, b FROM pairs WHERE NOT EXISTS (SELECT 1 FROM labels WHERE pair = pairs.id AND "
                "annotator = ? AND NOT undone) ORDER BY position LIMIT ?",
                (annotator, limit),
            ).fetchall()
        return [_pair(row) for row in rows]

    def progress(self) -> tuple[int, dict[str, int]]:
        """(number of pairs, annotator → how many of them they have labelled)."""
        with _opened(self.path, "ro") as database:
            (count,) = database.execute("SELECT count(*) FROM pairs").fetchone()
            done = "SELECT annotator, count(DISTINCT pair) FROM labels WHERE NOT undone GROUP BY annotator ORDER BY 1"
            return count, dict(database.execute(done))

    def add(self, given: JsonView) -> str:
        """Stores one label, `{id, pair, annotator, choice, seconds}` with choice left, right or tie; returns its id.

        When this returns, the label survives a crash of the process or the machine. Raises ConfigError for an invalid
        label, DiskError if it cannot be stored.
        """
        label = self._checked(given)
        values = (label.id, label.pair, label.annotator, label.preferred, label.left, label.seconds, _now())
        with _opened(self.path, "rw") as database, _transaction(database):
            if not database.execute("SELECT 1 FROM pairs WHERE id = ?", (label.pair,)).fetchone():
                raise ConfigError(f"queue {self.name} has no pair {label.pair!r}.")
            columns = "id, pair, annotator, preferred, left, seconds, at"
            database.execute(f"INSERT OR IGNORE INTO labels({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        return label.id

    def undo(self, label: str) -> str:
        """Undoes a label, if it exists. Returns its id."""
        with _opened(self.path, "rw") as database, _transaction(database):
            database.execute("UPDATE labels SET undone = 1 WHERE id = ?", (label,))
        return label

    def _checked(self, given: JsonView) -> Label:
        texts = {name: given.get(name) for name in ("id", "pair", "annotator", "choice")}
        for name, text in texts.items():
            if (
                not isinstance(text, str)
                or not text.strip()
                or (name in ("id", "annotator") and len(text) > LONGEST_NAME)
            ):
                raise ConfigError(f"a label's {name} is {text!r}, expected a string of 1 to {LONGEST_NAME} characters.")
        seconds = given.get("seconds")
        if not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
            raise ConfigError(f"a label's seconds are {seconds!r}, expected a number of 0 or more.")
        annotator, pair = str(texts["annotator"]), str(texts["pair"])
        left = left_of(self.name, annotator, pair)
        chosen = {"left": left, "right": "b" if left == "a" else "a", "tie": "tie"}
        if texts["choice"] not in chosen:
            raise ConfigError(f"a label's choice is {texts['choice']!r}, expected left, right or tie.")
        return Label(str(texts["id"]), pair, annotator, chosen[str(texts["choice"])], left, float(seconds))


@contextmanager
def _opened(path: Path, mode: Literal["rwc", "rw", "ro"]) -> Iterator[sqlite3.Connection]:
    """Opens the file; writes go to a write-ahead log that is on disk when COMMIT returns."""
    database: sqlite3.Connection | None = None
    try:
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        database = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None)
        if mode != "ro":
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
        yield database
    except sqlite3.Error as error:
        raise _explained(path, error) from error
    finally:
        if database is not None:
            database.close()


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _explained(path: Path, error: sqlite3.Error) -> PosttrainError:
    if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return DiskError(f"writing to {path} failed: {error}. Labels stored before are intact; free some disk space.")
    return ResumeError(f"{path} cannot be used: {error}.")


def _is_whole(path: Path) -> bool:
    try:
        with _opened(path, "ro") as database:
            return database.execute("PRAGMA user_version").fetchone()[0] == VERSION
    except ResumeError:
        return False


def _pair(row: tuple[str, str, str, str]) -> Pair:
    name, prompt, a, b = row
    return Pair(name, messages_of(json.loads(prompt)), a, b)


def prompt_rows(prompt: Sequence[Message]) -> list[MessageRow]:
    """Messages in the format of a data file."""
    return [cast(MessageRow, as_json(m)) for m in prompt]


def messages_of(rows: Sequence[MessageRow]) -> tuple[Message, ...]:
    """Inverse of `prompt_rows`."""
    return tuple(map(from_json, rows))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
