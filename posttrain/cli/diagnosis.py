"""Prints the diagnosis of a run: verdicts, evidence and advice."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.cli.tables import printable
from posttrain.evaluation.diagnose import SEVERITY
from posttrain.evaluation.run_evidence import Diagnosis


def show_diagnosis(out: Console, folder: str, found: Sequence[Diagnosis]) -> None:
    """Prints the verdicts with advice as a table, worst first, then the checks without data."""
    marks = {"alarm": ("✗ alarm", "red"), "warn": ("! warn", "yellow"), "ok": ("✓ ok", "green")}
    table = Table(title=folder, title_justify="left", show_lines=True)
    for name in ("check", "verdict", "since step", "evidence and what to do"):
        table.add_column(name, overflow="fold")
    judged = [one for one in found if one.level != "no data"]
    for one in sorted(judged, key=lambda one: -SEVERITY.index(one.level)):
        mark, style = marks[one.level]
        text = Text(printable(one.evidence)) + Text(f"\n→ {printable(one.advice)}" if one.advice else "", style="bold")
        table.add_row(one.name, Text(mark, style=style), "" if one.since is None else str(one.since), text)
    if judged:
        out.print(table)
    for one in found:
        if one.level == "no data":
            out.print(Text(f"{one.name}: no data ({one.evidence})", style="dim"), soft_wrap=True)
