"""Sandbox benchmark: a catalogue of hostile programs, HumanEval and MBPP, grading time, and a soak test.

    python -m bench.sandbox [--shared FOLDER] [--only TEXT] [--tier TIER] [--soak N]

runs each tier as the current user, as another user (65534; needs root) and nested in a user namespace, like root in a
container. It prints one table and exits with code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from posttrain.rewards.code import humaneval_task, mbpp_task, program_of
from posttrain.rewards.sandbox import kernel
from posttrain.rewards.sandbox.pool import TIERS, Sandbox
from posttrain.rewards.sandbox.tasks import Grade, grade
from posttrain.types import ConfigError, Message, Task

OTHER = 65534
SITUATIONS = ("this user", "another user", "nested")
Finding = tuple[str, str, str, bool]  # measure, value, target, met
HONEST = "def solve(a, b):\n    return a + b\n"
SUMS = [{"args": [1, 2], "expected": 3}, {"args": [10, -4], "expected": 6}, {"args": [123, 456], "expected": 579}]
CALL = {"kind": "call", "entry": "solve", "cases": SUMS}
STDIN = {
    "kind": "stdin",
    "cases": [{"stdin": "3 4\n", "stdout": "7\n12\n"}, {"stdin": "10 -2\n", "stdout": "8\n-20\n"}],
}
QUICK, PATIENT = 0.5, 20.0


def graded(sandbox: Sandbox, code: str, spec: Mapping[str, Any] = CALL, seconds: float = PATIENT) -> Grade:
    return grade(sandbox, {**spec, "seconds": seconds}, code)


def catalogue(sandbox: Sandbox, shared: Path) -> Iterator[Finding]:
    """Grades each program; checks the outcome, that its canary is intact, and that an honest program still passes."""
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.write_text("secret")
        rows = [json.loads(line) for line in (shared / "sandbox/cases.jsonl").read_text("utf-8").splitlines()]
        failed: list[str] = []
        paid: list[str] = []
        for row in rows:
            code = row["code"].replace("/canary", folder).replace("CANARY_PORT", "9")
            spec = {**(CALL if row["kind"] == "call" else STDIN), "processes": row["procs"]}
            passed = graded(sandbox, code, spec, PATIENT if row["expect"] == "one" else QUICK).how == "passed"
            whole = os.listdir(folder) == ["secret"] and graded(sandbox, HONEST).how == "passed"
            wanted = passed if row["expect"] == "safe" else row["expect"] == "one"
            failed += [row["id"]] * (passed != wanted or not whole)
            paid += [row["id"]] * (passed and row["expect"] == "zero")
    told = f" ({', '.join(failed)})" if failed else ""
    yield "expected outcomes", f"{len(rows) - len(failed)}/{len(rows)}{told}", "all", not failed
    yield "wrong answers rewarded", f"{len(paid)}", "0", not paid


def data_sets(sandbox: Sandbox, shared: Path) -> Iterator[Finding]:
    """Grades the reference solutions of both data sets, and programs that return None."""
    with gzip.open(shared / "data/humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        humaneval = [(humaneval_task(row), "    return None\n") for row in map(json.loads, file)]
    lines = (shared / "data/mbpp/mbpp.jsonl").read_text("utf-8").splitlines()
    mbpp = [(row, _nothing(row["names"])) for row in (mbpp_task(json.loads(line)) for line in lines)]
    for name, rows in (("HumanEval", humaneval), ("MBPP", mbpp)):
        good = [row["source_id"] for row, _ in rows if not _passes(sandbox, row, row["answer"])]
        none = [row["source_id"] for row, null in rows if _passes(sandbox, row, null)]
        told = f" (failed: {', '.join(map(str, good))})" if good else ""
        yield f"{name}: references", f"{len(rows) - len(good)}/{len(rows)}{told}", "all", not good
        yield f"{name}: return None", f"{len(none)} {none or ''}".strip(), "0", not none


def _nothing(names: Sequence[str]) -> str:
    return "\n".join(f"def {name}(*args, **kwargs): return None" for name in names)


def _passes(sandbox: Sandbox, row: Mapping[str, Any], reply: str) -> bool:
    task = Task("t", "code", (Message("user", row["prompt"]),), row["answer"], row)
    return graded(sandbox, program_of(task, reply), row).how == "passed"


def speed(sandbox: Sandbox, shared: Path) -> Iterator[Finding]:
    """Time of one grading with three cases, and gradings per second with two slots and two threads."""
    del shared
    for _ in range(20):
        graded(sandbox, HONEST)
    times: list[float] = []
    for _ in range(300):
        start = time.perf_counter()
        assert graded(sandbox, HONEST).how == "passed"
        times.append(1000 * (time.perf_counter() - start))
    median, late = statistics.median(times), statistics.quantiles(times, n=20)[-1]
    yield "median time", f"{median:.1f} ms (p95: {late:.1f} ms)", "≤ 10 ms", median <= 10
    pair = Sandbox(sandbox.tier, accept_arbitrary_code=True, slots=2)

    def work(count: int) -> None:
        for _ in range(count):
            graded(pair, HONEST)

    for count in (20, 300):  # the first round starts the zygotes
        threads = [threading.Thread(target=work, args=(count,)) for _ in range(2)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rate = 600 / (time.perf_counter() - start)
    pair.close()
    yield "gradings per second, 2 slots", f"{rate:.0f}", "≥ 200", rate >= 200


def soak(sandbox: Sandbox, shared: Path, count: int) -> Iterator[Finding]:
    """Soak test: many gradings, every fiftieth of a hostile program; checks memory, descriptors and processes."""
    lines = (shared / "sandbox/cases.jsonl").read_text("utf-8").splitlines()
    hostile = [row for row in map(json.loads, lines) if row["expect"] == "zero" and row["kind"] == "call"]
    draw = random.Random(0)
    graded(sandbox, HONEST)
    before = _held()
    wrong, start = 0, time.monotonic()
    for i in range(count):
        if i % 50 == 25:
            row = draw.choice(hostile)
            found = graded(sandbox, row["code"], {**CALL, "processes": row["procs"]}, QUICK)
            wrong += found.how == "passed"
        else:
            wrong += graded(sandbox, HONEST).how != "passed"
    seconds, after = time.monotonic() - start, _held()
    yield f"{count} gradings: wrong verdicts", f"{wrong} (in {seconds:.0f} s)", "0", not wrong
    for name, most in (("MiB of memory", 4), ("descriptors", 0), ("processes", 0)):
        bar = "no growth" if not most else f"≤ {most} more"
        yield f"{count} gradings: {name}", f"{before[name]} → {after[name]}", bar, after[name] - before[name] <= most


def _held() -> dict[str, int]:
    """Resident memory, open file descriptors and descendant processes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    below: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in below | {os.getpid()}} - below:
        below |= more
    memory = pages * os.sysconf("SC_PAGE_SIZE") >> 20
    return {"MiB of memory": memory, "descriptors": len(os.listdir("/proc/self/fd")), "processes": len(below)}


