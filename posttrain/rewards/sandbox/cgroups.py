"""Control groups (cgroups) that limit memory and processes of an execution, if this user may create them.

Supports versions 1 and 2. Without cgroups, only the limits per process and per user apply.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "posttrain-sandbox-"
_count = itertools.count()


class Group:
    """One control group per hierarchy, named after this process. A zygote joins by writing to `procs_files`."""

    def __init__(self, memory: int, tasks: int) -> None:
        """Raises OSError if the groups cannot be created."""
        sweep()
        name = f"{PREFIX}{os.getpid()}-{next(_count)}"
        self.folders: list[Path] = []
        parents = _parents()
        limits = {"memory": {"memory.limit_in_bytes": memory}, "pids": {"pids.max": tasks}}
        if "both" in parents:
            limits = {"both": {"memory.max": memory, "memory.swap.max": 0, "pids.max": tasks}}
        try:
            for kind, files in limits.items():
                folder = parents[kind] / name
                folder.mkdir()
                self.folders.append(folder)
                for file, value in files.items():
                    with suppress(FileNotFoundError):  # a kernel without swap accounting lacks the swap file
                        (folder / file).write_text(str(value))
        except (OSError, KeyError):
            self.close()
            raise

    @property
    def procs_files(self) -> list[str]:
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def killed(self) -> int:
        """Number of processes in the group that were killed for exceeding the memory limit."""
        for folder in self.folders:
            for file in ("memory.oom_control", "memory.events"):
                with suppress(OSError):
                    match = re.search(r"^oom_kill (\d+)$", (folder / file).read_text(), re.MULTILINE)
                    if match:
                        return int(match[1])
        return 0

    def close(self) -> None:
        """Removes the groups; waits up to a second for dying tasks and leaves non-empty groups to a later `sweep`."""
        deadline = time.monotonic() + 1
        while self.folders:
            try:
                self.folders[-1].rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
            self.folders.pop()


def available() -> str:
    """The cgroup version that can be used here, `version 1` or `version 2`, or an empty string."""
    try:
        group = Group(1 << 28, 16)
    except (OSError, KeyError):
        return ""
    version = "version 2" if len(group.folders) == 1 else "version 1"
    group.close()
    return version


def sweep() -> None:
    """Removes groups left behind by processes that were killed."""
    for parent in _parents().values():
        for folder in parent.glob(f"{PREFIX}*"):
            pid = folder.name.removeprefix(PREFIX).partition("-")[0]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                with suppress(OSError):
                    folder.rmdir()


def _parents() -> dict[str, Path]:
    """Folders in which this process may create groups: `memory` and `pids` of version 1, or `both` of version 2."""
    parents: dict[str, Path] = {}
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return parents
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers:
            for kind in {"memory", "pids"} & set(controllers.split(",")):
                base = ROOT / controllers
                base = base if base.is_dir() else ROOT / kind
                own = base / path.lstrip("/")
                parents[kind] = own if own.is_dir() else base
        else:
            own = ROOT / path.lstrip("/")
            for folder in (own, *own.parents):
                with suppress(OSError):
                    granted = set((folder / "cgroup.subtree_control").read_text().split())
                    if {"memory", "pids"} <= granted and os.access(folder, os.W_OK):
                        return {"both": folder}
    return parents
