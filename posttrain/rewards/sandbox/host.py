"""The trusted side: starts zygotes, hands them orders, and reads what comes back, never more than a bounded amount.

What a candidate does ends in a Report, whatever it is. What goes wrong around it is `Lost`, and nothing that an
execution does after it has begun is that: see `Sandbox.attempt`.
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
"""`killed`: it was running when this side ended it."""
Tier = Literal["namespaces", "landlock", "none"]
PACKAGES = str(Path(__file__).resolve().parents[3])
BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from posttrain.rewards.sandbox import encode, zygote; import socket; "
    "sys.path.pop(); zygote.main(socket.socket(fileno=int(sys.argv[2])), encode.loads(bytes.fromhex(sys.argv[3])))"
)
# -I would have Python ignore PYTHONHASHSEED; with an environment of our own -P, -s and -S leave out as much.
PYTHON = (sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", BOOT, PACKAGES)
GRACE = 20.0
"""Seconds past every limit after which a zygote that has not reported is taken for lost."""
MESSAGE = 1 << 24
"""Longest frame that is read from an execution."""


@dataclass(frozen=True)
class Limits:
    """What one execution may use. `seconds` of the clock run from when it is sealed; sizes are bytes."""

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
    """How an execution ended, and what it wrote."""

    how: How
    code: int
    seconds: float
    stdout: bytes
    stderr: bytes


class Lost(Exception):
    """An execution that never ended because its surroundings failed. `began`: the candidate was already running."""

    def __init__(self, why: str, began: bool = False) -> None:
        super().__init__(why)
        self.began = began


class Zygote:
    """One locked-in Python, one execution at a time. Raises Lost where it cannot be started."""

    def __init__(self, tier: Tier, limits: Limits, group: cgroups.Group | None) -> None:
        self.tier: Tier = tier
        self.limits, self.group = limits, group
        self.scratch = "/tmp" if tier == "namespaces" else tempfile.mkdtemp(prefix="posttrain-sandbox-")
        settings = asdict(limits) | {
            "tier": tier,
            "folders": jail.python_folders(),
            "scratch": self.scratch,
            "cgroups": group.doors if group else [],
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
            tag, why = self.hear()
            if tag != b"Z":
                raise Lost(f"its zygote could not lock itself in: {why}")
        except Lost:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise Lost(f"its zygote cannot be started: {error}") from None

    def hear(self) -> tuple[bytes, Any]:
        """The next frame from the zygote, which is trusted."""
        try:
            head = self._exactly(4)
            body = self._exactly(struct.unpack(">I", head)[0])
        except OSError as error:
            raise Lost(f"its zygote does not answer ({error})") from None
        return body[:1], encode.loads(body[1:])

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.control.recv(count - len(data))
            if not piece:
                raise ConnectionError(f"it ended with code {self._code()}")
            data += piece
        return bytes(data)

    def _code(self) -> int | None:
        if self.process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        return self.process.returncode

    def start(self, order: Mapping[str, Any], stdin: bytes, seconds: float, processes: bool) -> Execution:
        """Begins an execution. `processes` allows it to fork, in the namespaces tier alone."""
        self._empty_scratch()
        return Execution(self, order, stdin, seconds, processes and self.tier == "namespaces")

    def _empty_scratch(self) -> None:
        """Without a mount of its own an execution's files stay behind; nothing but plain files can."""
        if self.tier == "namespaces":
            return
        try:
            for entry in os.scandir(self.scratch):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
        except OSError as error:
            raise Lost(f"the last execution's files cannot be removed: {error}") from None

    def close(self) -> None:
        """Ends the zygote and whatever runs in it."""
        self.control.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.group is not None:
            self.group.close()
        if self.tier != "namespaces":
            shutil.rmtree(self.scratch, ignore_errors=True)


