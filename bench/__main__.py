"""Side by side with TRL: time and memory of the same work, in one table.

    python -m bench [--only TEXT] [--rounds N] [--threads N] [--quick] [--smollm FOLDER] [--write]

makes (or reuses) an environment with TRL in build/, runs both sides in turn on the same weights, prompts and lengths,
prints medians, ratios and peak memory with the bar of each row, and writes them to build/bench. It ends with exit
code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import table
from bench.duel import SideFailed, Sides, check
from bench.environment import FOLDER, ROOT, TRL, environment
from bench.rows import ROWS, Row, folder_of
from bench.table import Result

OUT = ROOT / "build" / "bench"


def measure(row: Row, sides: Sides, given: Mapping[str, Path], rounds: int | None, quick: bool) -> Result:
    """Both sides of a row in turn; first each side's settings are tried where it has a choice."""
    job = row.job(folder_of(row, OUT / "models", given))
    try:
        ours, peer = (
            options[0] if quick else sides.fastest(which, job, options)
            for which, options in (("ours", row.ours), ("peer", row.peer))
        )
        a, b = sides.duel(job, ours, peer, 1 if quick else rounds or row.rounds)
    except SideFailed as error:
        return Result(row, problem=str(error))
    return Result(row, a, b, check(job, a, b))


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    versions = {"trl": TRL, "torch": torch.__version__, "transformers": transformers.__version__}
    cpu = {"cpu": model, "capability": torch.backends.cpu.get_cpu_capability(), "threads": threads}
    return versions | cpu | {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time and memory side by side with TRL.")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--rounds", type=int, help="measured steps of each side (default: as the row says)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each side")
    parser.add_argument("--quick", action="store_true", help="one round, the first settings of each side")
    parser.add_argument("--smollm", type=Path, help="folder with SmolLM2-135M (default: random weights of its shape)")
    parser.add_argument("--venv", type=Path, default=FOLDER, help="where TRL is installed")
    options = parser.parse_args(argv)
    rows = [row for row in ROWS if options.only in row.name]
    if not rows:
        parser.error(f"no row's name contains {options.only!r}; there are: {'; '.join(row.name for row in ROWS)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds} measures nothing; use 1 or more")
    sides = Sides(environment(options.venv), options.threads)
    given = {"SmolLM2-135M": options.smollm} if options.smollm else {}
    results: list[Result] = []
    for row in rows:
        print(row.name, flush=True)
        results.append(measure(row, sides, given, options.rounds, options.quick))
        print(results[-1].line(), flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    about = machine(options.threads)
    record = {"machine": about, "rows": [r.record() for r in results]}
    path = OUT / time.strftime("%Y%m%d-%H%M%S.json")
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\n{', '.join(f'{name} {value}' for name, value in about.items())}\n")
    print(table.markdown(results))
    print(f"\n{table.settings(results)}\n\nwritten to {path}")
    return 0 if all(r.met for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
