"""The SQLite database of a run: tables, migrations, opening it, and one-line errors."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Literal

from posttrain.store.durable import DiskError
from posttrain.types import DataError, PosttrainError, ResumeError

MIGRATIONS: list[tuple[str, ...]] = [
    (
        "CREATE TABLE metrics(step INTEGER, name TEXT, value REAL, PRIMARY KEY(step, name)) WITHOUT ROWID",
        "CREATE TABLE timings(step INTEGER, name TEXT, value REAL, PRIMARY KEY(step, name)) WITHOUT ROWID",
        "CREATE TABLE episodes(kind TEXT, step INTEGER, grp INTEGER, idx INTEGER, task_id TEXT, prompt TEXT, "
        "text TEXT, reward REAL, passed INTEGER, stop TEXT, length INTEGER, parts TEXT, error TEXT, tokens BLOB, "
        "loss_mask BLOB, logprobs BLOB, advantage REAL, PRIMARY KEY(kind, step, grp, idx))",
        "CREATE TABLE events(id INTEGER PRIMARY KEY, step INTEGER, level TEXT, kind TEXT, message TEXT, detail TEXT, "
        "exact INTEGER, UNIQUE(step, kind, message, exact))",
        "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    ),
    (
        "CREATE INDEX episodes_by_reward ON episodes(kind, reward, step, grp, idx)",
        "CREATE INDEX episodes_by_length ON episodes(kind, length, step, grp, idx)",
    ),
]
"""Statements that migrate the database from version i to i + 1; `PRAGMA user_version` is the number applied.

A reader works without a missing index, but needs everything else.
"""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, even a damaged one."""
    return (folder / "run.json").exists() or (folder / "run.db").exists()


def run_folders(root: Path) -> list[Path]:
    """The run folders directly below `root`, sorted by name; empty if `root` is not a folder."""
    return sorted(path for path in root.iterdir() if path.is_dir() and is_run(path)) if root.is_dir() else []


def connect(folder: Path, mode: Literal["rwc", "rw", "ro"], query: str = "") -> sqlite3.Connection:
    """Opens run.db; for a writer, also checks it, turns on the write-ahead log and applies missing migrations."""
    path = folder / "run.db"
    if mode != "rwc" and not path.exists():
        raise ResumeError(f"run {folder} is damaged: run.db is missing. Restore it from a copy.")
    database: sqlite3.Connection | None = None
    try:
        uri = f"{path.absolute().as_uri()}?mode={mode}{query}"
        database = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None)
        _check_version(folder, database, mode)
        if mode != "ro":
            _prepare(folder, database)
        return database
    except (sqlite3.Error, PosttrainError) as error:
        if database is not None:
            database.close()
        raise error if isinstance(error, PosttrainError) else explained(folder, error) from error


def _check_version(folder: Path, database: sqlite3.Connection, mode: str) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise ResumeError(
            f"run {folder} has database version {version}, but this posttrain supports up to {len(MIGRATIONS)}. "
            "Upgrade posttrain."
        )
    if version == 0 and mode != "rwc":
        raise ResumeError(f"run {folder} is damaged: run.db is empty. Restore it from a copy.")
    missing = [statement for migration in MIGRATIONS[version:] for statement in migration]
    if mode == "ro" and not all(statement.startswith("CREATE INDEX") for statement in missing):
        raise ResumeError(
            f"run {folder} has database version {version}, but version {len(MIGRATIONS)} is needed. "
            "Resume the run once to upgrade it."
        )


def _prepare(folder: Path, database: sqlite3.Connection) -> None:
    journal = database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if journal != "wal":
        raise ResumeError(
            f"run folder {folder} is on a file system that does not support SQLite's write-ahead log "
            f"(journal mode {journal!r}). Put it on a local disk."
        )
    database.execute("PRAGMA synchronous = FULL")
    verdict = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise ResumeError(f"run {folder} is damaged: {' '.join(verdict.split())}. Restore run.db from a copy.")
    for version in range(database.execute("PRAGMA user_version").fetchone()[0], len(MIGRATIONS)):
        database.execute("BEGIN IMMEDIATE")
        for statement in MIGRATIONS[version]:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {version + 1}")
        database.execute("COMMIT")


def explained(folder: Path, error: sqlite3.Error) -> PosttrainError:
    """The posttrain error for an SQLite error."""
    name = getattr(error, "sqlite_errorname", "")
    if isinstance(error, sqlite3.IntegrityError):
        return DataError(f"two rows of run {folder} have the same key ({error}). Give each episode its own index.")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return DiskError(
            f"writing to run {folder} failed: {error}. Data stored earlier is intact; make space, then resume."
        )
    return ResumeError(f"run.db of {folder} cannot be used: {error}.")
