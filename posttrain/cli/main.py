"""The command line. One function per command; heavy imports are inside the functions, so that `--help` is fast.

Exit codes: 0 success · 1 unexpected error · 2 bad setting or usage · 3 bad data · 4 template or tokenizer · 5 rollout
or reward · 6 training diverged · 7 run folder · 8 disk · 9 `doctor --fail-on` found a problem · 130 stopped by Ctrl-C ·
143 stopped by SIGTERM (both resumable).
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from posttrain import __version__, config
from posttrain.cli.arguments import (
    FREE,
    RECIPE_HELP,
    find_recipe,
    options_of,
    read_evaluation,
    read_recipe,
    resumed,
    sections_of,
    shipped_recipes,
    split_settings,
)
from posttrain.cli.inspect import COMMANDS
from posttrain.cli.search import search
from posttrain.config.search import parsed
from posttrain.types import ConfigError, JsonView, PosttrainError

HELP = {"help_option_names": ["-h", "--help"]}


class Cli(click.Group):
    """Lists commands in definition order and turns our errors into one line and an exit code.

    Every algorithm of `config.RECIPES` has a command, made from its recipe class.
    """

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.context_settings = {**HELP, **cmd.context_settings}  # click keeps the help option of the first context
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        for algorithm in config.RECIPES:
            self.get_command(ctx, algorithm)
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in config.RECIPES and cmd_name not in self.commands:
            training_command(cmd_name)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", config.SettingRenamed)
                warnings.showwarning = _one_line
                return super().invoke(ctx)
        except PosttrainError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped.", err=True)
            sys.exit(130)


def _one_line(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """A warning without the place in the code that raised it, which is not the user's."""
    click.echo(f"warning: {message}", err=True)


@click.group(cls=Cli, context_settings=HELP)
@click.version_option(__version__, prog_name="posttrain")
def main() -> None:
    """Post-train language models with reinforcement learning, from a laptop's CPU to a cluster.

    Start with `posttrain demo`: it trains the small built-in model to think, in minutes.
    """


def settings_command(name: str, **extra: Any) -> Any:
    """Decorator for a command that takes `--section.key value` settings besides its own options."""
    return main.command(name, context_settings=FREE, **extra)


def run_training(
    algorithm: str,
    recipe: config.Recipe,
    as_json: bool,
    resume: str | None = None,
    steps: int | None = None,
    cluster: JsonView | None = None,
) -> None:
    """Runs or resumes training with the live progress line, then prints the results."""
    from posttrain.cli import tables

    out = tables.console(as_json)
    with out.status("loading model and data"):
        from posttrain import api

    def warn(text: str) -> None:
        out.print(f"warning: {text}", style="yellow", soft_wrap=True)

    with tables.StepLine(out, recipe) as line:
        if resume:
            result = api.resume(resume, on_step=line, steps=steps, cluster=cluster)
        else:
            result = api.start(algorithm, recipe, line, on_warning=warn)
    if result.summary is None:
        out.print(f"Stopped and saved. Continue with: posttrain resume {result.folder}", soft_wrap=True)
        sys.exit(128 + result.stopped_by)
    tables.finished(out, result.folder)
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), "summary": result.summary}))


@main.command()
@click.option("--out", default="", help="Run folder.  [default: runs/grpo-NUMBER]")
@click.option("--steps", type=int, help="Training steps.  [default: the recipe's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def demo(out: str, steps: int | None, seed: int, as_json: bool) -> None:
    """Train the built-in model to think, in minutes.

    R1-Zero in miniature, on this machine: the only reward is whether the answer is right.
    """
    from posttrain.cli.demo import run_demo

    run_demo(out, steps, seed, as_json)


def training_command(algorithm: str) -> None:
    """Adds an algorithm's command: its help is the recipe's docstring, its options the most used settings."""
    recipe, shown = config.RECIPES[algorithm], options_of(algorithm)

    def command(args: tuple[str, ...], as_json: bool, **given: str | None) -> None:
        named = [f"--{option}={value}" for option, value in given.items() if value is not None]
        found, resolved = read_recipe(algorithm, [*named, *args])
        run_training(found, resolved, as_json)

    command = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(command)
    for option, _, text in reversed(shown):
        command = click.option(option, help=text)(command)
    metavar = "[RECIPE] [--section.key value]..."
    command = click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar=metavar)(command)
    settings_command(algorithm, epilog=RECIPE_HELP, help=inspect.cleandoc(recipe.__doc__ or ""))(command)


for _algorithm in config.RECIPES:
    training_command(_algorithm)


