"""A real lab for tests: the command itself on a free port, and the system's Chromium where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from playwright.sync_api import Page

from posttrain.store.run import EpisodeRow, Event, Run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None
)  # the headless shell draws no window of its own, which saves time
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
PATIENCE = 90_000  # milliseconds: the machine may be busy with something else
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(2)>"\'&\x1b[2J\u202e'


@dataclass(frozen=True)
class Opened:
    """A lab that answers at `address`; `token` is what its own pages carry."""

    address: str
    token: str
    port: int
    process: subprocess.Popen[str]


@contextmanager
def opened(folder: Path, *more: str) -> Iterator[Opened]:
    """`posttrain lab` on `folder` until the block ends."""
    command = [sys.executable, "-u", "-m", "posttrain", "lab", str(folder), "--port", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = ""
        while not (found := re.search(r"http://\S+:(\d+)/\S*", said)):
            line = process.stdout.readline()
            assert line, f"the lab did not open: {said}"
            said += line
        process.stdout.readline()  # the line after it
        token = found[0].partition("?token=")[2]
        if not token:
            page = urllib.request.urlopen(found[0], timeout=600).read().decode()
            token = page.partition('name="lab-token" content="')[2].partition('"')[0]
        yield Opened(found[0].partition("?")[0].rstrip("/"), token, int(found[1]), process)
    finally:
        process.terminate()
        process.wait(timeout=600)
        if process.stdout is not None:
            process.stdout.close()


def accessibility(page: Page) -> list[str]:
    """What axe-core finds wrong with the page that is open, a line each."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))  # evaluated past the content policy, as a tester's tool
    found = page.evaluate("axe.run().then((r) => r.violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html)}`))")
    return [str(line) for line in found]


def too_wide(page: Page) -> bool:
    """Whether the page as a whole scrolls sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))


def row(step: int, group: int, index: int, text: str, reward: float | None, prompt: str = "What is 2+3?") -> EpisodeRow:
    """A stored answer of six tokens, four of them the model's."""
    error = "the verifier ran out of time" if reward is None else None
    tokens, mask = np.arange(3, 9, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], bool)
    logprobs = np.array([0, 0, -0.05, -0.9, -3.0, -6.0], np.float32)
    right = reward is not None and reward > 0.5
    return EpisodeRow("train", step, group, index, f"sums:{group}", prompt, text, reward, right, "stop", 4,
                      {"correct": reward or 0.0, "format": 1.0}, error, tokens, mask, logprobs, 0.5)  # fmt: skip


def write_step(run: Run, step: int, reward: float, rows: list[EpisodeRow], events: list[Event] | None = None) -> None:
    """One step with a few metrics."""
    numbers = {"reward": reward, "accuracy": reward, "loss": 1 / step, "entropy": 0.5, "flat_groups": 0.25}
    held_out = {"eval/accuracy": reward, "eval/accuracy_low": reward - 0.1, "eval/accuracy_high": reward + 0.1}
    run.write(step, {**numbers, **(held_out if step in (1, 5) else {})}, {"seconds": 1.0}, rows, events or [])


def header(name: str = "abacus") -> dict[str, object]:
    """What a run says of itself, in short."""
    recipe = {"model": {"path": name}, "data": {"tasks": "sums"}, "train": {"steps": 5}, "run": {"seed": 0}}
    return {"algorithm": "grpo", "recipe": recipe, "created": "2026-01-02T03:04:05+0000"}


def hostile_run(folder: Path) -> Path:
    """A finished run whose prompt, answers, task names and notes all try to be markup."""
    with Run.create(folder, header("nowhere/model")) as run:
        for step in range(1, 6):
            rows = [row(step, g, i, f"{HOSTILE} {step}.{g}.{i}", 1.0 if g == 0 else i / 2, HOSTILE)
                    for g in range(2) for i in range(3)]  # fmt: skip
            write_step(run, step, step / 5, rows, [Event("warning", "data", HOSTILE)])
        write_step(run, 6, 0.9, [row(6, 0, 0, "late answer", None), row(6, 0, 1, "needle in the hay", 0.0)])
        run.finish({"steps": 6})
    return folder
