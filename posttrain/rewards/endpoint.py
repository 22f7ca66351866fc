"""Client for an OpenAI-compatible chat endpoint with retries, a budget and a reply cache on disk.

The protocol is `POST {url}/chat/completions` (https://platform.openai.com/docs/api-reference/chat). The API key is sent
in one header and redacted from all responses, so that nothing stored or printed can contain it.
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
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from posttrain.rewards.workers import WorkerPool
from posttrain.store import cache
from posttrain.types import ConfigError, JsonView, RolloutError

T = TypeVar("T")
Question = tuple[tuple[str, str], ...]
"""(role, content) of each message."""

DAY = 86_400  # seconds
LONGEST_BODY = 16 * 2**20  # maximum bytes read from one response
BYTES_PER_TOKEN = 4  # estimates tokens if the endpoint does not report them
TRANSIENT = (408, 429, *range(500, 600))
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


@dataclass(frozen=True)
class Limits:
    """Rate, retry and budget limits for an endpoint. None of them affects the content of a reply."""

    concurrency: int = 8
    timeout: float = 120.0  # seconds for one request, from the first byte to the last
    retries: int = 5
    backoff: float = 1.0  # seconds before the first retry; doubled for each further one
    longest_wait: float = 60.0  # seconds
    max_requests: int = 100_000
    max_tokens: int = 100_000_000

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_requests", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"limits.{name}={getattr(self, name)} must be at least 1.")
        for name, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0.0), ("longest_wait", 0.0)):
            if not least <= getattr(self, name) <= DAY:
                raise ConfigError(f"limits.{name}={getattr(self, name)} must be between {least} and {DAY:,}.")


class Unreadable(Exception):
    """A reply that is not in the requested format."""


class _Transient(Exception):
    """A request that may succeed if retried; `after` is the endpoint's Retry-After in seconds."""

    def __init__(self, problem: str, after: float = 0.0) -> None:
        super().__init__(problem)
        self.after = after


