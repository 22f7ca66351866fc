"""Files, folders and locks that survive kill -9 and a power cut.

The rule everywhere: bytes are forced to disk before a name points at them, and the name is forced to disk before
anything relies on it. `os` and `shutil` are only reached through this module, so a test that swaps them here sees
every operation of a save and can fail or reorder any of them.
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
    """The disk is full or failing. What was saved before is intact; the run can be resumed once there is space."""

    exit_code = 8


def write_file(path: Path, chunks: Iterable[bytes | memoryview], written: Callable[[], None] | None = None) -> str:
    """Writes a new file, forces it to disk and returns its sha256. `written` is called before the forcing."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk)
            while len(rest):  # one call writes at most 2 GiB, and less when a disk is nearly full
                rest = rest[os.write(descriptor, rest) :]
        if written is not None:
            written()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Forces a file's bytes to disk that something else wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Forces the names in a folder to disk: creations, renames and removals."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Creates one folder whose parent exists, durably; an existing one is left, and made durable."""
    with suppress(FileExistsError):
        os.mkdir(path)
    sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """Renames within one folder, durably."""
    os.rename(source, target)
    sync_folder(target.parent)


def publish_file(path: Path, text: str) -> None:
    """Writes a file that exists whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    write_file(temporary, [text.encode()])
    rename(temporary, path)


def remove_folder(path: Path) -> None:
    """Removes a folder in one visible step: it is renamed out of sight first, so nobody reads half of it."""
    if not path.name.startswith(".tmp-"):
        hidden = path.with_name(f".tmp-removed-{path.name}")
        if hidden.exists():
            shutil.rmtree(hidden)
        os.rename(path, hidden)
        path = hidden
    shutil.rmtree(path)


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write on the file system that holds `path`."""
    return shutil.disk_usage(path).free


class FolderLock:
    """The right to write one run folder, held until `release` or the end of the process, however it ends.

    An flock on `LOCK` is used because the kernel drops it with the process: there is no stale lock to clean up.
    """

    def __init__(self, folder: Path, patience: float = 0.5) -> None:
        """Takes the lock, or raises ResumeError when another process keeps it for `patience` seconds."""
        self._descriptor = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience
        while not _try_lock(self._descriptor, fcntl.LOCK_EX, folder):
            if time.monotonic() > deadline:  # a reader's probe holds the lock for microseconds: outlast it
                owner = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(self._descriptor)
                raise ResumeError(f"run folder {folder} is in use by another process (pid {owner}); not started")
            time.sleep(0.02)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Gives the folder back."""
        os.close(self._descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the run folder; needs no right to write."""
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
