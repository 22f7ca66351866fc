"""Paged search among up to millions of stored episodes, in an order that has a database index.

A search scans rows in that order and stops when a page is full or its time is up. The result says how far it got, so
that the browser continues from there: a rare word costs many short requests instead of one long one.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.store.database import connect, explained
from posttrain.types import ConfigError, Json

ORDERS = {
    "newest": "step DESC, grp DESC, idx DESC",
    "oldest": "step, grp, idx",
    "worst": "reward, step, grp, idx",
    "best": "reward DESC, step DESC, grp DESC, idx DESC",
    "longest": "length DESC, step DESC, grp DESC, idx DESC",
    "shortest": "length, step, grp, idx",
    "flat": "step DESC, grp DESC",
}
"""Orders that run.db has indices for; `flat` lists groups with equal rewards, each by its first completion."""
RESULTS = {
    "any": "1",
    "passed": "passed = 1",
    "failed": "passed = 0 AND reward IS NOT NULL",
    "unscored": "reward IS NULL",
}
KNOWN = {"kind": ("train", "eval"), "order": (*ORDERS,), "result": (*RESULTS,), "bound": ("most", "least")}
PAGE, SECONDS, LOOK = 40, 0.15, 256
SHORT = 280  # characters of a completion in a list
REMEMBERED = 64  # cached row counts of recent searches
_totals: dict[tuple[Any, ...], int] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Query:
    """A search; `start` is the number of rows, in this order, that earlier requests have scanned."""

    kind: str = "train"
    order: str = "newest"
    result: str = "any"
    text: str = ""
    part: str = ""
    """A part of the reward that must be at most (`bound` "most") or at least ("least") `limit`."""
    bound: str = "most"
    limit: float = 0.0
    first: int | None = None
    last: int | None = None
    start: int = 0

    @staticmethod
    def of(given: dict[str, str]) -> Query:
        """Parses URL parameters. Raises ConfigError for invalid ones."""
        numbers = {name: _whole(name, given.get(name, "")) for name in ("first", "last", "start")}
        query = Query(
            given.get("kind", "train"),
            given.get("order", "newest"),
            given.get("result", "any"),
            given.get("text", ""),
            given.get("part", ""),
            given.get("bound", "most"),
            _number("limit", given.get("limit", "")),
            numbers["first"],
            numbers["last"],
            numbers["start"] or 0,
        )
        for name, known in KNOWN.items():
            if getattr(query, name) not in known:
                raise ConfigError(f"{name}={getattr(query, name)!r} is unknown; use one of {', '.join(known)}.")
        return query


def _whole(name: str, text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ConfigError(f"{name}={text!r} is not a step or row number; expected a whole number of at least 0.")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name}={text!r} is not a finite number; expected one like 0 or -0.5.")
    return value


@dataclass(frozen=True)
class Found:
    """A page of a search. `next` is where to continue, None at the end; `looked` of `total` rows have been scanned.

    `total` is None for groups, because counting them would take longer than finding a page of them.
    """

    rows: list[Json]
    next: int | None
    looked: int
    total: int | None

    def as_dict(self) -> Json:
        """For JSON."""
        return {"rows": self.rows, "next": self.next, "looked": self.looked, "total": self.total}


def search(folder: Path, query: Query, page: int = PAGE, seconds: float = SECONDS) -> Found:
    """At most `page` episodes of a run, or groups if the order is `flat`, found within about `seconds`."""
    database = connect(folder, "ro")
    try:
        keys: list[Any] = []
        position, over, deadline = query.start, True, time.monotonic() + seconds
        for key, matches in _candidates(database, query):
            position += 1
            if matches:
                keys.append(key)
            late = (position - query.start) % LOOK == 0 and time.monotonic() > deadline
            if len(keys) == page or late:
                over = False
                break
        rows = [_row(database, query, key) for key in keys]
        return Found(rows, None if over else position, position, _total(folder, database, query))
    except sqlite3.Error as error:
        raise explained(folder, error) from error
    finally:
        database.close()


def _where(query: Query) -> tuple[str, dict[str, str | float | None]]:
    where = "kind = :kind" + (" AND reward IS NOT NULL" if query.order in ("worst", "best") else "")
    for name, sign in (("first", ">="), ("last", "<=")):
        if getattr(query, name) is not None:
            where += f" AND step {sign} :{name}"
    like = "".join(f"\\{c}" if c in "\\%_" else c for c in query.text)
    return where, {**vars(query), "like": f"%{like}%"}


def _candidates(database: sqlite3.Connection, query: Query) -> Iterator[tuple[Any, int]]:
    """Every row in order with whether it matches; an index gives the order, so rows come without sorting."""
    where, values = _where(query)
    wanted = RESULTS[query.result]
    if query.text:
        wanted += " AND (text LIKE :like ESCAPE '\\' OR prompt LIKE :like ESCAPE '\\')"
    if query.part:  # quoted, so that any characters are part of the name
        values["path"] = f"$.{json.dumps(query.part)}"
        wanted += f" AND json_extract(parts, :path) {'<=' if query.bound == 'most' else '>='} :limit"
    if query.order == "flat":
        flat = "count(*) > 1 AND count(reward) = count(*) AND min(reward) = max(reward)"
        rows = database.execute(
            f"SELECT step, grp, min(idx), {flat} AND max({wanted}) FROM episodes WHERE {where} GROUP BY step, grp "
            f"ORDER BY {ORDERS['flat']} LIMIT -1 OFFSET :start",
            values,
        )
        return (((step, group, index), matches) for step, group, index, matches in rows)
    return database.execute(
        f"SELECT rowid, {wanted} FROM episodes WHERE {where} ORDER BY {ORDERS[query.order]} LIMIT -1 OFFSET :start",
        values,
    )


def _row(database: sqlite3.Connection, query: Query, key: Any) -> Json:
    columns = "kind, step, grp, idx, prompt, text, reward, passed, stop, length, advantage, error"
    if query.order == "flat":
        step, group, index = key
        found = database.execute(
            f"SELECT {columns}, (SELECT count(*) FROM episodes AS all_ WHERE all_.kind = e.kind AND all_.step = e.step "
            "AND all_.grp = e.grp) FROM episodes AS e WHERE kind = ? AND step = ? AND grp = ? AND idx = ?",
            (query.kind, step, group, index),
        ).fetchone()
    else:
        found = database.execute(f"SELECT {columns}, NULL FROM episodes WHERE rowid = ?", (key,)).fetchone()
    names = (*columns.replace("grp", "group").replace("idx", "index").split(", "), "answers")
    row = dict(zip(names, found, strict=True))
    row["cut"] = len(row["text"]) > SHORT
    return row | {"text": row["text"][:SHORT], "prompt": row["prompt"][:SHORT], "passed": bool(row["passed"])}


def _total(folder: Path, database: sqlite3.Connection, query: Query) -> int | None:
    """Number of rows that a search scans; counted once unless the run grows."""
    if query.order == "flat":
        return None
    newest = database.execute("SELECT max(rowid) FROM episodes").fetchone()[0]
    where, values = _where(query)
    key = (folder, newest, query.kind, query.first, query.last, where)
    with _lock:
        if key not in _totals:
            while len(_totals) >= REMEMBERED:
                _totals.pop(next(iter(_totals)))
            _totals[key] = database.execute(f"SELECT count(*) FROM episodes WHERE {where}", values).fetchone()[0]
        return _totals[key]


def part_names(folder: Path, looked: int = 200) -> list[str]:
    """Names of the reward's parts, from the `looked` newest episodes of each kind."""
    database = connect(folder, "ro")
    try:
        rows = database.execute(
            "SELECT DISTINCT key FROM (SELECT parts FROM (SELECT parts FROM episodes WHERE kind = 'train' "
            "ORDER BY step DESC, grp DESC, idx DESC LIMIT :n) UNION ALL SELECT parts FROM (SELECT parts FROM episodes "
            "WHERE kind = 'eval' ORDER BY step DESC, grp DESC, idx DESC LIMIT :n)), json_each(parts) ORDER BY key",
            {"n": looked},
        ).fetchall()
    except sqlite3.Error as error:
        raise explained(folder, error) from error
    finally:
        database.close()
    return [name for (name,) in rows]