class Replies:
    """Reply cache: one SQLite file that any number of threads and processes can share.

    Requests are stored as hashes only, never as text.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be created or is not such a cache."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database:
                database.execute("CREATE TABLE IF NOT EXISTS replies(key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot use the judge's cache {path}: {error}. Set `cache` to another file.") from None

    @staticmethod
    def at(path: str) -> Replies:
        """The cache at the path given by the setting `cache`; empty means the shared default cache."""
        return Replies(Path(path) if path else cache.folder("judge") / "replies.db")

    def get(self, key: str) -> str | None:
        """The reply stored under a key, or None."""
        rows = self._run("SELECT reply FROM replies WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, reply: str) -> str:
        """Stores a reply and returns the stored one; if another process was faster, that is its reply."""
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?)", key, reply)
        return self.get(key) or reply

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            with closing(self._open()) as database:
                return database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise RolloutError(
                f"cannot use the judge's cache {self.path}: {error}. Free disk space, or set `cache` to another file.",
                boundary="judge",
            ) from None

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60, isolation_level=None)


class Endpoint:
    """One model at one endpoint. `requests`, `tokens` and `kept` count requests sent, tokens used and cache hits."""

    def __init__(
        self,
        url: str,
        model: str,
        params: JsonView,
        limits: Limits,
        replies: Replies,
        key: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.model, self.params, self.limits, self.replies = url.rstrip("/"), model, params, limits, replies
        self.requests, self.tokens, self.kept = 0, 0, 0
        self._address, self._key, self._sleep = address(self.url), key, sleep
        self._jitter = random.SystemRandom()  # separate, so that retries do not affect the run's random numbers
        self._lock = threading.Lock()

    def ask(self, questions: Iterable[Question], read: Callable[[str], T]) -> dict[Question, T | RolloutError]:
        """Asks all distinct questions, `limits.concurrency` at once, and returns `read(reply)` for each.

        If `read` raises Unreadable, the question is asked once more. The result is a RolloutError if the second reply
        is unreadable too, if the request fails, or if the budget is spent.
        """
        distinct = list(dict.fromkeys(questions))
        with WorkerPool(min(self.limits.concurrency, len(distinct))) as workers:
            futures = [workers.submit(partial(self._read, question, read)) for question in distinct]
            return {question: future.result() for question, future in zip(distinct, futures, strict=True)}

    def reply(self, question: Question, again: bool = False) -> str:
        """The reply to one question, from the cache if it was asked before. Raises RolloutError."""
        params = {**self.params, "seed": self.params["seed"] + 1} if again and "seed" in self.params else self.params
        messages = [{"role": role, "content": content} for role, content in question]
        body = json.dumps({"model": self.model, "messages": messages, **params}, sort_keys=True)
        key = hashlib.sha256(body.encode()).hexdigest()
        cached = self.replies.get(key)
        if cached is not None:
            with self._lock:
                self.kept += 1
            return cached
        reply = self._request_with_retries(body.encode())
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
                f"the judge {self.model} gave no readable verdict in two requests: {problem}.",
                boundary="judge",
            )
        except RolloutError as error:
            return error

    def _request_with_retries(self, body: bytes) -> str:
        """Retries with exponential backoff; jitter keeps threads from retrying all at the same time."""
        problem = _Transient("no request was sent")
        for attempt in range(self.limits.retries + 1):
            if attempt:
                wait = min(self.limits.longest_wait, self.limits.backoff * 2.0 ** (attempt - 1))
                self._sleep(max(wait * self._jitter.uniform(0.5, 1.0), min(problem.after, self.limits.longest_wait)))
            self._count_request()
            try:
                return self._request(body)
            except _Transient as error:
                problem = error
        raise RolloutError(
            f"the judge at {self.url} gave no reply in {self.limits.retries + 1} requests; the last failed with: "
            f"{problem}. Finished verdicts are cached: resume once the endpoint responds again.",
            boundary="judge",
        )

    def _count_request(self) -> None:
        """Counts a request against the budget. Raises RolloutError if it is spent."""
        with self._lock:
            for spent, most, what in (
                (self.requests, self.limits.max_requests, "requests"),
                (self.tokens, self.limits.max_tokens, "tokens"),
            ):
                if spent >= most:
                    raise RolloutError(
                        f"the judge's budget is spent: {spent:,} {what} since the start, limits.max_{what}={most:,}. "
                        "Raise the limit and resume; finished verdicts are cached and not requested again.",
                        boundary="judge",
                    )
            self.requests += 1

    def _request(self, body: bytes) -> str:
        status, after, text = self._post(body)
        if status in TRANSIENT:
            raise _Transient(f"HTTP {status}", after)
        if status in (401, 403):
            raise self._refused(f"HTTP {status}. Check the API key in the environment variable given by `key`")
        if status != 200:
            raise self._refused(f"HTTP {status}: {' '.join(text[:300].split())}")
        try:
            response = json.loads(text)
            content = response["choices"][0]["message"]["content"] or ""
            usage = response.get("usage") or {}
            if not isinstance(content, str):
                raise TypeError
            content = content.encode("utf-8", "replace").decode()  # JSON may contain lone surrogates
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise _Transient(f"a body that is not a chat completion ({len(text)} characters)") from None
        used = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(used, int) or used < 1:
            used = (len(body) + len(content.encode())) // BYTES_PER_TOKEN
        with self._lock:
            self.tokens += used
        return self._redact(content)

    def _refused(self, reason: str) -> RolloutError:
        return RolloutError(f"the judge at {self.url} refused the request: {reason}.", boundary="judge")

    def _post(self, body: bytes) -> tuple[int, float, str]:
        """Sends one request and returns (status, Retry-After in seconds, text). Redirects are not followed.

        Raises _Transient if the response is not complete in time. The timer guards against a body that trickles in,
        because a socket's own timeout restarts with every packet.
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
            timer = threading.Timer(self.limits.timeout, _abort, (connection.sock, late))
            timer.daemon = True
            timer.start()
            connection.request("POST", f"{self._address.path}/chat/completions", body, headers)
            with connection.getresponse() as response:
                text = response.read(LONGEST_BODY).decode("utf-8", "replace")
            after = response.getheader("Retry-After", "").strip()
        except (OSError, HTTPException) as error:
            in_time = not late.is_set() and not isinstance(error, TimeoutError)
            raise _Transient(
                self._redact(f"{type(error).__name__}: {error}") if in_time else self._timed_out()
            ) from None
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
        if late.is_set():
            raise _Transient(self._timed_out())
        return response.status, float(after) if re.fullmatch(r"\d{1,6}(\.\d+)?", after) else 0.0, self._redact(text)

    def _timed_out(self) -> str:
        return f"no complete response within {self.limits.timeout:g} s"

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _abort(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it may be closed by now
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the base class's: a TLS socket's own is not thread-safe


def address(url: str) -> SplitResult:
    """Parses an endpoint's URL. Raises ConfigError, which never repeats the URL, because it could hold a password."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid, parts = False, SplitResult("", "", "", "", "")
    if not valid or parts.username is not None or parts.query or parts.fragment or not url.isascii() or " " in url:
        raise ConfigError(
            "`endpoint` is not a plain URL such as http://127.0.0.1:8000/v1, without user, password and query. Put an "
            "API key into the environment variable named by `key`."
        )
    return parts


def key_from(variable: str) -> str:
    """Reads the API key from an environment variable; "" for none. Raises ConfigError, which never contains the key."""
    if not variable:
        return ""
    if not _VARIABLE.fullmatch(variable):
        raise ConfigError(
            "`key` must be the name of an environment variable such as JUDGE_API_KEY (capitals, digits, underscores) "
            "that holds the API key. Never put the key itself into a file."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable}, named by `key`, is not set. Put the API key there.")
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"the API key in {variable} contains an invalid character, such as a space. Set it again.")
    return key
