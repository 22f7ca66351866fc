"""The command line. One function a command; everything heavy is imported inside it, so that `--help` is quick.

Exit codes: 0 done · 1 unexpected error · 2 bad setting or usage · 3 bad data · 4 template or tokenizer · 5 rollout or
reward · 6 training diverged · 7 run folder · 8 disk · 9 `doctor --fail-on` found it · 130 stopped by Ctrl-C · 143
stopped by SIGTERM (both resumable).
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from posttrain import __version__, config
from posttrain.arguments import read_recipe, sections_of, split_settings
from posttrain.types import ConfigError, PosttrainError

RECIPE_HELP = "RECIPE is a TOML file or the name of a shipped recipe; any setting follows as `--section.key value`."


class Cli(click.Group):
    """Shows commands in the order they are defined and turns our errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PosttrainError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped.", err=True)
            sys.exit(130)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="posttrain")
def main() -> None:
    """Post-train language models with reinforcement learning, from a laptop's CPU to a cluster.

    Start with `posttrain demo`: it trains the little model that ships here to think, in minutes.
    """


def settings_command(name: str, **extra: Any) -> Any:
    """A command that takes free `--section.key value` settings besides its own options."""
    return main.command(name, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, **extra)


def run_training(algorithm: str, recipe: Any, as_json: bool, resume: str | None = None) -> None:
    """Runs or resumes with the live progress line, then says what happened and what to do next."""
    from posttrain import show

    out = show.console(as_json)
    with out.status("loading model and data"):
        from posttrain import api

    def warn(text: str) -> None:
        out.print(f"warning: {text}", style="yellow", soft_wrap=True)

    with show.StepLine(out, recipe) as line:
        result = api.resume(resume, on_step=line) if resume else api.start(algorithm, recipe, line, on_warning=warn)
    if result.summary is None:
        out.print(f"Stopped and saved. Continue with: posttrain resume {result.folder}", soft_wrap=True)
        sys.exit(128 + result.stopped_by)
    show.finished(out, result.folder)
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), "summary": result.summary}))


@main.command()
@click.option("--out", default="", help="Run folder.  [default: runs/grpo-NUMBER]")
@click.option("--steps", type=int, help="Fewer or more updates than the recipe's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def demo(out: str, steps: int | None, seed: int, as_json: bool) -> None:
    """Train the shipped model to think, in minutes.

    R1-Zero in miniature, on this machine: the only reward is whether the answer is right.
    """
    from posttrain.demo import run_demo

    run_demo(out, steps, seed, as_json)


def training_command(algorithm: str) -> None:
    """The command of an algorithm: what its recipe class says, with its most used settings as options."""
    recipe = config.RECIPES[algorithm]
    sections = {section.name for section in fields(recipe)}
    shown = [("--model", "model.path", "Model folder, hub id, or `abacus`.")]
    judged = "reward" in sections
    if judged and "pairs" not in sections:
        shown.append(("--tasks", "data.tasks", "Built-in task, JSONL/Parquet file, or data set id."))
    else:
        shown.append(("--data", "data.tasks", "JSONL/Parquet file, data set id, or task."))
    if judged:
        shown.append(
            ("--reward", "reward.name", "`auto`, a verifier, FILE.py:FUNCTION, model:FOLDER, or judge:FILE.toml.")
        )
    if presets := config.PRESETS.get(algorithm):
        shown.append(
            ("--preset", "algo.preset", f"Settings of a paper or another implementation: {', '.join(presets)}.")
        )
    shown.append(("--out", "run.out", "Run folder."))

    def command(args: tuple[str, ...], as_json: bool, **given: str | None) -> None:
        named = {setting: given[option.removeprefix("--")] for option, setting, _ in shown}
        found, resolved = read_recipe(algorithm, args, named)
        run_training(found, resolved, as_json)

    command = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(command)
    for option, _, text in reversed(shown):
        command = click.option(option, help=text)(command)
    metavar = "[RECIPE] [--section.key value]..."
    command = click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar=metavar)(command)
    settings_command(algorithm, epilog=RECIPE_HELP, help=inspect.cleandoc(recipe.__doc__ or ""))(command)


