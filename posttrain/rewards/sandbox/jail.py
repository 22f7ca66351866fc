"""The namespaces tier: a root with nothing in it but Python, no network, and for each execution its own processes.

`enter` is called once by a zygote, `fork` and `seal` for every execution. Each step raises OSError, and nothing runs
after one that failed. No step needs a privilege of the host: inside a new user namespace the kernel grants what is
needed, over nothing that is outside of it. There is no /proc, /sys, /etc or home; mounting /proc is what fails in most
containers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from posttrain.rewards.sandbox import kernel

INSIDE = 65534
"""User and group that an execution has, seen from inside."""
OUTSIDE = 2_000_000_000
"""The same seen from outside where root starts the zygote; for anybody else it is the own user."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/usr/share/zoneinfo")
OLD = "/.old"
SPACES = (
    kernel.NEWUSER | kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
)


def python_folders() -> list[str]:
    """Existing folders that an interpreter reads, none inside another: its own, and the system's shared libraries."""
    found: list[str] = []
    for path in sorted({sys.base_prefix, sys.base_exec_prefix, *LIBRARIES}):
        if os.path.isdir(path) and not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def enter(folders: Sequence[str]) -> int:
    """Moves into new namespaces with a root of their own; returns, in a new process, an fd of its pid namespace.

    The calling process stays behind as the parent of the new one, and ends when that does.
    """
    ask, answer = _mapper(os.getpid())
    user, group = os.geteuid(), os.getegid()  # inside they are not known any more
    kernel.unshare(SPACES)
    _take_users(ask, answer, user, group)
    child = os.fork()
    if child:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, int(signal.SIGKILL))
    processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    _new_root([(folder, os.path.realpath(folder)) for folder in folders])
    with suppress(PermissionError):  # where only one's own user is mapped, groups cannot be changed
        os.setgroups([])
    kernel.drop_bounding_set()
    return processes


def fork(processes: int) -> int:
    """os.fork with the child as the first process of a new pid namespace: when it ends, all in there are killed."""
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
    """In the execution: an empty /tmp of at most `scratch` bytes and `files` files, and the powerless user."""
    kernel.unshare(kernel.NEWNS)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"size={scratch},nr_inodes={files},mode=1777")
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)


def _mapper(pid: int) -> tuple[int, int]:
    """Starts a process that stays outside; asked through the first fd, it maps two users for `pid` and answers.

    Only root may map a user that is not its own, and only from outside.
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


def _take_users(ask: int, answer: int, user: int, group: int) -> None:
    """Lets the mapper map root and another user, or else maps one's own user alone."""
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
    """Makes a read-only root of folders, given with what they resolve to, and three devices; the old one is gone."""
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
    """One write, as these files ask for."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
