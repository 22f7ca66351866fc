"""`posttrain data`: checks and converts data files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from posttrain.cli.arguments import FREE, split_settings
from posttrain.types import ConfigError

ALGORITHMS = ("sft", "dpo", "kto", "grpo")


@click.group()
def data() -> None:
    """Check and convert data files."""


@data.command(context_settings=FREE, epilog="Override data, algo, reward and other settings with --section.key value.")
@click.argument("file")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
@click.option("--model", default="abacus", show_default=True, help="Model whose tokenizer and chat template are used.")
@click.option("--algo", type=click.Choice(ALGORITHMS), help="What the rows are for.  [default: by their columns]")
@click.option("--rows", "shown", default=5, show_default=True, help="Number of rows to show.")
@click.option("--ids", is_flag=True, help="Show token ids, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def check(file: str, args: Sequence[str], model: str, algo: str | None, shown: int, ids: bool, as_json: bool) -> None:
    """Show how a data file is read, before training on it.

    Prints rows as the model sees them with the trained tokens marked, counts and lengths, what is left out and why, and
    columns that nothing reads. The exit code is 0 if the file can be trained on.
    """
    from posttrain.cli import tables

    words, settings = split_settings(args)
    if words:
        raise ConfigError(f"unexpected argument {words[0]!r}; settings are written --section.key value.")
    out = tables.console(as_json)
    with out.status(f"reading {file}"):
        from posttrain.cli import data_check

        found = data_check.check(file, model, algo or "", settings, shown)
    if as_json:
        click.echo(json.dumps(found.as_dict(ids)))
    else:
        data_check.show(out, found, ids)


@data.command()
@click.argument("file")
@click.option("--to", required=True, help="New .jsonl file.")
@click.option("--format", "layout", default="", help="Layout of the rows; without it, known layouts are recognised.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Rename a column first; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON on stdout.")
def convert(file: str, to: str, layout: str, rename: Sequence[str], as_json: bool) -> None:
    """Convert a data file to JSON Lines with the columns that training reads.

    FILE is JSON Lines, JSON, CSV, TSV, Parquet or a hub id. docs/guides/data.md lists the layouts.
    """
    from posttrain.cli import tables
    from posttrain.config import nearest

    pairs: list[Any] = [text.split("=", 1) for text in rename]
    if wrong := next((text for text, pair in zip(rename, pairs, strict=True) if len(pair) != 2 or not all(pair)), None):
        raise ConfigError(f"--rename {wrong!r} is not of the form OLD=NEW.")
    with tables.console(as_json).status(f"converting {file}"):
        from posttrain.data.convert import FORMATS, convert_file

        if layout and layout not in FORMATS:
            raise ConfigError(f"unknown format {layout!r}{nearest(layout, [*FORMATS])}")
        found = convert_file(file, to, layout, dict(pairs))
    if as_json:
        click.echo(json.dumps({"file": to, "rows": dict(found)}))
        return
    for name, count in found.items():
        click.echo(f"{count} rows {f'converted from {name}' if name else 'written as they are'}")
    click.echo(to)
