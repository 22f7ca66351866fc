"""Commands that show runs, recipes and the machine, without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from posttrain import config
from posttrain.cli.arguments import FREE, RECIPE_HELP, read_recipe, shipped_recipes, split_settings
from posttrain.cli.cluster import cluster
from posttrain.cli.data import data
from posttrain.types import ConfigError


@click.command()
@click.argument("folder", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON on stdout.")
def runs(folder: str, as_json: bool) -> None:
    """List the runs in a folder."""
    from posttrain.cli import tables
    from posttrain.store.listing import list_runs

    found = list_runs(Path(folder))
    if as_json:
        rows = [{"path": str(r.path), "status": r.status, "step": r.last_step, "note": r.note} for r in found]
        click.echo(json.dumps(rows))
    elif found:
        tables.console().print(tables.runs_table(found))
    else:
        click.echo(f"No runs in {folder}. Start one with `posttrain demo`.")


@click.command()
@click.argument("algorithm", default="grpo")
@click.option("--json", "as_json", is_flag=True, help="Print every preset's settings as JSON on stdout.")
def presets(algorithm: str, as_json: bool) -> None:
    """List an algorithm's presets.

    They are settings of papers and other implementations. Use one with `posttrain ALGORITHM --preset NAME`; settings
    given explicitly win.
    """
    if algorithm not in config.PRESETS:
        raise ConfigError(f"{algorithm!r} has no presets{config.nearest(algorithm, list(config.PRESETS))}")
    if as_json:
        names = config.PRESETS[algorithm]
        click.echo(json.dumps({n: {"source": p.source, "differs": p.differs, **p.settings} for n, p in names.items()}))
        return
    from posttrain.cli import tables

    tables.presets(tables.console(), algorithm)


@click.command("config", context_settings=FREE, epilog=RECIPE_HELP)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE|ALGORITHM [--section.key value]...")
@click.option("--explain/--bare", default=True, help="Include or omit the explanation of each setting.")
def show_config(args: tuple[str, ...], explain: bool) -> None:
    """Print a resolved recipe with every setting explained."""
    words, _ = split_settings(args)
    if not words:
        shipped = ", ".join(shipped_recipes())
        raise ConfigError(f"name a recipe ({shipped}), a TOML file, or an algorithm ({', '.join(config.RECIPES)}).")
    algorithm, recipe = read_recipe(None, args)
    click.echo(config.as_toml(algorithm, recipe, explain), nl=False)


@click.command("plan", context_settings=FREE, epilog=RECIPE_HELP)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE|ALGORITHM [--section.key value]...")
@click.option("--memory", type=float, help="Memory of each device in GiB.  [default: this machine's]")
@click.option("--gpus", type=int, default=1, show_default=True, help="GPUs that share weights and optimizer state.")
@click.option("--device", default="auto", show_default=True, help="`cpu` or `cuda`; this machine need not have it.")
@click.option("--probe/--no-probe", default=True, help="Measure speeds to estimate the time, or omit the time.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
def plan(args: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Estimate a run's memory and time before it starts.

    Takes the arguments of `posttrain ALGORITHM`. Shows the memory by part, whether the run fits, which settings to
    change if not, and why training would refuse the model or the data.
    """
    from posttrain.cli import tables

    if not split_settings(args)[0]:
        raise ConfigError(f"name a recipe, a TOML file, or an algorithm ({', '.join(config.RECIPES)}).")
    _, recipe = read_recipe(None, args)
    out = tables.console(as_json)
    with out.status("planning"):
        from posttrain.cli.plan import show_plan
        from posttrain.planner import estimate

        found = estimate.plan(recipe, **options)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        show_plan(out, found)


@click.command(context_settings=FREE, epilog="With --cluster, give settings as a run's: --cluster.backend ray ...")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[RUN] [--section.key value]...")
@click.option("--cluster", is_flag=True, help="Check the workers of a cluster instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
@click.option(
    "--fail-on",
    type=click.Choice(["warn", "alarm"]),
    help="With RUN: exit with code 9 on a verdict this severe or worse.",
)
def doctor(args: tuple[str, ...], cluster: bool, as_json: bool, fail_on: str | None) -> None:
    """Check this machine, a cluster or, with RUN, diagnose a training run.

    For the machine: device, speed per dtype, sandbox tiers, access to the model hub. For a run: is the reward being
    hacked, and is the model still learning? Each verdict has evidence, the step where the problem began, and advice.
    With --cluster: workers of each kind are started, and say their versions, threads, sandbox tiers and time to start.
    """
    from posttrain.cli import tables

    run, settings = _run_of(args, cluster)
    out = tables.console(as_json)
    if run is not None:
        from posttrain.cli.diagnosis import show_diagnosis
        from posttrain.evaluation import diagnose

        verdicts = diagnose.diagnose_run(Path(run))
        if as_json:
            click.echo(json.dumps([verdict.as_dict() for verdict in verdicts]))
        else:
            show_diagnosis(out, run, verdicts)
        if fail_on and diagnose.at_least(verdicts, fail_on):
            sys.exit(9)
        return
    if fail_on:
        raise ConfigError(f"--fail-on needs a run: posttrain doctor RUN --fail-on {fail_on}.")
    with out.status("measuring"):
        from posttrain.cli.doctor import measure_cluster, measure_machine

        findings = measure_cluster(settings) if cluster else measure_machine()
    if as_json:
        click.echo(json.dumps(findings))
    else:
        tables.doctor(out, findings)


def _run_of(args: tuple[str, ...], cluster: bool) -> tuple[str | None, dict[str, str]]:
    """The run that `doctor` was given, or the cluster's settings."""
    words, settings = split_settings(args)
    if len(words) > 1 or (words and cluster):
        raise ConfigError(f"unexpected argument {words[-1]!r}; give one run, or --cluster with settings.")
    if settings and not cluster:
        raise ConfigError(f"--{next(iter(settings))} is no option of doctor; settings need --cluster.")
    return (words[0] if words else None), settings


@click.command()
@click.argument("run")
@click.option("--out", help="Output file.  [default: RUN/report.html]")
def report(run: str, out: str | None) -> None:
    """Write an HTML report of a run or pipeline.

    It is a single file with tables, plots and samples.
    """
    from posttrain.cli import tables
    from posttrain.cli.report import write_report

    with tables.console().status(f"reading {run}"):
        written = write_report(Path(run), Path(out) if out else None)
    click.echo(str(written))


@click.command()
@click.argument("folder", default="runs")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8642, show_default=True, help="Port; 0 picks a free one."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --expose.")
@click.option("--expose", is_flag=True, help="Let other machines connect, with the token in the printed address.")
def lab(folder: str, port: int, host: str, expose: bool) -> None:
    """Explore runs in the browser.

    FOLDER contains runs and pipelines, or is one. Nothing leaves this machine, and runs are only read.
    """
    from posttrain.lab.serve import serve

    serve(Path(folder), host, port, expose, click.echo)


COMMANDS = (data, runs, lab, report, presets, show_config, plan, doctor, cluster)
"""In the order of the help."""
