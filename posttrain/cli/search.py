"""`posttrain search`: searches for answers to tasks, compares strategies, and exports what was found."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posttrain.cli.arguments import FREE, read_evaluation, sections_of
from posttrain.types import ConfigError, Json, JsonView

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.config import EvalRecipe
    from posttrain.search.solve import Searched

FILES = ("tree", "prm", "pairs", "demonstrations")


@click.command(
    "search",
    context_settings=FREE,
    epilog="Override data, rollout, eval, search and run settings with --section.key value.",
)
@click.argument("model")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
@click.option("--tasks", help="Built-in task, file, or dataset id.")
@click.option("--strategy", help="How tokens are spent: majority, best-of-n, beam, mcts …  [default: best-of-n]")
@click.option("--budget", help="Completions per task, or as many unfinished ones.  [default: 16]")
@click.option(
    "--scorer", help="What steers the search: a reward, model:FOLDER, confidence, self-certainty, steps:NAME."
)
@click.option("--reward", help="What verifies the results: `auto`, a verifier, or FILE.py:FUNCTION.")
@click.option(
    "--split",
    type=click.Choice(["held-out", "train"]),
    help="Which tasks to use.  [default: all rows of a file in --tasks, else held-out]",
)
@click.option("--out", help="Folder for results, trees and the journal.  [default: runs/search-NUMBER]")
@click.option("--tree", metavar="FILE", help="Write the search trees as JSON.")
@click.option("--prm", metavar="FILE", help="Write completions with the value of each step, for `posttrain prm`.")
@click.option("--pairs", metavar="FILE", help="Write pairs that share a prefix, for `posttrain dpo`.")
@click.option("--demonstrations", metavar="FILE", help="Write right completions, for `posttrain sft`.")
@click.option("--compare", is_flag=True, help="Compare strategies over budgets: accuracy against tokens.")
@click.option("--strategies", help="With --compare: strategies, comma-separated.  [default: the usual ones]")
@click.option("--budgets", help="With --compare: budgets, comma-separated.  [default: 1,4,16,64]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def search(model: str, args: tuple[str, ...], out: str | None, as_json: bool, **given: Any) -> None:
    """Search for answers: spend more tokens on a task than one completion.

    The chosen completions are verified, so the report has their accuracy, what all completions together cover, and the
    tokens this took. After an interruption, run the same command with the same --out to continue.
    """
    from posttrain.cli import tables

    _check_files(given)
    run = _comparison(given) if given["compare"] else None
    named = {"search.strategy": given["strategy"] or "best-of-n", "search.budget": given["budget"]}
    named |= {"search.scorer": given["scorer"], "data.tasks": given["tasks"], "reward.name": given["reward"]}
    recipe = read_evaluation(args, {"eval.samples": "1", **named}, sections_of(model), whole=given["split"] is None)
    screen = tables.console(as_json)
    folder = _folder(out)
    side = given["split"] or "held-out"
    try:
        if run:
            _compare(screen, model, recipe, folder, side, run, as_json)
        else:
            _search(screen, model, recipe, folder, side, given, as_json)
    except BaseException as error:
        _ended(folder, out, error)
        raise


def _search(
    screen: Console, model: str, recipe: EvalRecipe, folder: Path, side: Any, given: JsonView, as_json: bool
) -> None:
    """Runs one search, writes the files that were asked for and prints the report."""
    from posttrain.cli.search_tables import SearchLine, searched

    with SearchLine(screen) as line:
        from posttrain import api

        found = api.search_recipe(model, recipe, folder, progress=line, split=side)
    written = _write(found, given)
    if as_json:
        click.echo(json.dumps({**found.report.as_dict(), "folder": str(folder), "written": written}))
    else:
        searched(screen, model, found, written)


def _compare(
    screen: Console, model: str, recipe: EvalRecipe, folder: Path, side: Any, run: JsonView, as_json: bool
) -> None:
    """Runs a comparison, writes its files and prints it."""
    from posttrain.cli.search_report import show, write
    from posttrain.cli.search_tables import SearchLine

    with SearchLine(screen) as line:
        from posttrain import api
        from posttrain.search.compare import compare

        found = api.search_recipe(model, recipe, folder, progress=line, split=side, run=partial(compare, **run))
    files = write(found)
    if as_json:
        click.echo(json.dumps({**found.as_dict(), "folder": str(folder)}))
    else:
        show(screen, found, files)


def _comparison(given: JsonView) -> Json:
    """The strategies and budgets of --compare. Raises ConfigError for options that it does not use."""
    unused = [name for name in ("strategy", "budget", *FILES) if given[name]]
    if unused:
        raise ConfigError(
            f"--{unused[0]} {given[unused[0]]} has no effect with --compare, which takes --strategies and --budgets."
        )
    words = [word.strip() for word in (given["budgets"] or "1,4,16,64").split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--budgets {given['budgets']} is not a list of whole numbers; write 1,4,16.")
    names = [word.strip() for word in (given["strategies"] or "").split(",") if word.strip()]
    return {"strategies": names, "budgets": [int(word) for word in words]}


def _folder(out: str | None) -> Path:
    """The folder of the results: `--out`, or the next free one."""
    from posttrain.store.listing import next_folder

    return Path(out) if out else next_folder(Path("runs"), "search")


def _ended(folder: Path, out: str | None, error: BaseException) -> None:
    """Says how to continue an interrupted search; removes the folder of one that was rejected, if it is empty."""
    from posttrain.search.folder import SETTINGS

    if isinstance(error, KeyboardInterrupt) and (folder / SETTINGS).exists():
        again = "the same command" if out else f"the same command with --out {folder}"
        click.echo(f"Stopped and saved. To continue, run {again} again.", err=True)
        sys.exit(130)
    if not out and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _check_files(given: JsonView) -> None:
    """Raises ConfigError for a file that could not be written at the end, and for lists without --compare."""
    lists = [name for name in ("strategies", "budgets") if given[name] and not given["compare"]]
    if lists:
        raise ConfigError(f"--{lists[0]} {given[lists[0]]} has no effect without --compare.")
    for path in (given.get(name) for name in FILES):
        if path and not Path(path).parent.is_dir():
            raise ConfigError(f"{path} cannot be written: the folder {Path(path).parent} does not exist.")


def _write(found: Searched, given: JsonView) -> dict[str, int]:
    """Writes the files that were asked for; file → rows."""
    from posttrain.search import export

    written: dict[str, int] = {}
    if given["tree"]:
        rows = [
            {
                **tree,
                "prompt": task.prompt,
                "chosen": one.chosen,
                "right": dict(zip(one.candidates, one.right, strict=True)),
            }
            for task, one, tree in zip(found.tasks, found.outcomes, found.trees, strict=True)
        ]
        report = found.report
        kept = {"strategy": report.strategy, "budget": report.budget, "scorer": report.scorer, "trees": rows}
        Path(given["tree"]).write_text(json.dumps(kept) + "\n", encoding="utf-8")
        written[given["tree"]] = len(rows)
    return {**written, **export.write(found, given["prm"], given["pairs"], given["demonstrations"])}