def kinds(folder: Path) -> dict[str, int]:
    """Number of stored episodes of each kind."""
    database = connect(folder, "ro")
    try:  # counting all rows reads none of them, and one kind is counted in an index
        (whole,) = database.execute("SELECT count(*) FROM episodes").fetchone()
        (held_out,) = database.execute("SELECT count(*) FROM episodes WHERE kind = 'eval'").fetchone()
    finally:
        database.close()
    return {kind: count for kind, count in (("eval", held_out), ("train", whole - held_out)) if count}


def read_group(folder: Path, kind: str, step: int, group: int) -> list[Json]:
    """The completions of one task at one step, shortened."""
    names = ("index", "reward", "passed", "length", "advantage", "text")
    database = connect(folder, "ro")
    try:
        rows = database.execute(
            "SELECT idx, reward, passed, length, advantage, substr(text, 1, ?) FROM episodes "
            "WHERE kind = ? AND step = ? AND grp = ? ORDER BY idx",
            (SHORT, kind, step, group),
        ).fetchall()
    finally:
        database.close()
    return [dict(zip(names, row, strict=True)) | {"passed": bool(row[2])} for row in rows]


def read_neighbours(folder: Path, kind: str, step: int, group: int, index: int) -> dict[str, list[int] | None]:
    """[step, group, index] of the previous and the next stored episode, None at either end."""
    found: dict[str, list[int] | None] = {}
    database = connect(folder, "ro")
    try:
        for name, sign, order in (("before", "<", " DESC"), ("after", ">", "")):
            row = database.execute(
                f"SELECT step, grp, idx FROM episodes WHERE kind = ? AND (step, grp, idx) {sign} (?, ?, ?) "
                f"ORDER BY step{order}, grp{order}, idx{order} LIMIT 1",
                (kind, step, group, index),
            ).fetchone()
            found[name] = list(row) if row else None
    finally:
        database.close()
    return found


def read_values(folder: Path, kind: str, step: int, group: int, index: int) -> tuple[Any, ...] | None:
    """The stored columns of one episode, or None if it does not exist."""
    database = connect(folder, "ro")
    try:
        return database.execute(
            "SELECT * FROM episodes WHERE kind = ? AND step = ? AND grp = ? AND idx = ?", (kind, step, group, index)
        ).fetchone()
    finally:
        database.close()
