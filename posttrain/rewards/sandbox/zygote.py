"""A Python that has everything loaded, locks itself in, and forks once for every execution.

It is started by exec, never by fork of the trainer, whose memory holds tokens and answers. It watches each execution:
the candidate's time runs from the byte that the execution writes when it is sealed, on a pipe that is then closed.

To the host it sends frames: `Z` locked in, `F` cannot, with the reason; for each order `R` sealed and running, then `X`
with a report. The host sends `J` with limits and files, and `K` to end the execution under way. What is to be executed
is in one of the files, which only the fork reads: nothing of one candidate is in the memory that the next one gets.
"""

from __future__ import annotations

import fcntl
import gc
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from posttrain.rewards.sandbox import encode, inside, jail, kernel, landlock, seccomp

LOADED = (
    "abc array base64 bisect calendar cmath collections contextlib copy ctypes dataclasses datetime decimal enum "
    "fractions functools hashlib heapq itertools json math numbers operator queue random re statistics string struct "
    "tempfile textwrap threading time traceback types typing unicodedata zlib"
).split()
"""Modules that programs often import; loading them once here saves each execution their time."""
STATUS = 4


def main(control: socket.socket, settings: dict[str, Any]) -> None:
    """Locks in as `settings` say and serves orders until the host is gone."""
    try:
        for name in LOADED:
            import_module(name)
        for path in settings["cgroups"]:  # joining is slow, so it is done once, for every execution to come
            with open(path, "w") as door:
                door.write("0")
        for processes in (False, True):
            seccomp.compiled(processes)
        spaces = _lock_in(settings)
        gc.collect()
        gc.freeze()
    except Exception as error:
        _tell(control, b"F", getattr(error, "strerror", None) or str(error))
        return
    _tell(control, b"Z", None)
    while (received := _next_order(control)) is not None:
        limits, fds = received
        _execute(control, settings | limits, fds, spaces)
        for fd in fds:
            os.close(fd)


def _lock_in(settings: Mapping[str, Any]) -> int:
    """What is done once for all executions; an fd of the process namespace, -1 without."""
    if settings["tier"] == "namespaces":
        spaces = jail.enter(settings["folders"])
        kernel.never_gain()
        return spaces
    if settings["tier"] == "landlock":
        kernel.never_gain()
        landlock.restrict(settings["folders"], jail.DEVICES, settings["scratch"])
    return -1


def _next_order(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """An order's limits and its files. A late `K` is for an execution that has ended, and is passed over."""
    while True:
        tag, fds, _, _ = socket.recv_fds(control, 1, 5)
        if not tag:
            return None
        if tag == b"J":
            head = _exactly(control, 4)
            body = _exactly(control, struct.unpack(">I", head)[0]) if head else b""
            return (encode.loads(body), fds) if body else None


def _exactly(control: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = control.recv(count - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)


def _tell(control: socket.socket, tag: bytes, value: object) -> None:
    control.sendall(encode.frame(tag, encode.dumps(value)))


def _execute(control: socket.socket, limits: Mapping[str, Any], fds: list[int], spaces: int) -> None:
    """One execution from fork to report."""
    hear, say = os.pipe()
    try:
        child = jail.fork(spaces) if spaces >= 0 else os.fork()
        if child == 0:
            _become_candidate(limits, [*fds[:4], say], fds[4])
        report = _watch(control, child, hear, limits)
    except OSError as error:
        report = [False, 0, False, 0.0, str(error)]
    finally:
        os.close(hear)
        os.close(say)
    _tell(control, b"X", report)


def _watch(control: socket.socket, child: int, hear: int, limits: Mapping[str, Any]) -> list[Any]:
    """Waits for an execution; ends it when its time is up or the host says so. The fields of its report."""
    ended = os.pidfd_open(child)
    os.set_blocking(hear, False)
    poller = select.poll()
    for fd in (ended, hear, control.fileno()):
        poller.register(fd, select.POLLIN)
    ready, late, reason, start = False, False, "", time.monotonic()
    deadline: float | None = start + limits["seconds_to_start"]
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        found = {fd for fd, _ in poller.poll(left)}
        if hear in found:
            said = os.read(hear, 1000)
            if said == b"R":
                ready, start = True, time.monotonic()
                deadline = start + limits["seconds"]
                _tell(control, b"R", None)
            else:
                reason = said.decode("utf-8", "replace") or reason
            poller.unregister(hear)
        if ended in found:
            break
        if control.fileno() in found or not found:
            late, deadline = not found, None
            poller.unregister(control.fileno())
            os.kill(child, signal.SIGKILL)
    seconds = time.monotonic() - start
    if limits["tier"] == "none":  # what it left behind; in a namespace the kernel has done that
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [ready, code, late, seconds, reason]


def _become_candidate(limits: Mapping[str, Any], fds: list[int], order: int) -> NoReturn:
    """In the fork: reads its order, gives up everything, says so on the status pipe, closes it, and then begins."""
    code, status = 1, fds[STATUS]
    try:
        os.setsid()
        with open(order, "rb") as file:
            wanted = encode.loads(file.read())
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in fds]
        status = moved[STATUS]
        if limits["tier"] == "namespaces":
            jail.seal(limits["scratch_bytes"], limits["scratch_files"])
        for number, fd in enumerate(moved):
            os.dup2(fd, number, inheritable=False)
        status = STATUS
        os.closerange(STATUS + 1, os.sysconf("SC_OPEN_MAX"))
        kernel.prctl(kernel.PR_SET_PDEATHSIG, int(signal.SIGKILL))
        _start_afresh(limits["scratch"])
        _limit(limits)
        if limits["tier"] != "none":
            kernel.drop_capabilities()
            seccomp.install(limits["processes"])
        os.write(STATUS, b"R")
        os.close(STATUS)
    except BaseException as error:
        os.write(status, f"{type(error).__name__}: {error}".encode()[:900])
        os._exit(1)
    try:
        code = inside.run(wanted)
    finally:
        os._exit(code)


def _start_afresh(scratch: str) -> None:
    """Standard files, module table and randomness as in a Python that has just been started."""
    for name in [name for name in sys.modules if name.startswith("posttrain")]:
        del sys.modules[name]
    sys.argv, sys.orig_argv = [""], [""]
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ["HOME"] = os.environ["TMPDIR"] = scratch
    os.chdir(scratch)
    random.seed(0)


def _limit(limits: Mapping[str, Any]) -> None:
    """Hard limits of the kernel on one process."""
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, 4 * int(limits["seconds"]) + 4),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_NPROC, limits["tasks"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
