"""Durable file operations: files, folders and locks that survive kill -9 and power loss.

File contents are fsynced before a name points at them, and the name is fsynced before anything relies on it. The store
uses `os` and `shutil` only through this module, so a test that replaces them here sees every operation of a save and
can make any of them fail or happen in another order.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from posttrain.types import ResumeError


class DiskError(ResumeError):
    """The disk is full or failing. Data saved earlier is intact; the run can be resumed once there is space."""

    exit_code = 8


def write_file(path: Path, chunks: Iterable[bytes | memoryview], written: Callable[[], None] | None = None) -> str:
    """Writes a new file, fsyncs it and returns its sha256. `written` is called just before the fsync."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk)
            while len(rest):  # one call writes at most 2 GiB, and less if the disk is nearly full
                rest = rest[os.write(descriptor, rest) :]
        if written is not None:
            written()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Fsyncs a file that was written elsewhere."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Fsyncs a folder's entries: creations, renames and removals."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Creates a folder durably; its parent must exist. An existing folder is kept and made durable."""
    with suppress(FileExistsError):
        os.mkdir(path)
    sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """Renames durably within one folder."""
    os.rename(source, target)
    sync_folder(target.parent)


def publish_file(path: Path, text: str) -> None:
    """Writes a file atomically: it exists completely or not at all."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    write_file(temporary, [text.encode()])
    rename(temporary, path)


def remove_folder(path: Path) -> None:
    """Removes a folder atomically: it is renamed to a hidden name first, so no reader sees a partial folder."""
    if not path.name.startswith(".tmp-"):
        hidden = path.with_name(f".tmp-removed-{path.name}")
        if hidden.exists():
            shutil.rmtree(hidden)
        os.rename(path, hidden)
        path = hidden
    shutil.rmtree(path)


def free_bytes(path: Path) -> int:
    """Bytes an unprivileged user can still write on the file system of `path`."""
    return shutil.disk_usage(path).free


class FolderLock:
    """Exclusive write lock on a run folder, held until `release` or until the process ends for any reason.

    It is an flock on `LOCK`, which the kernel releases with the process, so there are no stale locks to clean up. A
    forked child, such as a worker of a reward's process pool, does not hold it.
    """

    def __init__(self, folder: Path, patience: float = 0.5) -> None:
        """Acquires the lock. Raises ResumeError if another process still holds it after `patience` seconds."""
        self._descriptor = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience
        while not _try_lock(self._descriptor, fcntl.LOCK_EX, folder):
            if time.monotonic() > deadline:  # `is_locked` in a reader holds the lock for microseconds, so wait a little
                owner = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(self._descriptor)
                raise ResumeError(
                    f"run folder {folder} is in use by another process (pid {owner}). Wait for it to finish or stop it."
                )
            time.sleep(0.02)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())
        _held.add(self._descriptor)

    def release(self) -> None:
        """Releases the lock."""
        if self._descriptor in _held:  # not in a forked child
            _held.remove(self._descriptor)
            os.close(self._descriptor)


_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _forget_locks() -> None:
    """Closes a forked child's copies: the lock is held as long as any copy is open."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the lock of the run folder; needs no write permission."""
    try:
        descriptor = os.open(folder / "LOCK", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH, folder)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ResumeError(
            f"run folder {folder} cannot be locked ({error.strerror}). Put it on a local file system."
        ) from error
    return True
