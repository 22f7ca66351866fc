"""Linux system calls that the standard library lacks, via ctypes; every function raises OSError on failure."""

from __future__ import annotations

import ctypes
import os
import platform

MACHINE = platform.machine()
"""`x86_64` or `aarch64`, the two architectures with known system call numbers."""

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 28, 38
SECCOMP_MODE_FILTER = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PIVOT_ROOT, CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(MACHINE, (-1, -1))
MOUNT_SETATTR, LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 442, 444, 445, 446
CAPABILITY_VERSION = 0x20080522
LOCKED_NOROOT = 0b100011  # NOROOT, locked, and KEEP_CAPS locked off

_libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """Returns `result`, or raises an OSError from errno that names the call."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *args: object, what: str) -> int:
    """Makes a system call by number. Integers are passed as long."""
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return checked(_libc.syscall(ctypes.c_long(number), *longs), what)


def prctl(option: int, *args: object) -> None:
    longs = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    longs += [ctypes.c_ulong(0)] * (4 - len(longs))
    checked(_libc.prctl(option, *longs), f"prctl {option}")


def unshare(flags: int) -> None:
    checked(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    checked(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    checked(result, f"mount {target}")


def unmount(target: str) -> None:
    checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    syscall(PIVOT_ROOT, new.encode(), old.encode(), what="pivot_root")


def make_read_only(target: str, recursive: bool) -> None:
    """Makes a mount read-only and nosuid, with `recursive` also every mount below it (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)  # same flag values as in mount()
    syscall(
        MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE if recursive else 0, attributes,
        ctypes.sizeof(attributes), what=f"mount_setattr {target}",
    )  # fmt: skip


def drop_capabilities() -> None:
    """Drops all permitted, effective and inheritable capabilities of this thread."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    syscall(CAPSET, header, (ctypes.c_uint32 * 6)(), what="capset")


def never_gain() -> None:
    """Sets no_new_privs: this process and its children can no longer gain privileges."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Empties the capability bounding set and removes the special role of user 0; needs CAP_SETPCAP."""
    capability = 0
    while True:
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # EINVAL beyond the last capability of this kernel
            if capability == 0:
                raise
            break
        capability += 1
    prctl(PR_SET_SECUREBITS, LOCKED_NOROOT)
