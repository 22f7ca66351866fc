"""Commands that look at runs, recipes and the machine, and train nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from posttrain import config
from posttrain.cli.arguments import FREE, RECIPE_HELP, read_recipe, shipped_recipes, split_settings
from posttrain.types import ConfigError


@click.command()
@click.argument("folder", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON on stdout.")
def runs(folder: str, as_json: bool) -> None:
    """List the runs in a folder."""
    from posttrain.cli import tables as show
    from posttrain.store.run import list_runs

    found = list_runs(Path(folder))
    if as_json:
        rows = [{"path": str(r.path), "status": r.status, "step": r.last_step, "note": r.note} for r in found]
        click.echo(json.dumps(rows))
    elif found:
        show.console().print(show.runs_table(found))
    else:
        click.echo(f"No runs in {folder}. `posttrain demo` makes the first one.")


@click.command()
@click.argument("algorithm", default="grpo")
@click.option("--json", "as_json", is_flag=True, help="Print every preset's settings as JSON on stdout.")
def presets(algorithm: str, as_json: bool) -> None:
    """Table of presets: what papers and other implementations chose.

    Use one with `posttrain ALGORITHM --preset NAME`; any setting given besides it wins.
    """
    if algorithm not in config.PRESETS:
        raise ConfigError(f"{algorithm!r} has no presets{config.nearest(algorithm, list(config.PRESETS))}")
    if as_json:
        names = config.PRESETS[algorithm]
        click.echo(json.dumps({n: {"source": p.source, "differs": p.differs, **p.settings} for n, p in names.items()}))
        return
    from posttrain.cli import tables as show

    show.presets(show.console(), algorithm)


@click.command("config", context_settings=FREE, epilog=RECIPE_HELP)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE|ALGORITHM [--section.key value]...")
@click.option("--explain/--bare", default=True, help="With or without what each setting means.")
def show_config(args: tuple[str, ...], explain: bool) -> None:
    """Print a resolved recipe, every setting explained."""
    words, _ = split_settings(args)
    if not words:
        shipped = ", ".join(shipped_recipes())
        raise ConfigError(f"name a recipe ({shipped}), a TOML file, or an algorithm ({', '.join(config.RECIPES)}).")
    algorithm, recipe = read_recipe(None, args)
    click.echo(config.as_toml(algorithm, recipe, explain), nl=False)


@click.command("plan", context_settings=FREE, epilog=RECIPE_HELP)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE|ALGORITHM [--section.key value]...")
@click.option("--memory", type=float, help="GiB of each device.  [default: this machine's]")
@click.option("--gpus", type=int, default=1, show_default=True, help="GPUs that share weights and optimizer.")
@click.option("--device", default="auto", show_default=True, help="`cpu` or `cuda`; it need not be here.")
@click.option("--probe/--no-probe", default=True, help="Measure speeds for the time, or leave the time out.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
def plan(args: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Memory and time of a run before it starts.

    Says by part what the run holds, whether it fits and which settings to change if not.
    """
    from posttrain.cli import tables as show

    if not split_settings(args)[0]:
        raise ConfigError(f"name a recipe, a TOML file, or an algorithm ({', '.join(config.RECIPES)}).")
    _, recipe = read_recipe(None, args)
    out = show.console(as_json)
    with out.status("planning"):
        from posttrain.planner import estimate

        found = estimate.plan(recipe, **options)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        estimate.show_plan(out, found)


@click.command()
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
@click.option(
    "--fail-on",
    type=click.Choice(["warn", "alarm"]),
    help="With RUN: exit 9 on a verdict this bad (warn, alarm) or worse.",
)
def doctor(run: str | None, as_json: bool, fail_on: str | None) -> None:
    """What this machine offers, measured; with RUN, what is wrong with that run.

    Of the machine: device, speed of each dtype, sandbox layers, reachability of the model hub. Of a run: is the reward
    being hacked, and does training still learn? Each verdict has its evidence, the step where it began and what to do.
    """
    from posttrain.cli import tables as show

    out = show.console(as_json)
    if run is not None:
        from posttrain.evaluation import diagnose

        verdicts = diagnose.diagnose_run(Path(run))
        if as_json:
            click.echo(json.dumps([verdict.as_dict() for verdict in verdicts]))
        else:
            diagnose.show_diagnosis(out, run, verdicts)
        if fail_on and diagnose.at_least(verdicts, fail_on):
            sys.exit(9)
        return
    if fail_on:
        raise ConfigError("--fail-on is about a run; name one: posttrain doctor RUN.")
    with out.status("measuring"):
        from posttrain.cli.doctor import examine

        findings = examine()
    if as_json:
        click.echo(json.dumps(findings))
    else:
        show.doctor(out, findings)


@click.command()
@click.argument("run")
@click.option("--out", help="Where to write it.  [default: RUN/report.html]")
def report(run: str, out: str | None) -> None:
    """One HTML page of a run or a pipeline: tables, plots and samples, in a single file."""
    from posttrain.cli import tables as show
    from posttrain.cli.report import write_report

    with show.console().status(f"reading {run}"):
        written = write_report(Path(run), Path(out) if out else None)
    click.echo(str(written))


@click.command()
@click.argument("folder", default="runs")
@click.option("--port", type=click.IntRange(0, 65535), default=8642, show_default=True, help="0 takes any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --expose.")
@click.option("--expose", is_flag=True, help="Let other machines in, with the token of the printed address.")
def lab(folder: str, port: int, host: str, expose: bool) -> None:
    """Look at runs in the browser.

    FOLDER holds runs and pipelines, or is one. Nothing leaves this machine, and runs are only read.
    """
    from posttrain.lab.serve import serve

    serve(Path(folder), host, port, expose, click.echo)


COMMANDS = (runs, lab, report, presets, show_config, plan, doctor)
"""In the order that the help shows them."""
