"""Reads who worked for a run: `cluster.json`, which posttrain/cluster/record.py writes in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.types import Json, JsonView

FILE = "cluster.json"
RUN_ENDED, STARTED_ANEW = "the run has ended", "all workers start anew after a learner died"  # why a worker was ended
DONE = {"learner": "micro-batches", "sampler": "completions", "judge": "completions scored"}
"""Role → what its workers' counts are of."""


def read(folder: Path) -> Json | None:
    """The record of a run's latest process; None if it had no workers."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def ended(found: Json) -> None:
    """Corrects the record of a process that is gone, which ends its workers, too."""
    for row in found["workers"]:
        if row["state"] in ("starting", "alive"):
            row.update(state="ended", reason="the run's process has ended")


def counts(found: JsonView) -> dict[str, tuple[int, int]]:
    """(deaths, workers started after a death) by role; learners start anew together."""
    roles = dict.fromkeys(row["role"] for row in found["workers"])
    out: dict[str, tuple[int, int]] = {}
    for role in roles:
        rows = [row for row in found["workers"] if row["role"] == role]
        gone = [row for row in rows if row["state"] == "dead" or row["reason"] == STARTED_ANEW]
        first = min((row["ended"] for row in gone if row["ended"] is not None), default=float("inf"))
        out[role] = sum(row["state"] == "dead" for row in rows), sum(row["started"] >= first for row in rows)
    return out
