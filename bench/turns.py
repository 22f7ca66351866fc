"""Protocol between a side of a comparison and the harness: turns, timing and peak memory.

Each side runs in its own process. It reads a line from standard input, runs one step, and replies with one line of
JSON; it exits at the end of its input. Both sides import this module, so it uses only the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20


def memory(name: str) -> int:
    """A field of /proc/self/status in bytes: `VmRSS` is the current resident memory, `VmHWM` its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}; peak memory is only measured on Linux.")


class Turns:
    """A side's end of the protocol. Library output is redirected to standard error, so it cannot mix with replies."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._start = self._begun = 0.0

    def loaded(self) -> None:
        """Reports that the model is loaded and resets the peak-memory counter."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._say(loaded=memory("VmRSS"))

    def wait(self) -> None:
        """Waits for the next turn and starts the clock; exits at the end of input."""
        if not sys.stdin.readline():
            self._out.close()
            os._exit(0)  # stops trainers in the middle of their loops
        self._start, self._begun = time.perf_counter(), time.process_time()

    def done(self, **facts: Any) -> None:
        """Stops the clock and reports the step's time, peak memory and `facts` to the harness."""
        seconds = time.perf_counter() - self._start
        self._say(seconds=seconds, cpu=time.process_time() - self._begun, peak=memory("VmHWM"), **facts)

    def _say(self, **facts: Any) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()


def reward(text: str) -> float:
    """The reward on both sides: the share of even digits and vowels among a completion's characters."""
    return sum(letter in "02468aeiou" for letter in text) / max(1, len(text))
