"""Compares time and memory with TRL's on the same work, in one table.

    python -m bench [--only TEXT] [--rounds N] [--threads N] [--quick] [--smollm FOLDER] [--write]

creates (or reuses) an environment with TRL in build/, runs both sides alternately on the same weights, prompts and
lengths, prints medians, ratios and peak memory with each row's target, and stores them in build/bench. It exits with
code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import roofline, scaling, table
from bench.duel import SideFailed, Sides, check
from bench.environment import FOLDER, ROOT, TRL, environment
from bench.marks import between
from bench.models import SHAPES, model_folder
from bench.rows import ROWS, Row, folder_of, quarter
from bench.table import Result

OUT = ROOT / "build" / "bench"
PAGE = ROOT / "docs" / "concepts" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "scaling.png"
MACHINE = "share of the fastest matrix product"
SCALING = "cost by group size, length and model size"
DRAWN = "Seconds of a GRPO step against answers to a prompt, tokens of an answer, and parameters, with fitted lines"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"


@dataclass
class Report:
    """Everything that one run of the command measured."""

    about: dict[str, Any]
    results: list[Result] = field(default_factory=list[Result])
    share: roofline.Pass | None = None
    curves: list[scaling.Curve] = field(default_factory=list[scaling.Curve])

    @property
    def met(self) -> bool:
        """Whether every target is met."""
        return all(
            [*(r.met for r in self.results), *(c.met for c in self.curves), self.share is None or self.share.met]
        )

    def markdown(self) -> str:
        parts = [", ".join(f"{name} {value}" for name, value in self.about.items()) + "."]
        if self.results:
            parts += [table.markdown(self.results), table.settings(self.results)]
        if self.share:
            parts.append(self.share.lines())
        if self.curves:
            parts.append(scaling.markdown(self.curves))
        return "\n\n".join(parts) + "\n"

    def record(self) -> dict[str, Any]:
        """Everything that was measured, as JSON-compatible data."""
        out: dict[str, Any] = {"machine": self.about, "rows": [r.record() for r in self.results]}
        out["share"] = self.share.record() if self.share else None
        return out | {"curves": [c.record() for c in self.curves]}


def measure(row: Row, sides: Sides, given: Mapping[str, Path], rounds: int | None, quick: bool) -> Result:
    """Measures both sides of a row, alternating; each side first tries its settings on a quarter of the work."""
    folder, less = folder_of(row, OUT / "models", given), quarter(row)
    job, trial = (less if quick else row).job(folder), less.job(folder)
    try:
        ours = row.ours[0] if quick else sides.fastest("ours", trial, row.ours)
        peer = row.peer[0] if quick else sides.fastest("peer", trial, row.peer)
        a, b = sides.duel(job, ours, peer, 1 if quick else rounds or row.rounds)
    except SideFailed as error:
        return Result(row, problem=str(error))
    return Result(row, a, b, check(job, a, b))


def machine(threads: int) -> dict[str, Any]:
    """Date, versions and hardware of the measurement."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    versions = {"TRL": TRL, "torch": torch.__version__, "transformers": transformers.__version__}
    cpu = {"CPU": model, "capability": torch.backends.cpu.get_cpu_capability(), "threads": threads}
    return {"date": time.strftime("%Y-%m-%d"), **versions, **cpu}


def written(page: str, measured: str) -> str:
    """The results page with `measured` between its markers. Raises ValueError if a marker is missing."""
    return between(page, BEGIN, END, measured, PAGE.name)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare time and memory with TRL's.")
    parser.add_argument("--only", default="", help="only rows whose name contains this text")
    parser.add_argument("--rounds", type=int, help="measured steps of each side (default: the row's own)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each side")
    parser.add_argument("--quick", action="store_true", help="one round, a quarter of the work, first settings")
    parser.add_argument("--smollm", type=Path, help="folder with SmolLM2-135M (default: random weights of its shape)")
    parser.add_argument("--venv", type=Path, default=FOLDER, help="where TRL is installed")
    parser.add_argument("--write", action="store_true", help="write docs/concepts/performance.md and its picture")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(argv)
    rows = [row for row in ROWS if options.only in row.name]
    others = [name for name in (MACHINE, SCALING) if options.only in name]
    if not rows and not others:
        names = "; ".join([*(row.name for row in ROWS), MACHINE, SCALING])
        parser.error(f"no row's name contains {options.only!r}; the rows are: {names}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; use 1 or more")
    if options.write and (options.only or options.quick):
        parser.error("--write needs the whole table; leave out --only and --quick")
    if options.smollm and not (options.smollm / "config.json").exists():
        parser.error(f"--smollm {options.smollm} has no config.json; pass a model folder")
    sides = Sides(environment(options.venv), options.threads)
    given = {"SmolLM2-135M": options.smollm.resolve()} if options.smollm else {}
    report = Report(machine(options.threads))
    for row in rows:
        print(row.name, flush=True)
        report.results.append(measure(row, sides, given, options.rounds, options.quick))
        print(report.results[-1].line(), flush=True)
    if MACHINE in others:
        print(MACHINE, flush=True)
        shape = SHAPES["SmolLM2-135M"]
        report.share = roofline.measure(sides, shape, str(model_folder(shape, OUT / "models")))
    if SCALING in others:
        print(SCALING, flush=True)
        report.curves = scaling.measure(sides, OUT / "models", 1 if options.quick else 3)
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / time.strftime("%Y%m%d-%H%M%S.json")
    path.write_text(json.dumps(report.record(), indent=1), encoding="utf-8")
    print(f"\n{report.markdown()}\nsaved to {path}")
    if report.curves:
        scaling.draw(report.curves, PICTURE if options.write else path.with_suffix(".png"))
    if options.write:
        measured = f"{report.markdown()}\n![{DRAWN}](../images/{PICTURE.name})\n"
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")
    return 0 if report.met else 1


if __name__ == "__main__":
    sys.exit(main())
