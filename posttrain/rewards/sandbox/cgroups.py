"""Control groups for executions, where this user may make them: a bound on memory and on processes, both together.

Version 1 and version 2 alike. Where none can be made, limits of single processes and of a user's tasks must do.
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
    """One control group per hierarchy, named after this process. A zygote joins through `doors`."""

    def __init__(self, memory: int, tasks: int) -> None:
        """Raises OSError where none can be made."""
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
                    with suppress(FileNotFoundError):  # a kernel without swap accounting has no file for it
                        (folder / file).write_text(str(value))
        except (OSError, KeyError):
            self.close()
            raise

    @property
    def doors(self) -> list[str]:
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def killed(self) -> int:
        """How many processes were killed for memory in here."""
        for folder in self.folders:
            for file in ("memory.oom_control", "memory.events"):
                with suppress(OSError):
                    found = re.search(r"^oom_kill (\d+)$", (folder / file).read_text(), re.MULTILINE)
                    if found:
                        return int(found[1])
        return 0

    def close(self) -> None:
        """Removes the groups; waits a second for dying tasks, and leaves what then is not empty to a later `sweep`."""
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
    """Which groups can be made here: `version 1`, `version 2`, or empty."""
    try:
        group = Group(1 << 28, 16)
    except (OSError, KeyError):
        return ""
    version = "version 2" if len(group.folders) == 1 else "version 1"
    group.close()
    return version


def sweep() -> None:
    """Removes what killed processes have left."""
    for parent in _parents().values():
        for folder in parent.glob(f"{PREFIX}*"):
            pid = folder.name.removeprefix(PREFIX).partition("-")[0]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                with suppress(OSError):
                    folder.rmdir()


def _parents() -> dict[str, Path]:
    """Where this process may make a group: `memory` and `pids` of version 1, or `both` of version 2."""
    found: dict[str, Path] = {}
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers:
            for kind in {"memory", "pids"} & set(controllers.split(",")):
                here = ROOT / controllers
                here = here if here.is_dir() else ROOT / kind
                below = here / path.lstrip("/")
                found[kind] = below if below.is_dir() else here
        else:
            own = ROOT / path.lstrip("/")
            for folder in (own, *own.parents):
                with suppress(OSError):
                    granted = set((folder / "cgroup.subtree_control").read_text().split())
                    if {"memory", "pids"} <= granted and os.access(folder, os.W_OK):
                        return {"both": folder}
    return found
