"""Zygote: a Python process that preloads modules, isolates itself, and forks once per execution.

It is started by exec, never by forking the trainer, whose memory holds tokens and answers. It monitors each execution:
the candidate's time limit starts with the byte that the execution writes to the status pipe once it is sealed; that
pipe is then closed.

It sends frames to the host: `Z` isolated, or `F` failed with the reason; for each order `R` sealed and running, then
`X` with a report. The host sends `J` with limits and files, and `K` to kill the current execution. The code to execute
is in one of the files, which only the fork reads, so that no candidate's code is in memory inherited by the next one.
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
"""Modules that programs often import, preloaded to save time in each execution."""
STATUS = 4


def main(control: socket.socket, settings: dict[str, Any]) -> None:
    """Isolates the process as given by `settings` and serves orders until the host closes the socket."""
    try:
        for name in LOADED:
            import_module(name)
        for path in settings["cgroups"]:  # joining is slow, so it is done once for all executions
            with open(path, "w") as procs:
                procs.write("0")
        for processes in (False, True):
            seccomp.compiled(processes)
        spaces = _isolate(settings)
        gc.collect()
        gc.freeze()
    except Exception as error:
        _send(control, b"F", getattr(error, "strerror", None) or str(error))
        return
    _send(control, b"Z", None)
    while (received := _next_order(control)) is not None:
        limits, fds = received
        _execute(control, settings | limits, fds, spaces)
        for fd in fds:
            os.close(fd)


def _isolate(settings: Mapping[str, Any]) -> int:
    """Isolation done once for all executions; returns an fd of the pid namespace, or -1 without namespaces."""
    if settings["tier"] == "namespaces":
        spaces = jail.enter(settings["folders"])
        kernel.never_gain()
        return spaces
    if settings["tier"] == "landlock":
        kernel.never_gain()
        landlock.restrict(settings["folders"], jail.DEVICES, settings["scratch"])
    return -1


def _next_order(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next order's limits and files. A late `K`, for an execution that has already ended, is ignored."""
    while True:
        tag, fds, _, _ = socket.recv_fds(control, 1, 5)
        if not tag:
            return None
        if tag == b"J":
            head = _read_exactly(control, 4)
            body = _read_exactly(control, struct.unpack(">I", head)[0]) if head else b""
            return (encode.loads(body), fds) if body else None


def _read_exactly(control: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = control.recv(count - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)


def _send(control: socket.socket, tag: bytes, value: object) -> None:
    control.sendall(encode.frame(tag, encode.dumps(value)))


def _execute(control: socket.socket, limits: Mapping[str, Any], fds: list[int], spaces: int) -> None:
    """Runs one execution from fork to report."""
    status_read, status_write = os.pipe()
    try:
        child = jail.fork(spaces) if spaces >= 0 else os.fork()
        if child == 0:
            _become_candidate(limits, [*fds[:4], status_write], fds[4])
        report = _watch(control, child, status_read, limits)
    except OSError as error:
        report = [False, 0, False, 0.0, str(error)]
    finally:
        os.close(status_read)
        os.close(status_write)
    _send(control, b"X", report)


def _watch(control: socket.socket, child: int, status: int, limits: Mapping[str, Any]) -> list[Any]:
    """Waits for an execution, kills it on timeout or at the host's request, and returns the fields of its report."""
    ended = os.pidfd_open(child)
    os.set_blocking(status, False)
    poller = select.poll()
    for fd in (ended, status, control.fileno()):
        poller.register(fd, select.POLLIN)
    ready, late, reason, start = False, False, "", time.monotonic()
    deadline: float | None = start + limits["seconds_to_start"]
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        readable = {fd for fd, _ in poller.poll(left)}
        if status in readable:
            message = os.read(status, 1000)
            if message == b"R":
                ready, start = True, time.monotonic()
                deadline = start + limits["seconds"]
                _send(control, b"R", None)
            else:
                reason = message.decode("utf-8", "replace") or reason
            poller.unregister(status)
        if ended in readable:
            break
        if control.fileno() in readable or not readable:
            late, deadline = not readable, None
            poller.unregister(control.fileno())
            os.kill(child, signal.SIGKILL)
    seconds = time.monotonic() - start
    if limits["tier"] == "none":  # kill leftover processes; in a pid namespace the kernel does that
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [ready, code, late, seconds, reason]


def _become_candidate(limits: Mapping[str, Any], fds: list[int], order: int) -> NoReturn:
    """In the fork: reads its order, drops all privileges, reports that on the status pipe, and runs the order."""
    code, status = 1, fds[STATUS]
    try:
        os.setsid()
        with open(order, "rb") as file:
            parsed_order = encode.loads(file.read())
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in fds]
        status = moved[STATUS]
        if limits["tier"] == "namespaces":
            jail.seal(limits["scratch_bytes"], limits["scratch_files"])
        for number, fd in enumerate(moved):
            os.dup2(fd, number, inheritable=False)
        status = STATUS
        os.closerange(STATUS + 1, os.sysconf("SC_OPEN_MAX"))
        kernel.prctl(kernel.PR_SET_PDEATHSIG, int(signal.SIGKILL))
        _reset_interpreter(limits["scratch"])
        _set_limits(limits)
        if limits["tier"] != "none":
            kernel.drop_capabilities()
            seccomp.install(limits["processes"])
        os.write(STATUS, b"R")
        os.close(STATUS)
    except BaseException as error:
        os.write(status, f"{type(error).__name__}: {error}".encode()[:900])
        os._exit(1)
    try:
        code = inside.run(parsed_order)
    finally:
        os._exit(code)


def _reset_interpreter(scratch: str) -> None:
    """Resets standard streams, loaded modules and random state to those of a freshly started Python."""
    for name in [name for name in sys.modules if name.startswith("posttrain")]:
        del sys.modules[name]
    sys.argv, sys.orig_argv = [""], [""]
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ["HOME"] = os.environ["TMPDIR"] = scratch
    os.chdir(scratch)
    random.seed(0)


def _set_limits(limits: Mapping[str, Any]) -> None:
    """Sets the kernel's hard limits for this process."""
    for kind, maximum in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, 4 * int(limits["seconds"]) + 4),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_NPROC, limits["tasks"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        maximum = maximum if hard == resource.RLIM_INFINITY else min(maximum, hard)
        resource.setrlimit(kind, (maximum, maximum))