for _algorithm in config.RECIPES:
    training_command(_algorithm)


@main.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def resume(run: str, as_json: bool) -> None:
    """Continue a run that was stopped or killed, to the same bits."""
    from posttrain.store.run import Run

    with Run.read(Path(run)) as store:
        algorithm = store.header["algorithm"]
        recipe = config.resolve(algorithm, store.header["recipe"])
        if store.summary():
            click.echo(f"{run} is finished; there is nothing to resume.", err=True)
    run_training(algorithm, recipe, as_json, resume=run)


@settings_command("eval", epilog="Settings of the data, rollout, eval and run sections follow as --section.key value.")
@click.argument("model")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
@click.option("--tasks", help="Built-in task, file, or data set id.")
@click.option("--reward", help="`auto`, a verifier, or FILE.py:FUNCTION.")
@click.option("--samples", help="Answers per task; 2 or more adds pass@k and maj@k.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def evaluate(
    model: str, args: tuple[str, ...], tasks: str | None, reward: str | None, samples: str | None, as_json: bool
) -> None:
    """Held-out accuracy of a model or run, with intervals.

    With --samples 2 or more also pass@k and maj@k.
    """
    from posttrain import show

    words, _ = split_settings(args)
    if words:
        raise ConfigError(f"unexpected argument {words[0]!r}; settings are written --section.key value.")
    given = {"data.tasks": tasks, "reward.name": reward, "eval.samples": samples}
    _, recipe = read_recipe("grpo", args, given, sections_of(model))
    out = show.console(as_json)
    with out.status(f"evaluating {model} on {recipe.data.tasks}"):
        from posttrain import api

        report, groups = api.evaluate_recipe(model, recipe)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        show.report(out, model, report, groups)


@settings_command("best-of-n", epilog="Settings of the data, rollout, eval and run sections follow as for `eval`.")
@click.argument("model")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
@click.option("--tasks", help="Built-in task, file, or data set id.")
@click.option("--n", "count", default="16", show_default=True, help="Answers per task.")
@click.option(
    "--scorer",
    default="auto",
    show_default=True,
    help="A verifier, FILE.py:FUNCTION, model:FOLDER, or judge:FILE.toml.",
)
@click.option("--split", type=click.Choice(["held-out", "train"]), default="held-out", help="Which tasks.")
@click.option("--out", help="Write each task's best answer here, as rows for `posttrain sft`.")
@click.option("--least", type=float, help="Lowest score that --out takes; without it, any.")
@click.option("--pairs", help="Write best against worst answers here, for `posttrain dpo` and `posttrain reward`.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON on stdout.")
def best_of_n(model: str, args: tuple[str, ...], out: str, least: float | None, pairs: str, **given: Any) -> None:
    """What the best of n answers is worth, for n = 1, 2, 4 … N.

    With --out or --pairs the answers become training data.
    """
    from posttrain import show

    for path in filter(None, (out, pairs)):
        if not Path(path).parent.is_dir():
            raise ConfigError(f"{path} cannot be written: the folder {Path(path).parent} does not exist.")
    named = {"data.tasks": given["tasks"], "eval.samples": given["count"], "reward.name": given["scorer"]}
    _, recipe = read_recipe("grpo", args, named, sections_of(model))
    console = show.console(given["as_json"])
    with console.status(f"sampling {recipe.eval.samples} answers of {model} to each task of {recipe.data.tasks}"):
        from posttrain import api, search

        tasks, groups = api.sample_many(model, recipe, given["split"])
        found = search.measure(groups)
    written = search.write(tasks, groups, out, least, pairs)
    if given["as_json"]:
        click.echo(json.dumps({**found.as_dict(), "written": written}))
    else:
        show.best_of_n(console, model, found, written)


