"""`posttrain cluster`: starts and stops a Ray cluster on this machine, and shows who works for a run."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def cluster() -> None:
    """Start, stop and watch a cluster."""


@cluster.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="This machine's address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=6379, show_default=True, help="Port of the head.")
@click.option("--cpus", type=click.IntRange(min=1), help="Workers that it takes.  [default: one for each CPU]")
@click.option("--json", "as_json", is_flag=True, help="Print the address and the token's file as JSON on stdout.")
def up(host: str, port: int, cpus: int | None, as_json: bool) -> None:
    """Start the head of a Ray cluster on this machine.

    Prints how other machines join and how a run uses it. Everybody who has its token can run programs on its machines;
    without --host, only this machine can connect.
    """
    from posttrain.cli import tables

    out = tables.console(as_json)
    with out.status("starting Ray"):
        from posttrain.cluster import node

        head = node.start(host, port, cpus)
    if as_json:
        click.echo(json.dumps({"address": head.address, "pid": head.pid, "token": head.token}))
        return
    click.echo(f"A cluster runs at {head.address}; its token is in {head.token}.\n")
    click.echo("Use it for a run, here:")
    click.echo(f"  posttrain grpo RECIPE --cluster.backend ray --cluster.address {head.address} --cluster.samplers 2\n")
    if host == "127.0.0.1":
        click.echo("Other machines cannot join: it listens on this machine only. Start it with --host ADDRESS.\n")
    else:
        click.echo("Let another machine join, after copying the token's file to it:")
        click.echo(f"  {node.join_command(head)}\n")
    click.echo("Stop it:\n  posttrain cluster down")


@cluster.command()
def down() -> None:
    """Stop what `posttrain cluster up` has started on this machine."""
    from posttrain.cli import tables

    with tables.console().status("stopping Ray"):
        from posttrain.cluster import node

        head = node.stop()
    click.echo(f"The cluster at {head.address} has stopped." if head else "No cluster runs on this machine.")


@cluster.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print the workers as JSON on stdout.")
def status(run: str, as_json: bool) -> None:
    """Show who works for a run.

    Every worker with its role, process, machine and state, what it has done, and the deaths and restarts so far.
    """
    from posttrain.cli import tables, workers
    from posttrain.store import workers as record
    from posttrain.store.run import Run

    with Run.read(Path(run)) as store:
        found, running = record.read(store.folder), store.status() == "running"
        notes = [(event.step, event.message) for event in store.events() if event.kind == "cluster"]
    if found is None:
        click.echo("{}" if as_json else f"{run} has no workers: everything is computed in its own process.")
        return
    if not running:
        record.ended(found)
    if as_json:
        click.echo(json.dumps({**found, "running": running, "notes": [{"step": s, "text": t} for s, t in notes]}))
    else:
        workers.show(tables.console(), run, found, running, notes)
