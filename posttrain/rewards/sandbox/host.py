"""Host side of the sandbox: starts zygotes, sends them orders, and reads a bounded amount of output.

Whatever a candidate does ends in a Report. A failure of the sandbox itself raises `Lost`; a candidate must not be able
to profit from causing one: see `Sandbox.attempt`.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.rewards.sandbox import cgroups, encode, jail

How = Literal["exited", "timeout", "flood", "oom", "crashed", "killed"]
"""`killed` means that the host ended it while it was running."""
Tier = Literal["namespaces", "landlock", "none"]
PACKAGES = str(Path(__file__).resolve().parents[3])
BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from posttrain.rewards.sandbox import encode, zygote; import socket; "
    "sys.path.pop(); zygote.main(socket.socket(fileno=int(sys.argv[2])), encode.loads(bytes.fromhex(sys.argv[3])))"
)
# -I would make Python ignore PYTHONHASHSEED; with a clean environment, -P, -s and -S isolate it just as much.
PYTHON = (sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", BOOT, PACKAGES)
GRACE = 20.0
"""Seconds beyond all limits after which a zygote without a report counts as lost."""
MESSAGE = 1 << 24
"""Maximum length of a frame from an execution."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of one execution. `seconds` are wall-clock time once it is sealed; sizes are in bytes."""

    seconds: float = 5.0
    seconds_to_start: float = 20.0
    memory: int = 512 << 20
    output: int = 4 << 20
    scratch_bytes: int = 32 << 20
    scratch_files: int = 1024
    file_bytes: int = 16 << 20
    files: int = 64
    tasks: int = 64


@dataclass(frozen=True)
class Report:
    """How an execution ended, and its output."""

    how: How
    code: int
    seconds: float
    stdout: bytes
    stderr: bytes


class Lost(Exception):
    """The sandbox failed around an execution. `began`: the candidate was already running."""

    def __init__(self, reason: str, began: bool = False) -> None:
        super().__init__(reason)
        self.began = began


class Zygote:
    """One isolated Python process, which runs one execution at a time. Raises Lost if it cannot be started."""

    def __init__(self, tier: Tier, limits: Limits, group: cgroups.Group | None) -> None:
        self.tier: Tier = tier
        self.limits, self.group = limits, group
        self.scratch = "/tmp" if tier == "namespaces" else tempfile.mkdtemp(prefix="posttrain-sandbox-")
        settings = asdict(limits) | {
            "tier": tier,
            "folders": jail.python_folders(),
            "scratch": self.scratch,
            "cgroups": group.procs_files if group else [],
            "tasks": limits.tasks if tier == "namespaces" else limits.tasks + 1024 + tasks_of_this_user(),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.control, theirs = socket.socketpair()
        self.control.settimeout(limits.seconds_to_start + GRACE)
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [*PYTHON, str(theirs.fileno()), encode.dumps(settings).hex()],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1", "LANG": "C.UTF-8"},
                    start_new_session=True,
                )
            tag, reason = self.receive()
            if tag != b"Z":
                raise Lost(f"its zygote could not isolate itself: {reason}")
        except Lost:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise Lost(f"its zygote could not be started: {error}") from None

    def receive(self) -> tuple[bytes, Any]:
        """The next frame from the zygote, which is trusted."""
        try:
            head = self._read_exactly(4)
            body = self._read_exactly(struct.unpack(">I", head)[0])
        except OSError as error:
            raise Lost(f"its zygote does not respond ({error})") from None
        return body[:1], encode.loads(body[1:])

    def _read_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.control.recv(count - len(data))
            if not piece:
                raise ConnectionError(f"it exited with code {self._exit_code()}")
            data += piece
        return bytes(data)

    def _exit_code(self) -> int | None:
        if self.process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        return self.process.returncode

    def start(self, order: Mapping[str, Any], stdin: bytes, seconds: float, processes: bool) -> Execution:
        """Starts an execution. `processes` allows it to fork, in the namespaces tier only."""
        self._empty_scratch()
        return Execution(self, order, stdin, seconds, processes and self.tier == "namespaces")

    def _empty_scratch(self) -> None:
        """Removes the files of the last execution; with namespaces each has its own mount, so none are left."""
        if self.tier == "namespaces":
            return
        try:
            for entry in os.scandir(self.scratch):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
        except OSError as error:
            raise Lost(f"the last execution's files could not be removed: {error}") from None

    def close(self) -> None:
        """Kills the zygote and whatever runs in it."""
        self.control.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.group is not None:
            self.group.close()
        if self.tier != "namespaces":
            shutil.rmtree(self.scratch, ignore_errors=True)


