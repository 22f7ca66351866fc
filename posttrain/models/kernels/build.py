"""Compiles the C kernels in this folder once, with the machine's C compiler, and loads them.

The library's file name is a hash of the source, the compiler binary, the flags and the CPU, so a stale library is never
loaded. Without a compiler, or with POSTTRAIN_KERNELS=0, torch's own operations are used instead.
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
    """The compiled functions and their compiler; `identity` is part of a run's fingerprint."""

    functions: ctypes.CDLL
    identity: str
    compiler: str

    @property
    def made_by(self) -> str:
        """The first line of the compiler's `--version` output; runs the compiler."""
        lines = subprocess.run([self.compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
        return lines[0] if lines else self.compiler


@functools.cache
def library() -> Library | None:
    """The compiled kernels, or None if they are unavailable; `why_not()` gives the reason."""
    try:
        return _compiled()
    except (OSError, subprocess.SubprocessError):
        return None


def why_not() -> str:
    """Why `library()` is None; empty if it is not."""
    if library() is not None:
        return ""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    compiler = _compiler()
    return f"{compiler} could not compile them" if compiler else "no C compiler (cc, gcc or clang) was found"


def _compiler() -> str | None:
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((path for path in map(shutil.which, names) if path), None)


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
    """A hash of everything the compiled library depends on. Starts no process, because every start computes it.

    The compiler is identified by its resolved path, size and modification time. Flags are probed only when compiling,
    because the other inputs determine which of them are supported.
    """
    texts = [path.read_text("utf-8") for path in (*sorted(HERE.glob("*.h")), *SOURCES)]
    file = Path(compiler).resolve()
    about = file.stat()
    made_by = [str(file), str(about.st_size), str(about.st_mtime_ns), *FLAGS, *_optional_flags()]
    return hashlib.sha256("\n".join([*texts, *made_by, _cpu(), torch.__version__]).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    flags = [*FLAGS, *_supported(compiler, _optional_flags())]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
        made = Path(file.name)
    try:
        subprocess.run([compiler, *flags, *map(str, SOURCES), "-o", str(made), "-lm"], capture_output=True, check=True)
        made.replace(path)  # two processes may do this at once; the rename is atomic
    finally:
        made.unlink(missing_ok=True)


def _cpu() -> str:
    """The CPU features that `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    with info.open() as lines:  # the first processor is enough; there may be hundreds
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _optional_flags() -> list[str]:
    """Flags that some compilers lack: native instructions, under either name, and OpenMP if torch uses it too."""
    return ["-march=native", "-mcpu=native", *(["-fopenmp"] if torch.backends.openmp.is_available() else [])]


def _supported(compiler: str, flags: Sequence[str]) -> list[str]:
    """The flags that the compiler supports, with only one of the two names for native instructions."""
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
