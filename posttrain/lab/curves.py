"""A run's curves for the browser: read once, extended by new steps only, downsampled before they are sent.

A run of 10,000 steps has some 400,000 numbers, while a page draws a few hundred points per curve. Each bucket of steps
keeps its lowest and its highest value, so that a spike of a single step stays visible.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.evaluation.labels import CHANGES
from posttrain.store.database import connect

BUCKETS = 300
AT_LEAST = 0.4  # minimum seconds between two reads of one database, however many pages watch it
MAIN = (
    "reward", "accuracy", "eval/accuracy", "think_share", "length", "kl_episode", "kl", "entropy", "truncated",
    "flat_groups", "nll", "eval/nll", "preference_accuracy", "eval/preference_accuracy", "pair_accuracy",
    "eval/pair_accuracy", "step_accuracy", "eval/step_accuracy", "loss", "grad_norm",
)  # fmt: skip
"""Metrics that a run's page shows by default, if the run has them; others on request."""
MOST_AT_ONCE = 9
AT_ONCE = {*MAIN, *(f"{name}{end}" for name, _, _ in CHANGES for end in ("", "_low", "_high"))}
"""Metrics that are read with a run; others are read on request."""
_NAN = float("nan")


def thin(steps: np.ndarray, values: np.ndarray, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Downsamples (steps, values), both (N,), to at most 2·`buckets` points plus the last.

    Each bucket of equally many points keeps its lowest and highest value, in order. Non-finite values are kept only if
    a bucket holds nothing else.
    """
    n = len(steps)
    if n <= 2 * buckets:
        return steps, values
    edges = np.linspace(0, n, buckets + 1).astype(int)
    kept: list[int] = []
    for first, end in zip(edges, edges[1:], strict=False):
        part = values[first:end]
        finite = np.flatnonzero(np.isfinite(part))
        if not len(finite):
            kept.append(int(first))
            continue
        ends = {int(finite[np.argmin(part[finite])]), int(finite[np.argmax(part[finite])])}
        kept += [int(first) + i for i in sorted(ends)]
    if kept[-1] != n - 1:
        kept.append(n - 1)
    return steps[kept], values[kept]


def as_json(steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> list[list[Any]]:
    """[steps, values] with null for non-finite values, rounded to seven digits, more than a screen shows."""
    return [[int(s) for s in steps], [float(f"{v:.7g}") if np.isfinite(v) else None for v in values]]


class Feed:
    """All metrics of one run, shared by the pages that watch it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = -1
        """The latest step read; -1 before the first."""
        self.version = 0
        """How often previously read steps were replaced, because the run was resumed from an earlier step."""
        self._known: dict[str, None] = {}
        self._curves: dict[str, tuple[array[int], array[float]]] = {}  # of requested metrics
        self._newest: dict[str, float | None] = {}
        self._looked = -AT_LEAST
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """All metrics: the main ones first, the others by name."""
        main = [name for name in MAIN if name in self._known]
        return main + sorted(self._known.keys() - set(main))

    @property
    def shown(self) -> list[str]:
        """Metrics that are shown by default."""
        return ([name for name in MAIN if name in self._known] or self.names)[:MOST_AT_ONCE]

    def refresh(self) -> None:
        """Reads new steps, or everything if the run was rewound. Raises ResumeError."""
        with self._lock:
            if time.monotonic() - self._looked < AT_LEAST:
                return
            database = connect(self.folder, "ro")
            try:
                if not self._still_there(database):
                    self._known, self._curves, self.step = {}, {}, -1
                    self.version += 1
                newest = database.execute("SELECT max(step) FROM metrics").fetchone()[0]
                if newest is not None and newest > self.step:
                    self._read(database, newest)
                self._newest = self._row(database, self.step)
            finally:
                database.close()
            self._looked = time.monotonic()

    def _read(self, database: Any, newest: int) -> None:
        """Reads the steps after the latest known one up to `newest`, for the metrics that are kept."""
        names = database.execute("SELECT DISTINCT name FROM metrics WHERE step > ? AND step <= ?", (self.step, newest))
        fresh = [name for (name,) in names if name not in self._known]
        self._extend(database, [*self._curves], self.step, newest)
        self._extend(database, [name for name in fresh if name in AT_ONCE], -1, newest)
        self._known |= dict.fromkeys(fresh)
        self.step = newest

    def _extend(self, database: Any, names: Sequence[str], after: int, until: int) -> None:
        fresh: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in names}
        wanted = f"step > ? AND step <= ? AND name IN ({', '.join('?' * len(names))})"
        rows = database.execute(
            f"SELECT step, name, value FROM metrics WHERE {wanted} ORDER BY step", (after, until, *names)
        )
        for step, name, value in rows if names else ():
            steps, values = fresh[name]
            steps.append(step)
            values.append(_NAN if value is None else value)
        for name, (steps, values) in fresh.items():
            kept = self._curves.setdefault(name, (array("q"), array("d")))
            kept[0].extend(steps)
            kept[1].extend(values)

    def _still_there(self, database: Any) -> bool:
        """Whether the latest step read is unchanged; a step replayed by a resume has equal numbers."""
        return self.step < 0 or self._row(database, self.step) == self._newest

    @staticmethod
    def _row(database: Any, step: int) -> dict[str, float | None]:
        return dict(database.execute("SELECT name, value FROM metrics WHERE step = ?", (step,)))

    def arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, both (N,); empty if the run does not have it."""
        with self._lock:
            if name in self._known and name not in self._curves:  # not requested before
                database = connect(self.folder, "ro")
                try:
                    self._extend(database, [name], -1, self.step)
                finally:
                    database.close()
            steps, values = self._curves.get(name, (array("q"), array("d")))
            return np.array(steps, np.int64), np.array(values, float)

    def curves(self, names: Sequence[str]) -> dict[str, list[list[Any]]]:
        """Whole curves, downsampled."""
        return {name: as_json(*thin(*self.arrays(name))) for name in names if name in self._known}

    def since(self, names: Sequence[str], step: int) -> dict[str, list[list[Any]]]:
        """All points after `step`; metrics without new points are left out."""
        found: dict[str, list[list[Any]]] = {}
        for name in names:
            steps, values = self.arrays(name)
            first = int(np.searchsorted(steps, step, side="right"))
            if first < len(steps):
                found[name] = as_json(steps[first:], values[first:])
        return found

    def changes(self) -> list[dict[str, str]]:
        """Held-out results at the first and the last evaluation, with 95 % intervals where available."""
        rows: list[dict[str, str]] = []
        for name, label, form in CHANGES:
            steps, values = self.arrays(name)
            if len(steps):
                before, after = (self._measured(name, form, int(steps[i])) for i in (0, -1))
                row = {"name": name, "label": label, "before": before, "after": after if len(steps) > 1 else ""}
                rows.append(row | {"from": str(steps[0]), "to": str(steps[-1])})
        return rows

    def _measured(self, name: str, form: str, step: int) -> str:
        value, low, high = (self._at(f"{name}{end}", step) for end in ("", "_low", "_high"))
        assert value is not None
        if not np.isfinite(value):
            return "–"
        span = "" if low is None or high is None else f" [{form.format(low)}, {form.format(high)}]"
        return form.format(value) + span

    def _at(self, name: str, step: int) -> float | None:
        steps, values = self.arrays(name)
        i = int(np.searchsorted(steps, step))
        return float(values[i]) if i < len(steps) and steps[i] == step else None