@settings_command(
    "pipeline", epilog="Override a stage's settings with --STAGE.section.key value, the cards' with --card.key value."
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE [--stage.section.key value]...")
@click.option("--out", default="", help="Pipeline folder.  [default: runs/NAME]")
@click.option("--mini", is_flag=True, help="Run the recipe's miniature: every stage, in about a minute.")
@click.option("--again", default="", metavar="STAGE", help="Rerun this stage even if its inputs have not changed.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def pipeline(args: tuple[str, ...], out: str, mini: bool, again: str, as_json: bool) -> None:
    """Run data, training and evaluation stages from one file.

    Stages whose inputs have not changed are not rerun. After an interruption, run the same command to continue.
    """
    from posttrain.cli import tables

    words, settings = split_settings(args)
    if len(words) != 1:
        raise ConfigError(f"name one pipeline ({', '.join(shipped_recipes('pipeline'))}) or a TOML file.")
    screen = tables.console(as_json)
    with screen.status("reading the pipeline"):
        from posttrain.cli.pipeline import run_command
    run_command(screen, find_recipe(words[0]), settings, out, mini, again, as_json)


@settings_command("resume", epilog="Override cluster settings with --cluster.key value; they do not change a result.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RUN [--cluster.key value]...")
@click.option("--steps", "--train.steps", type=int, help="Train for more steps than the run planned.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def resume(args: tuple[str, ...], steps: int | None, as_json: bool) -> None:
    """Resume a stopped or killed run, bit-exactly, or extend one with --steps.

    With --cluster.learners and other cluster settings, other processes and machines compute the rest of the run.
    """
    from posttrain.store.run import Run

    run, cluster = resumed(args)
    with Run.read(Path(run)) as store:
        algorithm = store.header["algorithm"]
        recipe = config.stored(algorithm, store.header["recipe"])
        summary = store.summary()
        if summary and (steps is None or (steps == recipe.train.steps and "ended" not in summary)):
            early = f" It ended early after step {summary['steps']}." if "ended" in summary else ""
            click.echo(
                f"{run} is finished; there is nothing to resume.{early} To train it further, give --steps N.", err=True
            )
    if steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    run_training(algorithm, recipe, as_json, resume=run, steps=steps, cluster=cluster)


@settings_command("eval", epilog="Override data, rollout, eval and run settings with --section.key value.")
@click.argument("model")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
@click.option("--tasks", help="Built-in task, file, or dataset id.")
@click.option("--reward", help="`auto`, a verifier, or FILE.py:FUNCTION.")
@click.option("--samples", help="Completions per task; 2 or more adds pass@k and maj@k.")
@click.option("--search", help="Evaluate what a search chooses: STRATEGY:BUDGET, such as beam:16.")
@click.option("--scorer", help="With --search: what steers it, as in `posttrain search`.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def evaluate(model: str, args: tuple[str, ...], search: str | None, as_json: bool, **options: str | None) -> None:
    """Evaluate a model or run on held-out tasks.

    All rows of a file in --tasks are evaluated. Reports accuracy and, with --samples 2 or more, pass@k and maj@k, with
    95 % intervals.
    """
    from posttrain.cli import tables
    from posttrain.cli.search_tables import SearchLine

    given = {"data.tasks": options["tasks"], "reward.name": options["reward"], "eval.samples": options["samples"]}
    if search is not None:
        given = {
            **given,
            "eval.samples": options["samples"] or "1",
            **parsed(search),
            "search.scorer": options["scorer"],
        }
    elif options["scorer"] is not None:
        raise ConfigError(
            f"--scorer {options['scorer']} has no effect without --search; give --reward for the verifier."
        )
    recipe = read_evaluation(args, given, sections_of(model), whole=True)
    out = tables.console(as_json)
    source = recipe.data.eval_tasks or recipe.data.tasks
    with SearchLine(out) if recipe.search.strategy else out.status(f"evaluating {model} on {source}") as line:
        from posttrain import api

        report, groups = api.evaluate_recipe(model, recipe, progress=line if isinstance(line, SearchLine) else None)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        tables.report(out, model, report, groups)


@settings_command("best-of-n", epilog="Override data, rollout, eval and run settings with --section.key value.")
@click.argument("model")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
@click.option("--tasks", help="Built-in task, file, or dataset id.")
@click.option("--n", "count", default="16", show_default=True, help="Completions per task.")
@click.option(
    "--scorer",
    default="auto",
    show_default=True,
    help="`auto`, a verifier, FILE.py:FUNCTION, model:FOLDER, or judge:FILE.toml.",
)
@click.option(
    "--split",
    type=click.Choice(["held-out", "train"]),
    help="Which tasks to use.  [default: all rows of a file in --tasks, else held-out]",
)
@click.option("--out", help="File for each task's best completion, as rows for `posttrain sft`.")
@click.option("--least", type=float, help="Minimum score for --out.  [default: none]")
@click.option("--pairs", help="File for best-worst pairs, for `posttrain dpo` and `posttrain reward`.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON on stdout.")
def best_of_n(model: str, args: tuple[str, ...], out: str, least: float | None, pairs: str, **given: Any) -> None:
    """Evaluate best-of-n sampling for n = 1, 2, 4 … N.

    With --out or --pairs, the completions become training data. All rows of a file in --tasks are used, unless --split
    is given.
    """
    from posttrain.cli import tables

    for path in filter(None, (out, pairs)):
        if not Path(path).parent.is_dir():
            raise ConfigError(f"{path} cannot be written: the folder {Path(path).parent} does not exist.")
    named = {"data.tasks": given["tasks"], "eval.samples": given["count"], "reward.name": given["scorer"]}
    recipe = read_evaluation(args, named, sections_of(model), whole=given["split"] is None)
    console = tables.console(given["as_json"])
    source = recipe.data.eval_tasks or recipe.data.tasks
    with console.status(f"sampling {recipe.eval.samples} completions per task of {source} from {model}"):
        from posttrain import api
        from posttrain.search import best_of_n as search

        tasks, groups = api.sample_many(model, recipe, given["split"] or "held-out")
        found = search.measure(groups)
    written = search.write(tasks, groups, out, least, pairs)
    if given["as_json"]:
        click.echo(json.dumps({**found.as_dict(), "written": written}))
    else:
        tables.best_of_n(console, model, found, written)


main.add_command(search)


@main.command()
@click.argument("model")
@click.option("--tasks", default="arithmetic", show_default=True, help="Built-in task, or file with gold answers.")
@click.option("--count", default=64, show_default=True, help="Number of questions.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
def probe(model: str, tasks: str, count: int, as_json: bool) -> None:
    """Probe a reward model for biases.

    Measures what it rewards besides being right: length, sycophancy, format and position.
    """
    from posttrain.cli import tables

    with tables.console(as_json).status(f"probing {model}"):
        from posttrain import api

        found = api.probe(model, tasks, count)
    tables.findings(tables.console(as_json), model, found)
    if as_json:
        click.echo(json.dumps([finding.as_dict() for finding in found]))


@main.command()
@click.argument("model")
@click.argument("prompt")
@click.option("-n", "count", default=1, show_default=True, help="Number of completions.")
@click.option("--temperature", default=1.0, show_default=True, help="Sampling temperature; 0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Nucleus sampling; 1 keeps every token.")
@click.option("--top-k", default=0, show_default=True, help="Sample from the k most likely tokens; 0 keeps all.")
@click.option("--max-tokens", default=256, show_default=True, help="Maximum tokens per completion.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
@click.option("--plain", is_flag=True, help="Use the prompt as it is, without a chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON with tokens and log-probabilities.")
def sample(model: str, prompt: str, plain: bool, as_json: bool, **options: Any) -> None:
    """Sample completions of one prompt from a model or run."""
    from posttrain.cli import tables

    out = tables.console(as_json)
    with out.status(f"loading {model}"):
        from posttrain.cli import chat as session
    answers = session.sample(model, prompt, plain, **options)
    if as_json:
        click.echo(json.dumps(answers))
    else:
        for answer in answers:
            click.echo(tables.printable(answer["text"]) + ("" if answer["stop"] == "stop" else " …"))


@main.command()
@click.argument("model")
@click.option("--temperature", default=1.0, show_default=True, help="Sampling temperature; 0 is greedy.")
@click.option("--max-tokens", default=256, show_default=True, help="Maximum tokens per reply.")
@click.option("--system", default="", help="System message.")
@click.option("--search", help="A search chooses each reply: STRATEGY:BUDGET, such as best-of-n:16.")
@click.option("--scorer", default="", help="With --search: what steers it; it must not need a gold answer.")
def chat(model: str, temperature: float, max_tokens: int, system: str, search: str | None, scorer: str) -> None:
    """Chat with a model or run in the terminal.

    An empty line or Ctrl-D quits.
    """
    from posttrain.cli import tables

    if search is None and scorer:
        raise ConfigError(f"--scorer {scorer} has no effect without --search.")
    given = {"eval.temperature": temperature, "rollout.max_tokens": max_tokens, "search.scorer": scorer}
    recipe = config.resolve_as(config.EvalRecipe, {}, {**given, **parsed(search)}) if search is not None else None
    with tables.console().status(f"loading {model}"):
        from posttrain.cli import chat as session
    if recipe:
        session.search_chat(model, recipe, system)
    else:
        session.chat(model, temperature, max_tokens, system)


for _command in COMMANDS:
    main.add_command(_command)