def become_another_user() -> None:
    """Switches to user 65534 and keeps this Python reachable, even if its folders belong to another user."""
    kernel.unshare(kernel.NEWNS)
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    closed = next((p for p in Path(sys.base_prefix).parents[::-1] if not p.stat().st_mode & 1), None)
    if closed is not None:  # bind the interpreter away, cover the closed folder, and bind it back
        aside = tempfile.mkdtemp()
        kernel.mount(sys.base_prefix, aside, flags=kernel.MS_BIND | kernel.MS_REC)
        kernel.mount("tmpfs", str(closed), "tmpfs", 0, "mode=755")
        os.makedirs(sys.base_prefix)
        kernel.mount(aside, sys.base_prefix, flags=kernel.MS_BIND | kernel.MS_REC)
    os.setgroups([])
    os.setresgid(OTHER, OTHER, OTHER)
    os.setresuid(OTHER, OTHER, OTHER)


def become_nested() -> None:
    """Becomes root of a user namespace without other users, as in a container."""
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.NEWUSER | kernel.NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1\n")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1\n")


def measured(situation: str, tier: str, options: argparse.Namespace) -> list[Finding]:
    """Measures one situation in a separate process and returns its findings."""
    given = [sys.executable, "-m", "bench.sandbox", "--situation", situation, "--tier", tier]
    given += ["--shared", str(options.shared), "--soak", str(options.soak), "--only", options.only]
    # only a single-threaded process can enter a user namespace, and importing numpy starts threads
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, env=alone)
    try:
        return [tuple(finding) for finding in json.loads(done.stdout.splitlines()[-1])]
    except (IndexError, ValueError):
        lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        return [("starts", lines[-1], "yes", False)]


def inside(options: argparse.Namespace) -> int:
    """Enters a situation, executes this module again inside it, measures there, and prints JSON."""
    if not options.entered:
        {"this user": lambda: None, "another user": become_another_user, "nested": become_nested}[options.situation]()
        os.execv(sys.executable, [sys.executable, "-m", "bench.sandbox", *sys.argv[1:], "--entered"])
    sandbox = Sandbox(options.tier, slots=1)
    parts: list[tuple[str, Callable[[], Iterator[Finding]]]] = [("cases", lambda: catalogue(sandbox, options.shared))]
    if options.situation == "this user":
        parts += [
            ("data", lambda: data_sets(sandbox, options.shared)),
            ("speed", lambda: speed(sandbox, options.shared)),
            ("soak", lambda: soak(sandbox, options.shared, options.soak)),
        ]
    findings = [finding for name, part in parts if options.only in name for finding in part()]
    sandbox.close()
    print(json.dumps(findings))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sandbox", description="Benchmark the sandbox.")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with sandbox/ and data/")
    parser.add_argument("--only", default="", help="cases, data, speed or soak")
    parser.add_argument("--tier", choices=TIERS, help="one tier (default: all)")
    parser.add_argument("--soak", type=int, default=5000, help="gradings in the soak test")
    parser.add_argument("--situation", choices=SITUATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--entered", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.situation and options.tier:
        return inside(options)
    met = True
    print("| tier | run as | measure | value | target |\n|---|---|---|---|---|")
    for tier in [options.tier] if options.tier else TIERS:
        for situation in SITUATIONS:
            for name, value, bar, good in measured(situation, tier, options):
                print(f"| {tier} | {situation} | {name} | {value} | {'' if good else 'missed: '}{bar} |", flush=True)
                met &= good
    return 0 if met else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(str(error))
