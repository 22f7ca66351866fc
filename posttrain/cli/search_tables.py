"""Terminal output of a search: progress line and tables of results."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.cli.tables import LiveLine, printable
from posttrain.evaluation.intervals import Estimate
from posttrain.search.solve import Searched


class SearchLine(LiveLine):
    """Live progress line of a search; a line for each tenth of the problems if the output is no terminal."""

    def __init__(self, out: Console) -> None:
        super().__init__(out, "loading model and data")
        self._began = time.monotonic()
        self._shown = -1

    def __call__(self, done: int, total: int, tokens: int) -> None:
        """Shows how many problems are done, and the tokens that were generated."""
        if not tokens:
            self._began = time.monotonic()
        seconds = max(1e-9, time.monotonic() - self._began)
        line = f"problem {done}/{total} · {tokens:,} tokens" + (
            f" · {tokens / seconds:,.0f} tokens/s" if tokens else ""
        )
        tenth = 10 * done // max(1, total)
        self.show(line, tenth != self._shown)
        self._shown = tenth


def searched(out: Console, model: str, found: Searched, written: Mapping[str, int]) -> None:
    """Prints a search's report and the files written."""
    report = found.report
    by = f", scorer {report.scorer}" if report.scorer else ""
    title = f"{model}: {report.strategy}, budget {report.budget}{by}, {report.tasks} tasks"
    table = Table(title=printable(title), title_justify="left")
    for name in ("", "value", "95 % interval"):
        table.add_column(name, justify="right" if name else "left")
    for name, share in (("accuracy of the chosen completion", report.accuracy), ("coverage", report.coverage)):
        table.add_row(name, f"{share.value:.1%}", f"{share.low:.1%} – {share.high:.1%}")
    counts = {"completions per task": report.candidates, "tokens generated per task": report.generated}
    for name, estimate in (counts | {"tokens scored per task": report.scored}).items():
        table.add_row(name, *number(estimate))
    if report.unverified:
        table.add_row("not verified", str(report.unverified), "")
    out.print(table)
    for note in report.notes:
        out.print(Text(f"note: {printable(note)}"), soft_wrap=True)
    if found.folder:
        out.print(f"results: {found.folder}", soft_wrap=True)
    for path, count in written.items():
        out.print(f"{count} rows: {path}", soft_wrap=True)


def number(estimate: Estimate) -> tuple[str, str]:
    """A mean and its interval as text."""
    if estimate.low == estimate.high:
        return f"{estimate.value:,.1f}", ""
    return f"{estimate.value:,.1f}", f"{estimate.low:,.1f} – {estimate.high:,.1f}"
