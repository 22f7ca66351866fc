"""The namespaces tier: a root file system with only Python, no network, and a new pid namespace per execution.

A zygote calls `enter` once, and `fork` and `seal` for every execution. Each step raises OSError on failure, and then
nothing is executed. No step needs privileges on the host: inside a new user namespace the kernel grants the necessary
capabilities, which apply to nothing outside. There is no /proc, /sys, /etc or home; mounting /proc is not allowed in
most containers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from posttrain.rewards.sandbox import kernel

INSIDE = 65534
"""User and group id of an execution, seen from inside."""
OUTSIDE = 2_000_000_000
"""The same ids seen from outside if root starts the zygote; for other users they are the user's own ids."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/usr/share/zoneinfo")
OLD = "/.old"
SPACES = (
    kernel.NEWUSER | kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
)


def python_folders() -> list[str]:
    """Existing folders that Python reads, without nested ones: its own and those of the system's shared libraries."""
    folders: list[str] = []
    for path in sorted({sys.base_prefix, sys.base_exec_prefix, *LIBRARIES}):
        if os.path.isdir(path) and not any(path.startswith(f"{other}/") for other in folders):
            folders.append(path)
    return folders


def enter(folders: Sequence[str]) -> int:
    """Moves into new namespaces with a new root; returns, in a new process, a file descriptor of its pid namespace.

    The calling process stays outside as the parent of the new one, and exits when the new one does.
    """
    ask, answer = _start_mapper(os.getpid())
    user, group = os.geteuid(), os.getegid()  # unknown once inside
    kernel.unshare(SPACES)
    _map_users(ask, answer, user, group)
    child = os.fork()
    if child:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, int(signal.SIGKILL))
    processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    _new_root([(folder, os.path.realpath(folder)) for folder in folders])
    with suppress(PermissionError):  # groups cannot be changed if only the user's own id is mapped
        os.setgroups([])
    kernel.drop_bounding_set()
    return processes


def fork(processes: int) -> int:
    """os.fork with the child as init of a new pid namespace: when it exits, all other processes there are killed."""
    kernel.unshare(kernel.NEWPID)
    try:
        child = os.fork()
    except OSError:
        kernel.setns(processes, kernel.NEWPID)
        raise
    if child:
        kernel.setns(processes, kernel.NEWPID)
    return child


def seal(scratch: int, files: int) -> None:
    """In the execution: mounts an empty /tmp limited to `scratch` bytes and `files` files, and drops to user INSIDE."""
    kernel.unshare(kernel.NEWNS)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"size={scratch},nr_inodes={files},mode=1777")
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)


def _start_mapper(pid: int) -> tuple[int, int]:
    """Starts a process outside that maps two users for `pid` when asked via the first fd, and replies on the second.

    Only root may map a user id other than its own, and only from outside.
    """
    question, ask = os.pipe()
    answer, reply = os.pipe()
    if os.fork() == 0:
        os.read(question, 1)
        try:
            _write(f"/proc/{pid}/uid_map", f"0 {os.geteuid()} 1\n{INSIDE} {OUTSIDE} 1\n")
            _write(f"/proc/{pid}/gid_map", f"0 {os.getegid()} 1\n{INSIDE} {OUTSIDE} 1\n")
            os.write(reply, b"y")
        except OSError:
            os.write(reply, b"n")
        os._exit(0)
    os.close(question)
    os.close(reply)
    return ask, answer


def _map_users(ask: int, answer: int, user: int, group: int) -> None:
    """Lets the mapper map root and another user; if that fails, maps only the own user."""
    os.write(ask, b"?")
    mapped = os.read(answer, 1) == b"y"
    os.close(ask)
    os.close(answer)
    os.wait()
    if not mapped:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{INSIDE} {user} 1\n")
        _write("/proc/self/gid_map", f"{INSIDE} {group} 1\n")


def _new_root(folders: Sequence[tuple[str, str]]) -> None:
    """Replaces the root by a read-only one with the given folders (path, resolved path) and three devices."""
    os.umask(0o022)
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    base = next(path for path in ("/tmp", "/mnt", "/var", "/usr") if os.path.isdir(path))
    kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=1024,mode=755")
    os.mkdir(base + OLD)
    kernel.pivot_root(base, base + OLD)
    os.chdir("/")
    for folder, real in folders:
        if not os.path.lexists(real):
            os.makedirs(real)
            kernel.mount(OLD + real, real, flags=kernel.MS_BIND | kernel.MS_REC)
            kernel.make_read_only(real, recursive=True)
        if not os.path.lexists(folder):
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            os.symlink(real, folder)
    os.mkdir("/dev")
    for device in DEVICES:
        os.close(os.open(device, os.O_CREAT | os.O_RDONLY, 0o600))
        kernel.mount(OLD + device, device, flags=kernel.MS_BIND)
    os.mkdir("/tmp")
    kernel.unmount(OLD)
    os.rmdir(OLD)
    kernel.make_read_only("/", recursive=False)


def _write(path: str, text: str) -> None:
    """Writes a file in a single write call, as files in /proc require."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
