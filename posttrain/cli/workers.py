"""Prints the workers of a run: who they are, what they have done, deaths and restarts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.cli.tables import printable
from posttrain.store.workers import DONE, counts
from posttrain.types import JsonView


def show(out: Console, run: str, found: JsonView, running: bool, notes: Sequence[tuple[int, str]]) -> None:
    """Prints a run's record (cluster/record.py) as a table, then its notes on the cluster."""
    driver = found["driver"]
    state = "running" if running else "not running"
    table = Table(title=f"{run}: {state}, pid {driver['pid']} on {driver['machine']}", title_justify="left")
    for name in ("worker", "role", "where", "state", "has done"):
        table.add_column(name, overflow="fold")
    for row in found["workers"]:
        state = row["state"] + (f": {row['reason']}" if row["state"] == "dead" else "")
        done = f"{row['done']} {DONE[row['role']]}"
        table.add_row(row["name"], row["role"], row["where"], Text(printable(state)), done)
    out.print(table)
    for role, (deaths, restarts) in counts(found).items():
        out.print(f"{role}s: {deaths} died, {restarts} started again", highlight=False)
    for step, text in notes:
        out.print(Text(f"step {step}: {printable(text)}"), soft_wrap=True)
