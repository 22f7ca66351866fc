"""`posttrain pipeline`: the live lines of each stage, then the table of cards and what was expected."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.cli import tables as show
from posttrain.cli.report import write_report
from posttrain.pipelines import card
from posttrain.pipelines.recipe import read_pipeline
from posttrain.pipelines.runner import Ended, Record, Screen, run_pipeline


def run_command(
    out: Console, file: Path, settings: Mapping[str, str], folder: str, mini: bool, again: str, as_json: bool
) -> None:
    """Reads, runs and reports. Exits with 128 + the signal's number where one stopped it."""
    pipeline = read_pipeline(file, settings, mini)
    place = Path(folder or f"runs/{pipeline.name}{'-mini' if mini else ''}")
    screen = Screen(lambda text: out.print(Text(text), soft_wrap=True), lambda recipe: show.StepLine(out, recipe))
    if pipeline.about:
        out.print(Text(pipeline.about))
    ended = run_pipeline(pipeline, place, screen, again)
    if ended.stopped_by:
        out.print(f"Stopped and saved. Go on with the same command; {place} keeps what is done.", soft_wrap=True)
        sys.exit(128 + ended.stopped_by)
    out.print(cards_table(ended.records))
    for name, (low, high) in ended.missed.items():
        found = ended.results[name]
        out.print(Text(f"not as expected: {name} is {found:.4g}, expected {low:g} to {high:g}", style="yellow"))
    if pipeline.expect:
        out.print(f"expected results: {len(pipeline.expect) - len(ended.missed)} of {len(pipeline.expect)} met")
    out.print(f"report: {write_report(place)}", soft_wrap=True)
    if as_json:
        click.echo(json.dumps(as_dict(ended)))


def cards_table(records: list[Record]) -> Table:
    """One line of numbers for every capability, one column for every examined stage."""
    examined = [record for record in records if record.card]
    table = Table(title="Every model, examined on the same held-out tasks (95 % intervals)", title_justify="left")
    table.add_column("")
    for record in examined:
        table.add_column(record.name, justify="right")
    columns = [dict(card.rows(record.card or {})) for record in examined]
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "–") for column in columns))
    return table


def as_dict(ended: Ended) -> dict[str, Any]:
    """For JSON."""
    return {"folder": str(ended.folder), "results": ended.results, "missed": sorted(ended.missed)}
