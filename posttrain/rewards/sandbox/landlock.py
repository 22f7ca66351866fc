"""The Landlock tier, for machines without user namespaces: a process gives up access to all but the named paths.

The seccomp filter covers what Landlock does not restrict, such as chmod; file metadata remains visible.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from posttrain.rewards.sandbox import kernel

OLDEST = 3  # Linux 6.2; older versions cannot restrict `truncate`
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (1 << bit for bit in (0, 1, 2, 3, 5, 8, 14))
RULE_PATH_BENEATH = 1
READ = READ_FILE | READ_DIR
READ_WRITE_FILE = READ_FILE | WRITE_FILE | TRUNCATE
SCRATCH = READ_WRITE_FILE | READ_DIR | MAKE_REG | REMOVE_FILE  # plain files only, so that it is easy to empty


def version() -> int:
    """This kernel's Landlock ABI version, 0 without Landlock."""
    try:
        return kernel.syscall(kernel.LANDLOCK_CREATE_RULESET, None, 0, 1, what="landlock")
    except OSError:
        return 0


def restrict(read: Sequence[str], read_write: Sequence[str], scratch: str) -> None:
    """Restricts this process to these folders and files and, from version 4 on, to no network. Raises OSError."""
    abi = version()
    if abi < OLDEST:
        raise OSError(f"Landlock has version {abi}, but at least {OLDEST} is needed (Linux 6.2)")
    rights = (1 << 16) - 1 if abi >= 5 else (1 << 15) - 1
    attributes = struct.pack("=Q", rights)
    attributes += struct.pack("=Q", 3) if abi >= 4 else b""  # TCP: bind and connect
    attributes += struct.pack("=Q", 3) if abi >= 6 else b""  # scopes abstract sockets and signals
    ruleset = kernel.syscall(
        kernel.LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0, what="landlock_create_ruleset"
    )
    try:
        allowed = [(path, READ) for path in read] + [(path, READ_WRITE_FILE) for path in read_write]
        for path, access in [*allowed, (scratch, SCRATCH)]:
            _allow(ruleset, path, access)
        kernel.syscall(kernel.LANDLOCK_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, fd))
        kernel.syscall(kernel.LANDLOCK_ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0, what=f"landlock_add_rule {path}")
    finally:
        os.close(fd)
