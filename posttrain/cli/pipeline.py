"""`posttrain pipeline`: live progress of each stage, then the table of cards and the expected results."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.cli import tables
from posttrain.cli.report import write_report
from posttrain.pipelines import card
from posttrain.pipelines.recipe import read_pipeline
from posttrain.pipelines.runner import PipelineResult, Record, Screen, run_pipeline
from posttrain.types import Json


def run_command(
    out: Console, file: Path, settings: Mapping[str, str], folder: str, mini: bool, again: str, as_json: bool
) -> None:
    """Reads and runs a pipeline and writes its report. Exits with 128 + the signal's number if a signal stopped it."""
    pipeline = read_pipeline(file, settings, mini)
    place = Path(folder or f"runs/{pipeline.name}{'-mini' if mini else ''}")
    screen = Screen(lambda text: out.print(Text(text), soft_wrap=True), lambda recipe: tables.StepLine(out, recipe))
    if pipeline.about:
        out.print(Text(pipeline.about))
    ended = run_pipeline(pipeline, place, screen, again)
    if ended.stopped_by:
        out.print(f"Stopped and saved. Run the same command again to continue in {place}.", soft_wrap=True)
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
    """One row per card metric, one column per evaluated stage."""
    evaluated = [record for record in records if record.card]
    table = Table(title="Every model on the same held-out tasks (95 % intervals)", title_justify="left")
    table.add_column("")
    for record in evaluated:
        table.add_column(record.name, justify="right")
    columns = [dict(card.rows(record.card or {})) for record in evaluated]
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "–") for column in columns))
    return table


def as_dict(ended: PipelineResult) -> Json:
    """A JSON-serialisable dict."""
    return {"folder": str(ended.folder), "results": ended.results, "missed": sorted(ended.missed)}
