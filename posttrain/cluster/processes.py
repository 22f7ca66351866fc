"""Workers as processes on the driver's machine, forked from one that has loaded the package."""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import platform
import queue
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
from posttrain.cluster.worker import ADDRESS, FORK, UNKNOWN, WAIT, versions
from posttrain.config import ClusterConfig

GRACE = 1.0  # seconds that the process which forks workers has to end
LAST_CHARACTERS = 400  # of a worker's output, in the message on its death


class _Forker:
    """The process that forks workers; started at the first worker, and again if it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Starts to load the package."""
        with self._lock:
            self._started()

    def fork(self, connection: int, output: int) -> int:
        """Forks a worker that serves `connection` and writes its output to `output`; returns its process id."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", ADDRESS: "127.0.0.1"}
        return self._ask(FORK, environment, [connection, output])

    def wait(self, pid: int) -> int:
        """The exit status of a worker that has ended; UNKNOWN if the process that forked it is gone."""
        with self._lock:
            gone = self._process is None or self._process.poll() is not None
            return UNKNOWN if gone else self._asked(WAIT, pid, [])

    def close(self) -> None:
        """Ends the process, which ends its workers."""
        sock, process = self._socket, self._process
        self._socket = self._process = None
        if sock is None or process is None:
            return
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # also where a thread waits for an answer
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:  # still loading, or stopped; its workers see that their connection is closed
            process.kill()
            process.wait()
        sock.close()

    def _ask(self, request: bytes, body: Any, descriptors: list[int]) -> int:
        with self._lock:
            for _ in range(2):  # a second time if the process has died meanwhile
                if (answer := self._asked(request, body, descriptors)) != UNKNOWN:
                    return answer
        raise WorkerDied("the process that starts workers", "it ended as soon as it was started")

    def _asked(self, request: bytes, body: Any, descriptors: list[int]) -> int:
        """The process's answer; UNKNOWN if it has died."""
        text, answer = json.dumps(body).encode(), b""
        sock = self._started()
        try:
            socket.send_fds(sock, [request], descriptors) if descriptors else sock.sendall(request)
            sock.sendall(struct.pack("<Q", len(text)) + text)
            answer = sock.recv(8, socket.MSG_WAITALL)
        except OSError:
            answer = b""
        finally:
            if len(answer) < 8:  # it died, or Ctrl-C came in between: nobody may read this answer as another's
                self.close()
        return struct.unpack("<q", answer)[0] if len(answer) == 8 else UNKNOWN

    def _started(self) -> socket.socket:
        if self._socket is not None and self._process is not None and self._process.poll() is None:
            return self._socket
        self.close()
        ours, theirs = _pair()
        self._process = spawn(theirs)
        theirs.close()
        self._socket = ours
        return ours


def spawn(end: socket.socket) -> subprocess.Popen[bytes]:
    """Starts the process that forks workers, connected by `end`."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "posttrain.cluster.worker", str(end.fileno())],
        pass_fds=[end.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,  # Ctrl-C in the terminal is for the driver alone
    )


def _pair() -> tuple[socket.socket, socket.socket]:
    """A socket pair without the descriptors 0, 1 and 2, which a process with closed standard streams would hand out."""
    made = socket.socketpair()
    ends = [socket.socket(fileno=fcntl.fcntl(one.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)) for one in made]
    for one in made:
        one.close()
    return ends[0], ends[1]


_forker = _Forker()
atexit.register(_forker.close)


class ProcessActor:
    """A worker in a process of this machine, connected by a socket pair."""

    def __init__(self, name: str, kind: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        first = message("make", kind, versions(), *arguments)  # what cannot be sent is refused before a process starts
        ours, theirs = _pair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker
        with theirs:
            self.pid = _forker.fork(theirs.fileno(), self._output.fileno())
        self._socket = ours
        self.where = f"pid {self.pid} on {platform.node()}"
        self._lock = threading.Lock()  # a call is queued and expected in one go
        self._unsent: queue.SimpleQueue[Sequence[Buffer] | None] = queue.SimpleQueue()
        self.calls, self.parts = -1, 0  # the first call makes the object
        self._waiting: deque[tuple[Future[Any], OnPart | None]] = deque()
        self._reason, self._over = "", False  # over: its process may be gone, and its id another's
        for work in (self._listen, self._write):
            threading.Thread(target=work, daemon=True).start()
        self.made = self.send(first)

    @property
    def reason(self) -> str:
        return self._reason

    @property
    def alive(self) -> bool:
        return not (self._reason or self._over)

    def send(self, message: Sequence[Buffer], on_part: OnPart | None = None) -> Future[Any]:
        """See `Actor.send`."""
        future: Future[Any] = Future()
        with self._lock:
            if not self._reason:
                self._waiting.append((future, on_part))
                self._unsent.put(message)
                return future
        future.set_exception(WorkerDied(self.name, self._reason))
        return future

    def _write(self) -> None:
        """Sends calls, in a thread of its own: a worker that hangs must not keep the driver from its deadlines."""
        with suppress(OSError):  # the listening thread sees the end of the connection and fails the futures
            while (message := self._unsent.get()) is not None:
                write(self._socket, message)

    def kill(self, reason: str) -> None:
        """See `Actor.kill`."""
        with self._lock:
            if self.alive:
                self._reason = reason
                self._end()

    def _end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with its sandboxes and servers

    def _listen(self) -> None:
        """Resolves futures as replies arrive; when the connection ends, all open ones raise WorkerDied."""
        try:
            while (parts := read(self._socket)) is not None and not self._reason:
                self._resolve(*parts)
        except Exception as error:  # a reply that cannot be read, or used
            self.kill(f"its answer cannot be read ({type(error).__name__}: {error})")
        with self._lock:
            self._over = True
            self._end()
        how = _reason(_forker.wait(self.pid), self._said())
        with self._lock:
            self._reason = self._reason or how
            open_calls, self._waiting = list(self._waiting), deque()
        self._unsent.put(None)
        self._socket.close()
        self._output.close()
        for future, _ in open_calls:
            future.set_exception(WorkerDied(self.name, self._reason))

    def _resolve(self, kind: Buffer, *payload: Buffer) -> None:
        """Hands a reply to whoever waits for it."""
        future, on_part = self._waiting[0]
        value = decode(payload)
        if bytes(kind) == b"part":
            self.parts += 1
            if on_part:
                on_part(value)
            return
        self.calls += 1
        self._waiting.popleft()
        future.set_exception(value) if bytes(kind) == b"raised" else future.set_result(value)

    def _said(self) -> str:
        """The end of the worker's output."""
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - LAST_CHARACTERS))
        return " ".join(self._output.read().decode("utf-8", "replace").split())


def _reason(status: int, said: str) -> str:
    if status == UNKNOWN:
        return f"it ended, and so had the process that started it; it said: {said}" if said else "it ended"
    code = os.waitstatus_to_exitcode(status)
    how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    return f"{how}; it said: {said}" if said else how


def open(cfg: ClusterConfig) -> None:
    """Starts to load what workers need; returns at once."""
    _forker.start()


def start(name: str, kind: str, arguments: tuple[Any, ...]) -> ProcessActor:
    """Starts a worker on this machine; see `actors.Start`."""
    return ProcessActor(name, kind, arguments)
