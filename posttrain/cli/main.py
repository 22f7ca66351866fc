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
from posttrain.cli.arguments import (
    FREE,
    RECIPE_HELP,
    find_recipe,
    read_recipe,
    sections_of,
    shipped_recipes,
    split_settings,
)
from posttrain.cli.inspect import COMMANDS
from posttrain.types import ConfigError, PosttrainError


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
    """Post-train language models with reinforcement learning on one machine, from a laptop's CPU to a GPU.

    Start with `posttrain demo`: it trains the little model that ships here to think, in minutes.
    """


def settings_command(name: str, **extra: Any) -> Any:
    """A command that takes free `--section.key value` settings besides its own options."""
    return main.command(name, context_settings=FREE, **extra)


def run_training(algorithm: str, recipe: Any, as_json: bool, resume: str | None = None) -> None:
    """Runs or resumes with the live progress line, then says what happened and what to do next."""
    from posttrain.cli import tables as show

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
    from posttrain.cli.demo import run_demo

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


@settings_command(
    "pipeline", epilog="Settings of a stage follow as --STAGE.section.key value, of the cards as --card.key."
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE [--stage.section.key value]...")
@click.option("--out", default="", help="Folder.  [default: runs/NAME]")
@click.option("--mini", is_flag=True, help="The recipe's miniature: every stage, in a minute or so.")
@click.option("--again", default="", metavar="STAGE", help="Make this stage anew although its inputs are the same.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def pipeline(args: tuple[str, ...], out: str, mini: bool, again: str, as_json: bool) -> None:
    """Several stages from one file: data, training runs and an examination of every model.

    A stage whose inputs have not changed is not run again; called again after a stop, it goes on where it was.
    """
    from posttrain.cli import tables as show

    words, settings = split_settings(args)
    if len(words) != 1:
        raise ConfigError(f"name one pipeline ({', '.join(shipped_recipes('pipeline'))}) or a TOML file.")
    screen = show.console(as_json)
    with screen.status("reading the pipeline"):
        from posttrain.cli.pipeline import run_command
    run_command(screen, find_recipe(words[0]), settings, out, mini, again, as_json)


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
    from posttrain.cli import tables as show

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
    from posttrain.cli import tables as show

    for path in filter(None, (out, pairs)):
        if not Path(path).parent.is_dir():
            raise ConfigError(f"{path} cannot be written: the folder {Path(path).parent} does not exist.")
    named = {"data.tasks": given["tasks"], "eval.samples": given["count"], "reward.name": given["scorer"]}
    _, recipe = read_recipe("grpo", args, named, sections_of(model))
    console = show.console(given["as_json"])
    with console.status(f"sampling {recipe.eval.samples} answers of {model} to each task of {recipe.data.tasks}"):
        from posttrain import api
        from posttrain.search import best_of_n as search

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
    from posttrain.cli import tables as show

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
    from posttrain.cli import tables as show

    out = show.console(as_json)
    with out.status(f"loading {model}"):
        from posttrain.cli import chat as talk
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
    from posttrain.cli import tables as show

    with show.console().status(f"loading {model}"):
        from posttrain.cli import chat as talk
    talk.chat(model, temperature, max_tokens, system)


for _command in COMMANDS:
    main.add_command(_command)
