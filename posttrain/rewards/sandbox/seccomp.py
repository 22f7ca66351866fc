"""The seccomp filter: a BPF program with the system calls that sandboxed code may make.

All other calls fail with EPERM, so an honest program sees PermissionError and can continue. Calls of another
architecture kill the process, because the same numbers mean other calls there. No allowed call reaches another process,
opens a socket, changes file permissions or starts a program; Landlock cannot forbid several of these.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Sequence
from functools import cache

from posttrain.rewards.sandbox import kernel

# name: (number on x86_64, number on aarch64); -1 if the architecture has no such call
_PLAIN = {
    "read": (0, 63), "write": (1, 64), "open": (2, -1), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80),
    "lstat": (6, -1), "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, -1), "pipe": (22, -1), "select": (23, -1), "sched_yield": (24, 124), "mremap": (25, 216),
    "msync": (26, 227), "mincore": (27, 232), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, -1),
    "pause": (34, -1), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, -1), "setitimer": (38, 103),
    "getpid": (39, 172), "sendfile": (40, 71), "recvfrom": (45, 207), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209), "exit": (60, 93),
    "uname": (63, 160), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46),
    "getdents": (78, -1), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, -1),
    "mkdir": (83, -1), "rmdir": (84, -1), "creat": (85, -1), "link": (86, -1), "unlink": (87, -1),
    "symlink": (88, -1), "readlink": (89, -1), "umask": (95, 166), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "getpgrp": (111, -1), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "statfs": (137, 43),
    "fstatfs": (138, 44), "gettid": (186, 178), "time": (201, -1), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "epoll_create": (213, -1), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "fadvise64": (221, 223),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "epoll_wait": (232, -1), "epoll_ctl": (233, 21), "openat": (257, 56), "mkdirat": (258, 34),
    "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "linkat": (265, 37),
    "symlinkat": (266, 36), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "epoll_pwait": (281, 22),
    "fallocate": (285, 47), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59),
    "preadv": (295, 69), "pwritev": (296, 70), "getcpu": (309, 168), "renameat2": (316, 276), "getrandom": (318, 278),
    "membarrier": (324, 283), "copy_file_range": (326, 285), "preadv2": (327, 286), "pwritev2": (328, 287),
    "statx": (332, 291), "rseq": (334, 293), "close_range": (436, 436), "faccessat2": (439, 439),
    "epoll_pwait2": (441, 441),
}  # fmt: skip
# Additional calls for programs that may fork: wait for and signal their own processes.
_PROCESSES = {
    "fork": (57, -1), "vfork": (58, -1), "wait4": (61, 260), "waitid": (247, 95), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "setsid": (112, 157),
}  # fmt: skip
_WITH_ARGUMENTS = {
    "ioctl": (16, 29), "sendto": (44, 206), "socketpair": (53, 199), "clone": (56, 220), "fcntl": (72, 25),
    "prctl": (157, 167), "prlimit64": (302, 261), "clone3": (435, 435),
}  # fmt: skip

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06

FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
"""Duplicating, flags and locks. Not F_SETOWN and F_SETSIG, with which a file can signal any process."""
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
PRCTL = (15, 16)
"""Setting and getting a thread's name."""
THREAD = 0x00010900  # CLONE_VM, CLONE_SIGHAND and CLONE_THREAD
NAMESPACES = 0x7E020080  # every CLONE_NEW…
STREAM, NONBLOCK_CLOEXEC = 1, 0x80800
AF_UNIX = 1

Instruction = tuple[int, int, int, int]


def numbers(processes: bool, machine: str = kernel.MACHINE) -> list[int]:
    """Numbers of the calls that are allowed with any arguments."""
    column = list(_ARCHITECTURE).index(machine)
    table = _PLAIN | _PROCESSES if processes else _PLAIN
    return sorted(row[column] for row in table.values() if row[column] >= 0)


