"""An OpenAI-compatible chat endpoint: questions in, replies out, with retries, a budget and replies kept on disk.

The protocol is `POST {url}/chat/completions` (https://platform.openai.com/docs/api-reference/chat). The key is sent in
one header and taken out of everything that comes back, so that nothing kept or printed can hold it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from posttrain.rollout.prefetch import Threads
from posttrain.store import cache
from posttrain.types import ConfigError, RolloutError

T = TypeVar("T")
Question = tuple[tuple[str, str], ...]
"""(role, content) of each message."""

DAY = 86_400  # seconds
LONGEST_BODY = 16 * 2**20  # bytes of one response that are read
BYTES_PER_TOKEN = 4  # how tokens are counted where an endpoint does not report them
TRANSIENT = (408, 429, *range(500, 600))
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


@dataclass(frozen=True)
class Limits:
    """How hard an endpoint may be asked. Nothing here changes what a reply says."""

    concurrency: int = 8
    timeout: float = 120.0  # seconds of one request, from its first byte to its last
    retries: int = 5
    backoff: float = 1.0  # seconds before the first retry; each further wait is twice as long
    longest_wait: float = 60.0  # seconds
    max_requests: int = 100_000
    max_tokens: int = 100_000_000

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_requests", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"limits.{name}={getattr(self, name)} must be 1 or more.")
        for name, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0.0), ("longest_wait", 0.0)):
            if not least <= getattr(self, name) <= DAY:
                raise ConfigError(f"limits.{name}={getattr(self, name)} is not between {least} and {DAY:,}.")


class Unreadable(Exception):
    """A reply that does not say what was asked for, in the form that was asked for."""


class _Transient(Exception):
    """A request that may go well another time; `after` are the seconds the endpoint wants to be left alone."""

    def __init__(self, problem: str, after: float = 0.0) -> None:
        super().__init__(problem)
        self.after = after


class Replies:
    """What was replied to which request, in one SQLite file that any number of threads and processes share.

    Only a hash of a request is kept, never its text.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where the file cannot be made or is something else."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database:
                database.execute("CREATE TABLE IF NOT EXISTS replies(key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the judge's cache {path} cannot be used: {error}. Set `cache` anew.") from None

    @staticmethod
    def at(path: str) -> Replies:
        """Those in the file of a settings file's `cache`; empty is where all are kept that name none."""
        return Replies(Path(path) if path else cache.folder("judge") / "replies.db")

    def get(self, key: str) -> str | None:
        """The reply kept under a key."""
        rows = self._run("SELECT reply FROM replies WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, reply: str) -> str:
        """Keeps a reply and returns the one that counts: where another process was quicker, its reply."""
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?)", key, reply)
        return self.get(key) or reply

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            with closing(self._open()) as database:
                return database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise RolloutError(
                f"the judge's cache {self.path} cannot be used: {error}. Make room for it, or set `cache` to another.",
                boundary="judge",
            ) from None

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60, isolation_level=None)


