"""Workers as processes on the driver's machine, forked from one that has loaded the package."""

from __future__ import annotations

import atexit
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from posttrain.cluster.actors import OnPart, WorkerDied, message
from posttrain.cluster.messages import Buffer, decode, read, write
from posttrain.cluster.worker import ADDRESS, FORK, WAIT, versions
from posttrain.config import ClusterConfig

LAST_CHARACTERS = 400  # of a worker's output, in the message on its death


class _Forker:
    """The process that forks workers; started at the first worker, and again if it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._closed = False

    def start(self) -> None:
        """Starts to load the package."""
        with self._lock:
            self._started()

    def fork(self, connection: int, output: int) -> int:
        """Forks a worker that serves `connection` and writes its output to `output`; returns its process id."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", ADDRESS: "127.0.0.1"}
        return self._ask(FORK, environment, [connection, output])

    def wait(self, pid: int) -> int:
        """The exit status of a worker that has ended; that of a killed one when it cannot be known any more."""
        with suppress(WorkerDied):
            return self._ask(WAIT, pid, [])
        return signal.SIGKILL

    def close(self) -> None:
        """Ends the process; its workers end by themselves when the driver does."""
        self._closed = True
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()

    def _ask(self, request: bytes, body: Any, descriptors: list[int]) -> int:
        text = json.dumps(body).encode()
        with self._lock:
            for _ in range(2):  # a second time if the process has died meanwhile
                if self._closed:
                    raise WorkerDied("the process that starts workers", "this process is ending")
                sock = self._started()
                with suppress(OSError):
                    socket.send_fds(sock, [request], descriptors) if descriptors else sock.sendall(request)
                    sock.sendall(struct.pack("<Q", len(text)) + text)
                    if answer := sock.recv(8, socket.MSG_WAITALL):
                        return struct.unpack("<q", answer)[0]
                self._process = None
        raise WorkerDied("the process that starts workers", "it ended as soon as it was started")

    def _started(self) -> socket.socket:
        if self._socket is not None and self._process is not None and self._process.poll() is None:
            return self._socket
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "posttrain.cluster.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C in the terminal is for the driver alone
        )
        theirs.close()
        self._socket = ours
        return ours


_forker = _Forker()
atexit.register(_forker.close)


class ProcessActor:
    """A worker in a process of this machine, connected by a socket pair."""

    def __init__(self, name: str, kind: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker
        with theirs:
            self.pid = _forker.fork(theirs.fileno(), self._output.fileno())
        self._socket = ours
        self.where = f"pid {self.pid} on {platform.node()}"
        self.calls, self.parts = -1, 0  # the first call makes the object
        self._sending, self._lock = threading.Lock(), threading.Lock()
        self._waiting: deque[tuple[Future[Any], OnPart | None]] = deque()
        self._reason = ""
        threading.Thread(target=self._listen, daemon=True).start()
        self.made = self.send(message("make", kind, versions(), *arguments))

    @property
    def reason(self) -> str:
        return self._reason

    @property
    def alive(self) -> bool:
        return not self._reason

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
            if self._reason:
                return
            self._reason = reason
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with its sandboxes and servers

    def _listen(self) -> None:
        """Resolves futures as replies arrive; when the connection ends, all open ones raise WorkerDied."""
        while (parts := read(self._socket)) is not None:
            kind, *payload = parts
            future, on_part = self._waiting[0]
            value = decode(payload)
            if bytes(kind) == b"part":
                self.parts += 1
                if on_part:
                    on_part(value)
                continue
            self.calls += 1
            self._waiting.popleft()
            future.set_exception(value) if bytes(kind) == b"raised" else future.set_result(value)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        status = _forker.wait(self.pid)
        with self._lock:
            self._reason = self._reason or _reason(status, self._said())
            open_calls, self._waiting = list(self._waiting), deque()
        self._socket.close()
        self._output.close()
        for future, _ in open_calls:
            future.set_exception(WorkerDied(self.name, self._reason))

    def _said(self) -> str:
        """The end of the worker's output."""
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - LAST_CHARACTERS))
        return " ".join(self._output.read().decode("utf-8", "replace").split())


def _reason(status: int, said: str) -> str:
    code = os.waitstatus_to_exitcode(status)
    how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    return f"{how}; it said: {said}" if said else how


def open(cfg: ClusterConfig) -> None:
    """Starts to load what workers need; returns at once."""
    _forker.start()


def start(name: str, kind: str, arguments: tuple[Any, ...]) -> ProcessActor:
    """Starts a worker on this machine; see `actors.Start`."""
    return ProcessActor(name, kind, arguments)
