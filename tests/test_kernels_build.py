"""The kernels are compiled once for a compiler, a CPU and a source, and a start after that runs no compiler."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.models.kernels import build
from posttrain.models.kernels.build import library, why_not
from posttrain.store import cache

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {why_not()}")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler that writes a line to this file whenever it runs, a cache that is empty, and nothing loaded."""
    made = library()
    assert made is not None
    log, compiler = tmp_path / "calls", tmp_path / "compiler"
    log.touch()
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {made.compiler} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # quicker
    library.cache_clear()
    yield log
    library.cache_clear()


def identity() -> str:
    library.cache_clear()
    made = library()
    assert made is not None
    return made.identity


def test_only_the_first_start_runs_the_compiler(calls: Path) -> None:
    first = identity()
    assert " -o " in calls.read_text()
    calls.write_text("")
    assert identity() == first
    assert calls.read_text() == ""
    (kept,) = cache.folder("kernels").iterdir()
    kept.unlink()
    assert identity() == first
    assert " -o " in calls.read_text()


def test_another_compiler_cpu_source_header_or_flag_is_another_identity(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    here = tmp_path / "kernels"
    shutil.copytree(build.HERE, here, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(build, "HERE", here)
    monkeypatch.setattr(build, "SOURCES", tuple(here / path.name for path in build.SOURCES))
    found = [build._identity(str(compiler))]
    for path in (compiler, here / "attention.c", here / "vector.h"):
        path.write_text(path.read_text() + "\n")
        found.append(build._identity(str(compiler)))
    monkeypatch.setattr(build, "_cpu", lambda: "flags: another")
    found.append(build._identity(str(compiler)))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))
    found.append(build._identity(str(compiler)))
    assert len({*found}) == len(found) == 6
    assert calls.read_text() == ""


def test_a_link_to_a_compiler_is_that_compiler(calls: Path, tmp_path: Path) -> None:
    link = tmp_path / "cc"
    link.symlink_to(tmp_path / "compiler")
    assert build._identity(str(link)) == build._identity(str(tmp_path / "compiler"))


def test_the_compiler_is_asked_for_its_version_only_when_somebody_wants_to_know(calls: Path) -> None:
    made = library()
    assert made is not None and "--version" not in calls.read_text()
    assert made.made_by and made.made_by != made.compiler
    assert calls.read_text().endswith("--version\n")


def test_a_compiler_that_fails_leaves_no_file_and_says_so(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "compiler").write_text("#!/bin/sh\nexit 1\n")
    assert library() is None
    assert why_not() == f"{tmp_path / 'compiler'} could not compile them"
    assert [*cache.folder("kernels").iterdir()] == []