class Endpoint:
    """One model behind one address. `requests`, `tokens` and `kept` count what was sent, spent and not asked again."""

    def __init__(
        self,
        url: str,
        model: str,
        params: Mapping[str, Any],
        limits: Limits,
        replies: Replies,
        key: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.model, self.params, self.limits, self.replies = url.rstrip("/"), model, params, limits, replies
        self.requests, self.tokens, self.kept = 0, 0, 0
        self._address, self._key, self._sleep = address(self.url), key, sleep
        self._jitter = random.SystemRandom()  # a source of its own: waiting must not shift what a run draws
        self._lock = threading.Lock()

    def ask(self, questions: Iterable[Question], read: Callable[[str], T]) -> dict[Question, T | RolloutError]:
        """What `read` makes of the reply to each question, `limits.concurrency` of them at once; equal ones are one.

        A reply that `read` finds Unreadable is asked for once more. A question that has no reading then, that could not
        be asked, or for which there is no budget is answered by the RolloutError that says so.
        """
        distinct = list(dict.fromkeys(questions))
        with Threads(min(self.limits.concurrency, len(distinct))) as threads:
            futures = [threads.submit(partial(self._read, question, read)) for question in distinct]
            return {question: future.result() for question, future in zip(distinct, futures, strict=True)}

    def reply(self, question: Question, again: bool = False) -> str:
        """The reply to one question, from the cache where it has been asked before. Raises RolloutError."""
        params = {**self.params, "seed": self.params["seed"] + 1} if again and "seed" in self.params else self.params
        messages = [{"role": role, "content": content} for role, content in question]
        body = json.dumps({"model": self.model, "messages": messages, **params}, sort_keys=True)
        key = hashlib.sha256(body.encode()).hexdigest()
        known = self.replies.get(key)
        if known is not None:
            with self._lock:
                self.kept += 1
            return known
        reply = self._patiently(body.encode())
        return self.replies.put(key, reply)

    def _read(self, question: Question, read: Callable[[str], T]) -> T | RolloutError:
        try:
            try:
                return read(self.reply(question))
            except Unreadable as problem:
                *before, (role, content) = question
                reminder = f"{content}\n\n(An earlier reply could not be used: {problem}. Keep to the form asked for.)"
                return read(self.reply((*before, (role, reminder)), again=True))
        except Unreadable as problem:
            return RolloutError(
                f"the judge {self.model} was asked twice and gave no verdict that can be read: {problem}.",
                boundary="judge",
            )
        except RolloutError as error:
            return error

    def _patiently(self, body: bytes) -> str:
        """Asks until there is a reply. The waits double, with jitter so that threads do not all return at once."""
        problem = _Transient("nothing was asked")
        for attempt in range(self.limits.retries + 1):
            if attempt:
                wait = min(self.limits.longest_wait, self.limits.backoff * 2.0 ** (attempt - 1))
                self._sleep(max(wait * self._jitter.uniform(0.5, 1.0), min(problem.after, self.limits.longest_wait)))
            self._spend()
            try:
                return self._once(body)
            except _Transient as error:
                problem = error
        raise RolloutError(
            f"the judge at {self.url} gave no reply in {self.limits.retries + 1} requests; the last: {problem}. "
            "What was judged is kept: resume when it answers again.",
            boundary="judge",
        )

    def _spend(self) -> None:
        with self._lock:
            for spent, most, what in (
                (self.requests, self.limits.max_requests, "requests"),
                (self.tokens, self.limits.max_tokens, "tokens"),
            ):
                if spent >= most:
                    raise RolloutError(
                        f"the judge's budget is spent: {spent:,} {what} since the start, limits.max_{what}={most:,}. "
                        "Raise it and resume; what was judged is kept and not asked again.",
                        boundary="judge",
                    )
            self.requests += 1

    def _once(self, body: bytes) -> str:
        status, after, text = self._post(body)
        if status in TRANSIENT:
            raise _Transient(f"HTTP {status}", after)
        if status in (401, 403):
            raise self._refused(f"HTTP {status}. Check the key in the environment variable that `key` names")
        if status != 200:
            raise self._refused(f"HTTP {status}: {' '.join(text[:300].split())}")
        try:
            said = json.loads(text)
            content = said["choices"][0]["message"]["content"] or ""
            usage = said.get("usage") or {}
            if not isinstance(content, str):
                raise TypeError
            content = content.encode("utf-8", "replace").decode()  # JSON can spell what UTF-8 cannot hold
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise _Transient(f"a body that is not a chat completion ({len(text)} characters)") from None
        used = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(used, int) or used < 1:
            used = (len(body) + len(content.encode())) // BYTES_PER_TOKEN
        with self._lock:
            self.tokens += used
        return self._clean(content)

    def _refused(self, why: str) -> RolloutError:
        return RolloutError(f"the judge at {self.url} refused the request: {why}.", boundary="judge")

    def _post(self, body: bytes) -> tuple[int, float, str]:
        """(status, seconds it wants to be left alone, text) of one request. No redirect is followed.

        Raises _Transient where there is no whole response in time. The timer is what holds against a body that comes
        drop by drop: a socket's own timeout begins anew with each of them.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        connection = kind(self._address.hostname or "", self._address.port, timeout=self.limits.timeout)
        late = threading.Event()
        timer = None
        try:
            connection.connect()
            timer = threading.Timer(self.limits.timeout, _cut, (connection.sock, late))
            timer.daemon = True
            timer.start()
            connection.request("POST", f"{self._address.path}/chat/completions", body, headers)
            with connection.getresponse() as response:
                text = response.read(LONGEST_BODY).decode("utf-8", "replace")
            after = response.getheader("Retry-After", "").strip()
        except (OSError, HTTPException) as error:
            in_time = not late.is_set() and not isinstance(error, TimeoutError)
            raise _Transient(self._clean(f"{type(error).__name__}: {error}") if in_time else self._slow()) from None
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
        if late.is_set():
            raise _Transient(self._slow())
        return response.status, float(after) if re.fullmatch(r"\d{1,6}(\.\d+)?", after) else 0.0, self._clean(text)

    def _slow(self) -> str:
        return f"no whole response within {self.limits.timeout:g} s"

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it may be closed by now
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the plain one: a TLS socket's own is not for other threads


def address(url: str) -> SplitResult:
    """The parts of an endpoint's address. Raises ConfigError, which repeats none of it: it could hold a password."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known, parts = False, SplitResult("", "", "", "", "")
    if not known or parts.username is not None or parts.query or parts.fragment or not url.isascii() or " " in url:
        raise ConfigError(
            "`endpoint` is not a plain address such as http://127.0.0.1:8000/v1, without user, password and query. "
            "A key belongs in the environment variable that `key` names."
        )
    return parts


def key_from(variable: str) -> str:
    """The API key in an environment variable, or "" where none is named. Raises ConfigError, which never holds it."""
    if not variable:
        return ""
    if not _VARIABLE.fullmatch(variable):
        raise ConfigError(
            "`key` is not the name of an environment variable, such as JUDGE_API_KEY (capitals, digits, underscores). "
            "It names where the key is; the key itself must not stand in a file."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable}, which `key` names, is not set. Put the key there.")
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"the key in {variable} holds a character that no key has, such as a space. Set it anew.")
    return key
