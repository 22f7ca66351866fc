"""Compiles the C files beside it with the machine's own C compiler, once, and loads them.

The result is kept under a name that hashes the source, the compiler, its flags and the CPU, so a stale one is never
loaded. Without a compiler, or with POSTTRAIN_KERNELS=0, there are none and torch's own operations are used.
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
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain import cache

HERE = Path(__file__).parent
SOURCES = (HERE / "kernels.c", HERE / "attention.c")
SWITCH = "POSTTRAIN_KERNELS"
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")


@dataclass(frozen=True)
class Library:
    """The compiled functions, and what made them; `identity` is part of a run's fingerprint."""

    functions: ctypes.CDLL
    identity: str
    compiler: str


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
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    flags = [*FLAGS, *_for_this_machine(compiler)]
    texts = [path.read_text("utf-8") for path in (HERE / "vector.h", *SOURCES)]
    identity = hashlib.sha256("\n".join([*texts, version, *flags, _cpu(), torch.__version__]).encode()).hexdigest()[:16]
    path = cache.folder("kernels") / f"kernels-{identity}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
            made = Path(file.name)
        try:
            subprocess.run(
                [compiler, *flags, *map(str, SOURCES), "-o", str(made), "-lm"], capture_output=True, check=True
            )
            made.replace(path)  # two processes may do this at once; either result is whole
        finally:
            made.unlink(missing_ok=True)
    return Library(ctypes.CDLL(str(path)), identity, version)


def _cpu() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@functools.cache
def _for_this_machine(compiler: str) -> tuple[str, ...]:
    """Flags that some compilers lack: the machine's own instructions, and OpenMP where torch uses it too."""
    kept: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.c"
        probe.write_text("int f(void) { return 0; }\n")
        wanted = ["-march=native", "-mcpu=native"] + (["-fopenmp"] if torch.backends.openmp.is_available() else [])
        for flag in wanted:
            if flag == "-mcpu=native" and kept:
                continue
            command = [compiler, *kept, flag, "-fPIC", "-shared", str(probe), "-o", str(Path(folder) / "probe.so")]
            if subprocess.run(command, capture_output=True).returncode == 0:
                kept.append(flag)
    return tuple(kept)
