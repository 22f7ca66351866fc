"""The frontier of a comparison of searches: tables for the terminal, an HTML page and a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.cli import html
from posttrain.cli.tables import printable
from posttrain.pipelines.plots import Panel, Series, save
from posttrain.search.compare import FILE, Comparison
from posttrain.search.frontier import Best, by_strategy

PAGE, PICTURE = "report.html", "frontier"
POINTS = ("strategy", "budget", "tokens per task", "accuracy", "95 % interval", "chosen score")
OPTIMAL = ("tokens per task", "tasks", "best", "accuracy", "95 % interval", "ahead of", "by")


def point_rows(found: Comparison) -> list[tuple[str, ...]]:
    """One row for each strategy and budget."""
    return [
        (
            point.strategy, str(point.budget), f"{point.cost.value:,.0f}", f"{point.accuracy.value:.1%}",
            f"{point.accuracy.low:.1%} – {point.accuracy.high:.1%}",
            f"{sum(point.scores) / len(point.scores):.3g}" if point.scores else "",
        )
        for point in found.points
    ]  # fmt: skip


def best_rows(found: Comparison) -> list[tuple[str, ...]]:
    """The compute-optimal strategy for each number of tokens, of all problems and of each third."""

    def row(tokens: float, part: str, best: Best) -> tuple[str, ...]:
        ahead = f"{best.ahead.value:.1%} [{best.ahead.low:.1%}, {best.ahead.high:.1%}]" if best.ahead else ""
        span = f"{best.accuracy.low:.1%} – {best.accuracy.high:.1%}"
        return f"{tokens:,.0f}", part, best.strategy, f"{best.accuracy.value:.1%}", span, best.second, ahead

    return [row(tokens, part, best) for tokens, parts in found.best.items() for part, best in parts.items()]


def findings(found: Comparison) -> list[str]:
    """The advice, and what was found about coverage and over-optimisation, as sentences."""
    out = [found.advice]
    if found.coverage:
        k, share = max(found.coverage.items())
        fit = f"; coverage of k completions ≈ exp({found.law.a:.3g} · k^{found.law.b:.3g})" if found.law else ""
        out.append(f"Coverage of {k} completions: {share}{fit}.")
    out += [
        f"The scorer is over-optimised: with {one.strategy}, from budget {one.peak} to {one.budget}, accuracy changes "
        f"by {one.accuracy.value:.1%} [{one.accuracy.low:.1%}, {one.accuracy.high:.1%}] while the score of the chosen "
        f"completion rises by {one.score.value:.3g}."
        for one in found.over_optimised
    ]  # fmt: skip
    return out + [f"Note: {note}" for note in found.notes]


def show(out: Console, found: Comparison, files: Sequence[Path]) -> None:
    """Prints the comparison."""
    heads = {f"{found.model}: {len(found.tasks)} tasks": (POINTS, point_rows(found)), "Compute-optimal": (
        OPTIMAL, best_rows(found))}  # fmt: skip
    for title, (head, rows) in heads.items():
        table = Table(title=printable(title), title_justify="left")
        for name in head:
            table.add_column(name, justify="left" if name in ("strategy", "tasks", "best", "ahead of") else "right")
        for row in rows:
            table.add_row(*row)
        out.print(table)
    for text in findings(found):
        out.print(Text(printable(text)), soft_wrap=True)
    for path in files:
        out.print(str(path), soft_wrap=True)


def write(found: Comparison) -> list[Path]:
    """Writes the page, and the picture if matplotlib is installed; returns the files of the comparison."""
    folder = found.folder
    assert folder is not None, "a comparison of the command has a folder"
    pictures: list[html.Html] = []
    files = [folder / FILE]
    if importlib.util.find_spec("matplotlib"):
        save(f"{found.model}: test-time search", panels(found), folder, PICTURE)
        pictures.append(html.picture(folder / f"{PICTURE}.svg", "Accuracy against tokens per task, by strategy"))
        files.append(folder / f"{PICTURE}.png")
    title = f"Test-time search with {found.model}"
    about = html.tag("p", findings(found)[0])
    rest = [html.tag("p", text) for text in findings(found)[1:]]
    sections = [
        ("Frontier", html.join(*(html.tag("figure", one) for one in pictures), html.table(
            f"Accuracy and tokens (policy and scorer {found.scorer or 'none'}), {len(found.tasks)} tasks; intervals "
            "are bootstraps over tasks.", POINTS, point_rows(found)))),
        ("Compute-optimal strategies", html.table(
            "The strategy with the highest accuracy at a number of tokens, for all tasks and for thirds by the pass "
            "rate of one completion. Differences are paired over tasks.", OPTIMAL, best_rows(found))),
        ("Findings", html.join(*rest)),
    ]  # fmt: skip
    page = folder / PAGE
    page.write_text(html.page(title, about, sections), encoding="utf-8")
    return [*files, page]


def panels(found: Comparison) -> list[Panel]:
    """Accuracy against tokens for each strategy, and coverage against completions with its fit."""
    curves: list[Series] = []
    for name, own in by_strategy(found.points).items():
        rows = [point.accuracy for point in own]
        values = (tuple(e.value for e in rows), tuple(e.low for e in rows), tuple(e.high for e in rows))
        curves.append(Series(name, tuple(point.cost.value for point in own), *values))
    budgets = tuple(float(k) for k in found.coverage)
    shares = tuple(found.coverage.values())
    seen = Series(
        "coverage", budgets, tuple(e.value for e in shares), tuple(e.low for e in shares), tuple(e.high for e in shares)
    )
    fit = [Series("coverage", budgets, tuple(found.law.at(k) for k in budgets), kind="fit")] if found.law else []
    return [
        Panel("Accuracy", "tokens per task (policy and scorer)", "accuracy", tuple(curves), share=True),
        Panel("Coverage", "completions", "share of tasks", (seen, *fit), share=True),
    ]