class Execution:
    """One execution under way: frames to and from it, and at the end its Report."""

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
            raise Lost(f"its zygote does not listen ({error})") from None
        finally:
            for fd in theirs:
                os.close(fd)
        self.channel.setblocking(False)
        self.listening = True  # it has not closed its end of the channel
        self.poller = select.poll()
        for fd in (zygote.control.fileno(), out, err, self.channel.fileno()):
            self.poller.register(fd, select.POLLIN)

    def frame(self) -> bytes | None:
        """The next frame that the execution has sent, or None when it has ended without one."""
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
        """Sends a frame; False where the execution has ended before it could be taken."""
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
        """Sends a frame and reads the next one. None where it has ended, or takes no more; its report is then in."""
        if self.send(content):
            return self.frame()
        self.kill()  # what did not listen has mostly ended, and the word of it is on the way
        return None

    def kill(self, flooded: bool = False) -> Report:
        """Ends the execution, if it has not ended, and waits for its report."""
        if self.report is None:
            self._end(flooded)
        return self.wait()

    def _end(self, flooded: bool) -> None:
        """Asks the zygote to end it; its report is still to come."""
        self.flooded |= flooded
        self.asked_to_end = True
        with suppress(OSError):
            self.zygote.control.send(b"K")

    def wait(self) -> Report:
        """Its report, once it has ended."""
        while self.report is None:
            self._pump()
        return self.report

    def _pump(self) -> None:
        """Takes in what has arrived; waits for something to."""
        left = self.give_up - time.monotonic()
        found = self.poller.poll(max(0.0, left) * 1000)
        if not found and left <= 0:
            self._close()
            raise Lost("its zygote has not reported in time", self.began)
        for fd, event in found:
            if fd in self.written:
                self._take(fd)
            elif fd == self.channel.fileno() and event & ~select.POLLOUT:
                self._take_frames()
        if any(fd == self.zygote.control.fileno() for fd, _ in found):
            self._take_word()

    def _take(self, fd: int) -> None:
        piece = os.read(fd, 1 << 16)
        if not piece:
            self.poller.unregister(fd)
        elif sum(map(len, self.written.values())) + len(piece) <= self.zygote.limits.output:
            self.written[fd] += piece
        elif not self.flooded:
            self._end(flooded=True)

    def _take_frames(self) -> None:
        try:
            piece = self.channel.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self.inbox += piece
        self.began |= bool(piece)  # only a candidate that runs sends frames; the zygote's word may come after them
        full = len(self.inbox) > MESSAGE + 4
        if full or not piece:
            self.listening = False
            self.poller.unregister(self.channel)
        if full:
            self._end(flooded=True)

    def _take_word(self) -> None:
        """A frame of the zygote: the execution has begun, or has ended."""
        try:
            tag, value = self.zygote.hear()
        except Lost as lost:
            self._close()
            raise Lost(str(lost), self.began) from None
        if tag == b"R":
            self.began = True
            return
        ready, code, late, seconds, reason = value
        self._take_rest()
        self._close()
        if not ready:
            raise Lost(reason or ("it was not sealed in time" if late else f"it ended early with code {code}"))
        how: How = "crashed" if code < 0 else "exited"
        if self.asked_to_end and code == -signal.SIGKILL:
            how = "killed"
        if self.zygote.group and self.zygote.group.killed() > self.killed_before:
            how = "oom"
        how = "flood" if self.flooded else "timeout" if late else how
        self.report = Report(how, code, seconds, bytes(self.written[self.out]), bytes(self.written[self.err]))

    def _take_rest(self) -> None:
        """What is still in the pipes; without waiting, because another process may hold them open."""
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
    """A file that is only in memory, at its beginning."""
    fd = os.memfd_create("posttrain")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def tasks_of_this_user() -> int:
    """Threads that this user's processes have now."""
    count = 0
    for status in Path("/proc").glob("[0-9]*/task"):
        with suppress(OSError):
            if status.stat().st_uid == os.getuid():
                count += len(os.listdir(status))
    return count
