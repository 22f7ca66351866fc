"""What a side of a comparison says to the harness: how it waits for its turn, and how much memory it has used.

Each side runs in a process of its own. It reads a line from its input, does one step, and answers with one line of
JSON; at the end of its input it leaves. Imported by both sides, so it needs nothing but Python.
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
    """A field of /proc/self/status in bytes: `VmRSS` is what is used now, `VmHWM` the most that ever was."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}; peak memory is only measured on Linux.")


class Turns:
    """The harness's end of the line. What a library prints goes to the error output, not into the answers."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._start = self._begun = 0.0

    def loaded(self) -> None:
        """Says that the model is in memory, and counts the peak from here on."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._say(loaded=memory("VmRSS"))

    def wait(self) -> None:
        """Waits for the turn and starts the clock; leaves when there will be none."""
        if not sys.stdin.readline():
            self._out.close()
            os._exit(0)  # trainers are left in the middle of their loops
        self._start, self._begun = time.perf_counter(), time.process_time()

    def done(self, **facts: Any) -> None:
        """Stops the clock and tells the harness how long the step took and what it did."""
        seconds = time.perf_counter() - self._start
        self._say(seconds=seconds, cpu=time.process_time() - self._begun, peak=memory("VmHWM"), **facts)

    def _say(self, **facts: Any) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()


def reward(text: str) -> float:
    """The reward of both sides: the share of even digits and vowels among an answer's characters."""
    return sum(letter in "02468aeiou" for letter in text) / max(1, len(text))