@main.command()
@click.argument("model")
@click.option("--tasks", default="arithmetic", show_default=True, help="Built-in task, or file with gold answers.")
@click.option("--count", default=64, show_default=True, help="Questions.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
def probe(model: str, tasks: str, count: int, as_json: bool) -> None:
    """What a reward model pays for besides being right: bias probes with intervals."""
    from posttrain import show

    with show.console(as_json).status(f"probing {model}"):
        from posttrain import api

        found = api.probe(model, tasks, count)
    show.findings(show.console(as_json), model, found)
    if as_json:
        click.echo(json.dumps([finding.as_dict() for finding in found]))


@main.command()
@click.argument("model")
@click.argument("prompt")
@click.option("-n", "count", default=1, show_default=True, help="Answers.")
@click.option("--temperature", default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0 keeps every token.")
@click.option("--max-tokens", default=256, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--plain", is_flag=True, help="Feed the text as it is, without a chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print tokens and log-probabilities too, as JSON.")
def sample(model: str, prompt: str, plain: bool, as_json: bool, **options: Any) -> None:
    """Answers of a model or run to one prompt."""
    from posttrain import show

    out = show.console(as_json)
    with out.status(f"loading {model}"):
        from posttrain import talk
    answers = talk.sample(model, prompt, plain, **options)
    if as_json:
        click.echo(json.dumps(answers))
    else:
        for answer in answers:
            click.echo(show.printable(answer["text"]) + ("" if answer["stop"] == "stop" else " …"))


@main.command()
@click.argument("model")
@click.option("--temperature", default=1.0, show_default=True, help="0 is greedy.")
@click.option("--max-tokens", default=256, show_default=True)
@click.option("--system", default="", help="System message.")
def chat(model: str, temperature: float, max_tokens: int, system: str) -> None:
    """Talk to a model or run in the terminal.

    An empty line or Ctrl-D ends.
    """
    from posttrain import show

    with show.console().status(f"loading {model}"):
        from posttrain import talk
    talk.chat(model, temperature, max_tokens, system)


@main.command()
@click.argument("folder", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON on stdout.")
def runs(folder: str, as_json: bool) -> None:
    """List the runs in a folder."""
    from posttrain import show
    from posttrain.store.run import list_runs

    found = list_runs(Path(folder))
    if as_json:
        rows = [{"path": str(r.path), "status": r.status, "step": r.last_step, "note": r.note} for r in found]
        click.echo(json.dumps(rows))
    elif found:
        show.console().print(show.runs_table(found))
    else:
        click.echo(f"No runs in {folder}. `posttrain demo` makes the first one.")


@main.command()
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
    from posttrain import show

    show.presets(show.console(), algorithm)


@settings_command("config", epilog=RECIPE_HELP)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE|ALGORITHM [--section.key value]...")
@click.option("--explain/--bare", default=True, help="With or without what each setting means.")
def show_config(args: tuple[str, ...], explain: bool) -> None:
    """Print a resolved recipe, every setting explained."""
    words, _ = split_settings(args)
    if not words:
        shipped = ", ".join(sorted(p.stem for p in (Path(__file__).parent / "recipes").glob("*.toml")))
        raise ConfigError(f"name a recipe ({shipped}), a TOML file, or an algorithm ({', '.join(config.RECIPES)}).")
    algorithm, recipe = read_recipe(None, args)
    click.echo(config.as_toml(algorithm, recipe, explain), nl=False)


@settings_command("plan", epilog=RECIPE_HELP)
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
    from posttrain import show

    if not split_settings(args)[0]:
        raise ConfigError(f"name a recipe, a TOML file, or an algorithm ({', '.join(config.RECIPES)}).")
    _, recipe = read_recipe(None, args)
    out = show.console(as_json)
    with out.status("planning"):
        from posttrain import estimate

        found = estimate.plan(recipe, **options)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        estimate.show_plan(out, found)


@main.command()
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
    from posttrain import show

    out = show.console(as_json)
    if run is not None:
        from posttrain import diagnose

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
        from posttrain.doctor import examine

        findings = examine()
    if as_json:
        click.echo(json.dumps(findings))
    else:
        show.doctor(out, findings)