class Execution:
    """A running execution: exchanges frames with it and produces its Report."""

    def __init__(self, zygote: Zygote, order: Mapping[str, Any], stdin: bytes, seconds: float, processes: bool) -> None:
        self.zygote, self.began, self.flooded, self.asked_to_end = zygote, False, False, False
        self.report: Report | None = None
        self.inbox = bytearray()
        self.killed_before = zygote.group.killed() if zygote.group else 0
        self.give_up = time.monotonic() + zygote.limits.seconds_to_start + seconds + GRACE
        out, out_theirs = os.pipe()
        err, err_theirs = os.pipe()
        self.channel, channel_theirs = socket.socketpair()
        theirs = [memory_file(stdin), out_theirs, err_theirs, channel_theirs.detach(), memory_file(encode.dumps(order))]
        self.written = {out: bytearray(), err: bytearray()}
        self.out, self.err = out, err
        limits = encode.dumps({"seconds": float(seconds), "processes": processes})
        try:
            socket.send_fds(zygote.control, [b"J" + struct.pack(">I", len(limits)) + limits], theirs)
        except OSError as error:
            self._close()
            raise Lost(f"its zygote does not accept orders ({error})") from None
        finally:
            for fd in theirs:
                os.close(fd)
        self.channel.setblocking(False)
        self.listening = True  # until it closes its end of the channel
        self.poller = select.poll()
        for fd in (zygote.control.fileno(), out, err, self.channel.fileno()):
            self.poller.register(fd, select.POLLIN)

    def frame(self) -> bytes | None:
        """The next frame from the execution, or None if it ended without sending one."""
        while True:
            if len(self.inbox) >= 4:
                size = struct.unpack_from(">I", self.inbox)[0]
                if size > MESSAGE:
                    self.kill(flooded=True)
                    return None
                if len(self.inbox) >= 4 + size:
                    content = bytes(self.inbox[4 : 4 + size])
                    del self.inbox[: 4 + size]
                    return content
            if self.report is not None:
                return None
            self._pump()

    def send(self, content: bytes) -> bool:
        """Sends a frame; False if the execution ended before reading it."""
        rest = memoryview(struct.pack(">I", len(content)) + content)
        while rest and self.listening:
            try:
                rest = rest[self.channel.send(rest) :]
            except BlockingIOError:
                self.poller.modify(self.channel, select.POLLIN | select.POLLOUT)
                self._pump()
                if self.listening:
                    self.poller.modify(self.channel, select.POLLIN)
            except OSError:
                return False
        return not rest

    def ask(self, content: bytes) -> bytes | None:
        """Sends a frame and returns the next one; None if the execution has ended or stopped reading.

        In that case its report is available.
        """
        if self.send(content):
            return self.frame()
        self.kill()  # an execution that stopped reading has usually ended, and its report is on the way
        return None

    def kill(self, flooded: bool = False) -> Report:
        """Kills the execution unless it has ended, and waits for its report."""
        if self.report is None:
            self._request_kill(flooded)
        return self.wait()

    def _request_kill(self, flooded: bool) -> None:
        """Asks the zygote to kill the execution, without waiting for its report."""
        self.flooded |= flooded
        self.asked_to_end = True
        with suppress(OSError):
            self.zygote.control.send(b"K")

    def wait(self) -> Report:
        """Waits until the execution has ended and returns its report."""
        while self.report is None:
            self._pump()
        return self.report

    def _pump(self) -> None:
        """Waits for data and reads it."""
        left = self.give_up - time.monotonic()
        events = self.poller.poll(max(0.0, left) * 1000)
        if not events and left <= 0:
            self._close()
            raise Lost("its zygote did not report in time", self.began)
        for fd, event in events:
            if fd in self.written:
                self._read_output(fd)
            elif fd == self.channel.fileno() and event & ~select.POLLOUT:
                self._read_channel()
        if any(fd == self.zygote.control.fileno() for fd, _ in events):
            self._read_control()

    def _read_output(self, fd: int) -> None:
        piece = os.read(fd, 1 << 16)
        if not piece:
            self.poller.unregister(fd)
        elif sum(map(len, self.written.values())) + len(piece) <= self.zygote.limits.output:
            self.written[fd] += piece
        elif not self.flooded:
            self._request_kill(flooded=True)

    def _read_channel(self) -> None:
        try:
            piece = self.channel.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self.inbox += piece
        self.began |= bool(piece)  # only a running candidate sends frames; the zygote's message may arrive later
        full = len(self.inbox) > MESSAGE + 4
        if full or not piece:
            self.listening = False
            self.poller.unregister(self.channel)
        if full:
            self._request_kill(flooded=True)

    def _read_control(self) -> None:
        """Reads a frame from the zygote: the execution has begun, or has ended."""
        try:
            tag, value = self.zygote.receive()
        except Lost as lost:
            self._close()
            raise Lost(str(lost), self.began) from None
        if tag == b"R":
            self.began = True
            return
        ready, code, late, seconds, reason = value
        self._read_rest()
        self._close()
        if not ready:
            raise Lost(reason or ("it was not sealed in time" if late else f"it exited early with code {code}"))
        how: How = "crashed" if code < 0 else "exited"
        if self.asked_to_end and code == -signal.SIGKILL:
            how = "killed"
        if self.zygote.group and self.zygote.group.killed() > self.killed_before:
            how = "oom"
        how = "flood" if self.flooded else "timeout" if late else how
        self.report = Report(how, code, seconds, bytes(self.written[self.out]), bytes(self.written[self.err]))

    def _read_rest(self) -> None:
        """Reads what is left in the pipes without blocking, because another process may hold them open."""
        for fd in self.written:
            os.set_blocking(fd, False)
            with suppress(BlockingIOError):
                while (piece := os.read(fd, 1 << 16)) and not self.flooded:
                    self.flooded |= sum(map(len, self.written.values())) + len(piece) > self.zygote.limits.output
                    self.written[fd] += piece
        with suppress(OSError):
            while (piece := self.channel.recv(1 << 16)) and len(self.inbox) <= MESSAGE:
                self.inbox += piece

    def _close(self) -> None:
        self.listening = False
        for fd in self.written:
            os.close(fd)
        self.channel.close()


def memory_file(content: bytes) -> int:
    """An in-memory file with this content, positioned at its start."""
    fd = os.memfd_create("posttrain")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def tasks_of_this_user() -> int:
    """Current number of threads of this user's processes."""
    count = 0
    for status in Path("/proc").glob("[0-9]*/task"):
        with suppress(OSError):
            if status.stat().st_uid == os.getuid():
                count += len(os.listdir(status))
    return count
