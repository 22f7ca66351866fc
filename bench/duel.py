"""Runs two sides of a comparison in separate processes, alternating one step of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from bench.environment import ROOT
from bench.turns import MIB

Which = Literal["ours", "peer"]
TOLERANCE = 2e-3  # between the sides' losses, relative above 1: rounding errors grow over updates


class SideFailed(RuntimeError):
    """A side exited early; its own messages are on standard error."""


@dataclass
class Series:
    """Measurements of one side: time and facts of each measured step, and memory in bytes."""

    settings: dict[str, Any]
    seconds: list[float] = field(default_factory=list[float])
    cpu: list[float] = field(default_factory=list[float])  # CPU seconds: below threads × seconds on a busy machine
    tokens: list[int] = field(default_factory=list[int])
    losses: list[float] = field(default_factory=list[float])
    loaded: int = 0
    peak: int = 0

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def above(self) -> int:
        """Peak memory above what the process used once its model was loaded."""
        return self.peak - self.loaded


class Side:
    """A process that runs one step on request."""

    def __init__(self, python: Path, module: str, job: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.series = Series(dict(settings))
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "job.json"
        path.write_text(json.dumps({**job, "settings": dict(settings)}), encoding="utf-8")
        kept = {"POSTTRAIN_CACHE": self._folder.name, "TOKENIZERS_PARALLELISM": "false"}
        threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [str(python), "-m", module, str(path)],
            cwd=ROOT,
            env={**os.environ, **kept, **threads, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": self._folder.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.series.loaded = int(self._answer()["loaded"])

    def step(self, keep: bool = True) -> float:
        """Runs one step and returns its seconds; `keep` adds it to the series."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # if it has exited, reading its reply reports that
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        facts = self._answer()
        series = self.series
        series.peak = max(series.peak, int(facts["peak"]))
        series.losses.append(float(facts.get("loss", 0.0)))
        series.tokens.append(int(facts["tokens"]))
        if keep:
            series.seconds.append(float(facts["seconds"]))
            series.cpu.append(float(facts["cpu"]))
        return float(facts["seconds"])

    def close(self) -> None:
        """Ends the process and removes its job folder."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self.close()
            code = self._process.returncode
            raise SideFailed(f"a side exited early with code {code}; see its own messages above.")
        return json.loads(line)


@dataclass(frozen=True)
class Sides:
    """Starts either side of a comparison; any module that follows the protocol of bench/turns.py can be the peer."""

    peer: Path  # Python executable
    threads: int
    module: str = "bench.side_peer"

    def start(self, which: Which, job: Mapping[str, Any], settings: Mapping[str, Any]) -> Side:
        """Starts a process that has the model loaded and waits for its first turn."""
        python, module = (self.peer, self.module) if which == "peer" else (Path(sys.executable), "bench.side_ours")
        return Side(python, module, {**job, "threads": self.threads}, settings)

    def fastest(
        self, which: Which, job: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """The settings with the fastest second step; settings that a side rejects are reported and skipped.

        Settings whose first step takes twice as long as the best second step so far get no second step.
        """
        if len(candidates) == 1:
            return candidates[0]
        times: list[tuple[float, int]] = []
        for number, settings in enumerate(candidates):
            try:
                with self.start(which, job, settings) as side:
                    seconds = side.step(keep=False)
                    if not times or seconds < 2 * min(times)[0]:
                        seconds = side.step()
            except SideFailed as error:
                print(f"    {which} {dict(settings)}: {error}", flush=True)
                continue
            print(f"    {which} {dict(settings)}: {seconds:.2f} s", flush=True)
            times.append((seconds, number))
        if not times:
            raise SideFailed(f"all {len(candidates)} candidate settings of {which} failed.")
        return candidates[min(times)[1]]

    def duel(
        self,
        job: Mapping[str, Any],
        ours: Mapping[str, Any],
        peer: Mapping[str, Any],
        rounds: int,
    ) -> tuple[Series, Series]:
        """One warm-up step each, then `rounds` steps each, alternating."""
        with self.start("ours", job, ours) as a, self.start("peer", job, peer) as b:
            for side in (a, b):
                side.step(keep=False)
            for _ in range(rounds):
                a.step()
                b.step()
            return a.series, b.series


def check(job: Mapping[str, Any], ours: Series, peer: Series) -> str:
    """Checks that both sides did the same work; returns the problem, or an empty string.

    Token counts must be equal in every step. Where nothing is sampled, the losses must agree in every step, too.
    """
    if ours.tokens != peer.tokens:
        return f"the sides did not do the same work: {ours.tokens} tokens against {peer.tokens}"
    if job["kind"] in ("sft", "dpo"):
        for step, (mine, theirs) in enumerate(zip(ours.losses, peer.losses, strict=True)):
            if not abs(mine - theirs) <= TOLERANCE * max(1.0, abs(theirs)):
                return f"the losses of step {step + 1} differ: {mine:.6f} against {theirs:.6f}"
    return ""


def mebibytes(count: int) -> str:
    return f"{count / MIB:,.0f}"