def program(processes: bool, machine: str = kernel.MACHINE) -> list[Instruction]:
    """The filter as (code, jump if true, jump if false, constant). Raises OSError for an unknown architecture."""
    if machine not in _ARCHITECTURE:
        raise OSError(f"unsupported architecture {machine}; system calls are known for {', '.join(_ARCHITECTURE)}")
    column = list(_ARCHITECTURE).index(machine)
    out = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, _ARCHITECTURE[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":
        out += [(AT_LEAST, 0, 1, _X32), (RETURN, 0, 0, KILL)]
    for name, row in _WITH_ARGUMENTS.items():
        block = _argument_check(name, processes)
        out += [(EQUAL, 0, len(block), row[column]), *block]
    for first, last in _ranges(numbers(processes, machine)):
        out += [(AT_LEAST, 0, 2, first), (AT_LEAST, 1, 0, last + 1), (RETURN, 0, 0, ALLOW)]
    return [*out, _deny(errno.EPERM)]


@cache
def compiled(processes: bool) -> bytes:
    """The filter for this machine in the kernel's binary format."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program(processes))


def install(processes: bool) -> None:
    """Installs the filter in this process irrevocably; requires no_new_privs."""
    code = compiled(processes)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    kernel.prctl(kernel.PR_SET_SECCOMP, kernel.SECCOMP_MODE_FILTER, ctypes.c_char_p(header))


def _deny(number: int) -> Instruction:
    return (RETURN, 0, 0, ERRNO | number)


def _argument_check(name: str, processes: bool) -> list[Instruction]:
    """Instructions that check the arguments of one call; every path through them returns."""
    if name == "clone3":  # its flags are in memory, which a filter cannot read; libc falls back to clone
        return [_deny(errno.ENOSYS)]
    if name == "clone":
        mask, flags = (NAMESPACES, 0) if processes else (THREAD | NAMESPACES, THREAD)
        return [*_argument(0), (AND, 0, 0, mask), *_allow_if((flags,))]
    if name == "socketpair":  # asyncio needs it; datagram sockets could send to sockets outside
        kind = [*_argument(1), (AND, 0, 0, ~NONBLOCK_CLOEXEC & 0xFFFFFFFF), *_allow_if((STREAM,))]
        return [*_argument(0), (EQUAL, 1, 0, AF_UNIX), _deny(errno.EPERM), *kind]
    if name == "sendto":  # without an address, i.e. only to the other end of such a pair
        return [*_zero(4), *_allow()]
    if name == "prlimit64":  # only reading the process's own limits
        return [*_zero(0), *_zero(2), *_allow()]
    return [*_argument({"fcntl": 1, "ioctl": 1, "prctl": 0}[name]),
            *_allow_if({"fcntl": FCNTL, "ioctl": IOCTL, "prctl": PRCTL}[name])]  # fmt: skip


def _argument(index: int, high: bool = False) -> list[Instruction]:
    """Loads half of an argument (both architectures are little-endian)."""
    return [(LOAD, 0, 0, 16 + 8 * index + 4 * high)]


def _zero(index: int) -> list[Instruction]:
    """Denies the call unless all 64 bits of an argument are 0."""
    return [
        instruction
        for high in (False, True)
        for instruction in (*_argument(index, high), (EQUAL, 1, 0, 0), _deny(errno.EPERM))
    ]


def _allow() -> list[Instruction]:
    return [(RETURN, 0, 0, ALLOW)]


def _allow_if(values: Sequence[int]) -> list[Instruction]:
    """Allows the call if the loaded value is one of `values`, else denies it."""
    tests = [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [*tests, _deny(errno.EPERM), *_allow()]


def _ranges(sorted_numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Groups consecutive numbers into ranges, to keep the filter short."""
    out: list[tuple[int, int]] = []
    for number in sorted_numbers:
        if out and out[-1][1] == number - 1:
            out[-1] = (out[-1][0], number)
        else:
            out.append((number, number))
    return out
