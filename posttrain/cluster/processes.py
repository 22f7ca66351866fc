"""Workers as subprocesses of the driver, on its machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain.cluster.actors import OnPart, WorkerDied, message
from posttrain.cluster.messages import Buffer, decode, read, write

LAST_LINES = 400  # characters of a worker's output in the message on its death


class ProcessActor:
    """A worker in a subprocess, connected by a socket pair."""

    def __init__(self, name: str, kind: str, arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "posttrain.cluster.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            start_new_session=True,  # Ctrl-C in the terminal is for the driver alone
        )
        theirs.close()
        self._socket = ours
        self.where = f"pid {self._process.pid}"
        self._sending, self._lock = threading.Lock(), threading.Lock()
        self._waiting: deque[tuple[Future[Any], OnPart | None]] = deque()
        self._reason = ""
        threading.Thread(target=self._listen, daemon=True).start()
        self.made = self.send(message("make", kind, *arguments))

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._reason and self._process.poll() is None

    def send(self, message: Sequence[Buffer], on_part: OnPart | None = None) -> Future[Any]:
        """See `Actor.send`."""
        future: Future[Any] = Future()
        with self._sending:
            with self._lock:
                if self._reason:
                    future.set_exception(WorkerDied(self.name, self._reason))
                    return future
                self._waiting.append((future, on_part))
            with suppress(OSError):  # the listening thread sees the end of the connection and fails the future
                write(self._socket, message)
        return future

    def kill(self, reason: str) -> None:
        """See `Actor.kill`."""
        with self._lock:
            self._reason = self._reason or reason
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with its sandboxes and servers

    def _listen(self) -> None:
        """Resolves futures as replies arrive; when the connection ends, all open ones raise WorkerDied."""
        while (parts := read(self._socket)) is not None:
            kind, *payload = parts
            future, on_part = self._waiting[0]
            value = decode(payload)
            if bytes(kind) == b"part":
                if on_part:
                    on_part(value)
                continue
            self._waiting.popleft()
            future.set_exception(value) if bytes(kind) == b"raised" else future.set_result(value)
        code = self._process.wait()
        with self._lock:
            self._reason = self._reason or _reason(code, self._said())
            open_calls, self._waiting = list(self._waiting), deque()
        self._socket.close()
        for future, _ in open_calls:
            future.set_exception(WorkerDied(self.name, self._reason))

    def _said(self) -> str:
        """The end of the worker's output."""
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - LAST_LINES))
        text = self._output.read().decode("utf-8", "replace")
        self._output.close()
        return " ".join(text.split())


def _reason(code: int, said: str) -> str:
    how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    return f"{how}; it said: {said}" if said else how


def start(name: str, kind: str, arguments: tuple[Any, ...]) -> ProcessActor:
    """Starts a worker on this machine; see `actors.Start`."""
    local = {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}
    return ProcessActor(name, kind, arguments, local)
