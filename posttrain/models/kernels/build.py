"""Compiles the C files beside it with the machine's own C compiler, once, and loads them.

The result is kept under a name that hashes the source, the compiler's file, the flags and the CPU, so a stale one is
never loaded. Without a compiler, or with POSTTRAIN_KERNELS=0, there are none and torch's own operations are used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.store import cache

HERE = Path(__file__).parent
SOURCES = (HERE / "kernels.c", HERE / "attention.c", HERE / "products.c")
SWITCH = "POSTTRAIN_KERNELS"
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")


@dataclass(frozen=True)
class Library:
    """The compiled functions, and the program that made them; `identity` is part of a run's fingerprint."""

    functions: ctypes.CDLL
    identity: str
    compiler: str

    @property
    def made_by(self) -> str:
        """The compiler's name and version, as it says them; this starts it."""
        said = subprocess.run([self.compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
        return said[0] if said else self.compiler


@functools.cache
def library() -> Library | None:
    """The compiled kernels, or None where there are none; `why_not()` says why."""
    try:
        return _compiled()
    except (OSError, subprocess.SubprocessError):
        return None


def why_not() -> str:
    """The reason that `library()` is None; empty when it is not."""
    if library() is not None:
        return ""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    compiler = _compiler()
    return f"{compiler} could not compile them" if compiler else "no C compiler (cc, gcc or clang) was found"


def _compiler() -> str | None:
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((path for path in map(shutil.which, wanted) if path), None)


def _compiled() -> Library | None:
    compiler = _compiler()
    if os.environ.get(SWITCH) == "0" or compiler is None or platform.system() not in ("Linux", "Darwin"):
        return None
    identity = _identity(compiler)
    path = cache.folder("kernels") / f"kernels-{identity}.so"
    if not path.exists():
        _compile(compiler, path)
    return Library(ctypes.CDLL(str(path)), identity, compiler)


def _identity(compiler: str) -> str:
    """A hash of all that decides the result. No process is started: this is part of every start.

    The compiler counts by its file, size and time of change, links followed; flags are probed only to compile, because
    which of them are taken follows from the rest.
    """
    texts = [path.read_text("utf-8") for path in (*sorted(HERE.glob("*.h")), *SOURCES)]
    file = Path(compiler).resolve()
    about = file.stat()
    made_by = [str(file), str(about.st_size), str(about.st_mtime_ns), *FLAGS, *_optional_flags()]
    return hashlib.sha256("\n".join([*texts, *made_by, _cpu(), torch.__version__]).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    flags = [*FLAGS, *_taken(compiler, _optional_flags())]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
        made = Path(file.name)
    try:
        subprocess.run([compiler, *flags, *map(str, SOURCES), "-o", str(made), "-lm"], capture_output=True, check=True)
        made.replace(path)  # two processes may do this at once; either result is whole
    finally:
        made.unlink(missing_ok=True)


def _cpu() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    with info.open() as lines:  # one processor says it; there may be hundreds
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _optional_flags() -> list[str]:
    """What some compilers lack: the machine's own instructions, by either name, and OpenMP where torch uses it too."""
    return ["-march=native", "-mcpu=native", *(["-fopenmp"] if torch.backends.openmp.is_available() else [])]


def _taken(compiler: str, flags: Sequence[str]) -> list[str]:
    """Those of the flags that the compiler takes, and one name for the machine's own instructions."""
    kept: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.c"
        probe.write_text("int f(void) { return 0; }\n")
        for flag in flags:
            if flag == "-mcpu=native" and kept:
                continue
            command = [compiler, *kept, flag, "-fPIC", "-shared", str(probe), "-o", str(Path(folder) / "probe.so")]
            if subprocess.run(command, capture_output=True).returncode == 0:
                kept.append(flag)
    return kept
