"""A disk between the store and the operating system: it can fail any operation, and lose what was not forced to it.

`Disk` stands in for `os` and `shutil` inside `posttrain.store.durable`. Operations reach the real file system, and a
model beside it keeps what POSIX lets a power cut do (after ALICE, Pillai et al., OSDI 2014): bytes of a file that was
not fsynced may be there, absent, torn or zeros, and any subset of a folder's changes since its last fsync may be there.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Tree = Mapping[str, bytes | None]
"""Relative path → bytes of a file, or None for a folder."""


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory where the machine has one: kill -9 and the disk models do not depend on the real disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


class Disk:
    """`before(operation)` runs before every operation that changes the disk, and may raise to fail it."""

    def __init__(self, root: Path, before: Callable[[str], None] = lambda operation: None) -> None:
        self.root, self.before = root, before
        self.open_files: dict[int, int] = {}
        self.content: dict[int, bytes] = {}
        self.synced: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {0: {}}  # what every process sees
        self.durable: dict[int, dict[str, int]] = {0: {}}  # what a power cut cannot take
        self.pending: dict[int, list[dict[str, int | None]]] = {0: []}
        self.count = 0
        for path in sorted(root.rglob("*")):
            self._add(path, None if path.is_dir() else path.read_bytes(), lasting=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(os if hasattr(os, name) else shutil, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self.before("open")
            self._add(path, b"")
        descriptor = os.open(path, flags, mode)
        self.open_files[descriptor] = self._find(path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        try:
            self.before("write")
        except OSError:
            os.write(descriptor, data[: len(data) // 2])  # a full disk takes what still fits
            raise
        self.content[self.open_files[descriptor]] += bytes(data)
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        self.before("fsync")
        number = self.open_files[descriptor]
        if number in self.names:
            self.durable[number], self.pending[number] = dict(self.names[number]), []
        else:
            self.synced[number] = self.content[number]

    def mkdir(self, path: Path) -> None:
        if not path.exists():
            self.before("mkdir")
            self._add(path, None)
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename")
        self._change(source.parent, {source.name: None, target.name: self._find(source)})
        os.rename(source, target)

    def rmtree(self, path: Path) -> None:
        for inside in path.iterdir():
            self.before("unlink")
            self._change(path, {inside.name: None})
            os.unlink(inside)
        self.before("rmdir")
        self._change(path.parent, {path.name: None})
        os.rmdir(path)

    def crash_states(self) -> Iterator[Tree]:
        """Every distinct tree that a power cut at this moment could leave."""
        changes = [(folder, change) for folder, waiting in self.pending.items() for change in waiting]
        unsynced = [number for number, data in self.content.items() if self.synced.get(number) != data]
        seen: set[frozenset[tuple[str, bytes | None]]] = set()
        for kept in itertools.product((False, True), repeat=len(changes)):
            names = {folder: dict(entries) for folder, entries in self.durable.items()}
            for (folder, change), keep in zip(changes, kept, strict=True):
                if keep:
                    names[folder].update({name: number for name, number in change.items() if number is not None})
                    for name in [name for name, number in change.items() if number is None]:
                        names[folder].pop(name, None)
            for versions in itertools.product(*(self._versions(number) for number in unsynced)):
                data = {**self.synced, **dict(zip(unsynced, versions, strict=True))}
                tree = dict(_walk(0, "", names, data))
                if frozenset(tree.items()) not in seen:
                    seen.add(frozenset(tree.items()))
                    yield tree

    def _versions(self, number: int) -> set[bytes]:
        full = self.content[number]
        return {self.synced.get(number, b""), b"", full[: len(full) // 2], bytes(len(full)), full}

    def _find(self, path: Path) -> int:
        number = 0
        for part in path.relative_to(self.root).parts:
            number = self.names[number][part]
        return number

    def _change(self, folder: Path, change: dict[str, int | None]) -> None:
        number = self._find(folder)
        self.pending[number].append(change)
        for name, target in change.items():
            if target is None:
                del self.names[number][name]
            else:
                self.names[number][name] = target

    def _add(self, path: Path, data: bytes | None, lasting: bool = False) -> None:
        self.count += 1
        if data is None:
            self.names[self.count], self.durable[self.count], self.pending[self.count] = {}, {}, []
        else:
            self.content[self.count] = data
        parent = self._find(path.parent)
        self._change(path.parent, {path.name: self.count})
        if lasting:
            self.durable[parent], self.pending[parent] = dict(self.names[parent]), []
            if data is not None:
                self.synced[self.count] = data


def _walk(
    number: int, path: str, names: dict[int, dict[str, int]], data: dict[int, bytes]
) -> Iterator[tuple[str, bytes | None]]:
    for name, inside in names[number].items():
        yield f"{path}{name}", data.get(inside)
        if inside in names:
            yield from _walk(inside, f"{path}{name}/", names, data)


def lay_out(tree: Tree, root: Path) -> None:
    """Makes a real folder of a tree."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)
