"""Runs the shipped pipelines in full and stores the results, so that a test can compare them with each recipe.

    python -m bench.pipelines [NAME ...] [--write] [--out FOLDER] [--from FOLDER]

prints the evaluation cards and the seconds of every stage, and exits with code 1 if a result is outside its bounds.
`--write` stores the results in posttrain/config/recipes/results/NAME.json, with a hash of what was run (a recipe that
has changed since needs a new run), and writes the cards as a table into docs/guides/pipelines.md. `--from` uses a
finished pipeline folder instead of running one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.environment import ROOT
from bench.marks import between
from posttrain import __version__
from posttrain.cli.arguments import find_recipe, shipped_recipes
from posttrain.cli.pipeline import cards_table
from posttrain.cli.report import write_report
from posttrain.pipelines.card import LABELS
from posttrain.pipelines.recipe import Pipeline, Stage, read_pipeline
from posttrain.pipelines.runner import Record, Screen, read_records, run_pipeline, stage_keys
from posttrain.store.pipeline import read_record
from posttrain.types import ConfigError

RESULTS = ROOT / "posttrain" / "config" / "recipes" / "results"
PAGE = ROOT / "docs" / "guides" / "pipelines.md"
DIGITS = 6
SHOWN = (
    "helpfulness", "safety", "over_refusal", "reasoning", "format", "language", "kl", "length", "unique", "distinct_2",
)  # fmt: skip
"""Card entries shown in the documentation, next to each stage's CPU time and memory."""


def recipe_sha256(pipeline: Pipeline) -> str:
    """Hash of all settings of the stages and the card; ignores comments, figures, `expect`, `about` and `time`."""
    described = {"stages": [_described(stage) for stage in pipeline.stages], "card": asdict(pipeline.card)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _described(stage: Stage) -> dict[str, Any]:
    about = {"name": stage.name, "run": stage.run, "card": stage.card, "reference": stage.reference}
    return {**about, "settings": stage.described({name: f"{{{name}}}" for name in stage.needs()})}


def missed(pipeline: Pipeline, results: Mapping[str, float]) -> list[str]:
    """A message for each expectation that the results do not meet."""
    return [
        f"{name} is {results.get(name)}, expected {low:g} to {high:g}"
        for name, (low, high) in pipeline.missed(results).items()
    ]


def require_run_of(pipeline: Pipeline, folder: Path) -> None:
    """Raises ConfigError unless the folder holds a finished full run of this recipe with these settings."""
    record = read_record(folder)
    if record.get("results") is None or record.get("mini"):
        raise ConfigError(f"{folder} does not hold a finished full run of {pipeline.name}.")
    known = {row["name"]: row["key"] for row in record["stages"]}
    keys = stage_keys(pipeline)
    changed = [name for name in {**keys, **known} if known.get(name) != keys.get(name)]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(record["recipe"])
        file.flush()
        if read_pipeline(Path(file.name)).card != pipeline.card:
            changed.append("card")
    if changed:
        raise ConfigError(f"{folder} was made with other settings of {', '.join(changed)}. Run the unchanged recipe.")


def records_of(pipeline: Pipeline, folder: Path) -> list[Record]:
    """Records of the pipeline's stages in order, without stages of earlier settings that the folder still holds."""
    known = {(r.name, r.key): r for r in read_records(folder)}
    return [known[found] for found in stage_keys(pipeline).items()]


def recorded(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    """What is stored about a finished run."""
    results = {name: float(f"{value:.{DIGITS}g}") for name, value in read_record(folder)["results"].items()}
    return {
        "recipe_sha256": recipe_sha256(pipeline),
        "posttrain": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": {r.name: r.seconds for r in records_of(pipeline, folder) if r.seconds is not None},
        "results": results,
    }


def table(records: Sequence[Record]) -> str:
    """Markdown table of the evaluated stages, one per line, with 95 % intervals where the card has them."""
    lines = [f"| stage | {' | '.join(name.replace('_', ' ') for name in SHOWN)} | CPU seconds | MiB |"]
    lines.append("|---|" + "--:|" * (len(SHOWN) + 2))
    for record in records:
        if record.card:
            cells = [_cell(record.card.get(name), LABELS[name][1]) for name in SHOWN]
            cells += ["–" if x is None else f"{x:.0f}" for x in (record.cpu_seconds, record.peak_mib)]
            lines.append(f"| {record.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, float] | None, share: bool) -> str:
    if found is None:
        return "–"
    scale, digits = (100, 0) if share else (1, 1)
    value, low, high = (f"{scale * found[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def write_table(name: str, text: str) -> None:
    """Writes a table between a pipeline's markers in the documentation. Raises ValueError if a marker is missing."""
    begin, end = f"<!-- results: {name} -->\n", f"<!-- end: {name} -->\n"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(between(page, begin, end, f"{text}\n", PAGE.name), encoding="utf-8")


def run(name: str, out: Path | None, finished: Path | None, write: bool, console: Console) -> bool:
    """Runs one pipeline, or reads a finished one; returns whether all expectations are met."""
    pipeline = read_pipeline(find_recipe(name))
    folder = finished or (out or ROOT / "build" / "pipelines") / pipeline.name
    if finished is None:
        ended = run_pipeline(pipeline, folder, Screen(lambda text: console.print(text, markup=False)))
        if ended.stopped_by:
            raise KeyboardInterrupt
        write_report(folder)
    require_run_of(pipeline, folder)
    found = recorded(pipeline, folder)
    console.print(cards_table(records_of(pipeline, folder)))
    seconds = found["seconds"]
    console.print(", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items()), markup=False)
    console.print(f"{name}: {sum(seconds.values()):.0f} s for the stages, evaluation cards excluded", markup=False)
    failures = missed(pipeline, found["results"])
    for line in failures:
        console.print(f"not as expected: {line}", markup=False)
    if write:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(found, indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
        write_table(name, table(records_of(pipeline, folder)))
    return not failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pipelines", description="Run the shipped pipelines in full.")
    parser.add_argument("names", nargs="*", help="pipelines (default: all)")
    parser.add_argument("--write", action="store_true", help="store the results for the test that checks them")
    parser.add_argument("--out", type=Path, help="where the pipelines' folders go (default: build/pipelines)")
    parser.add_argument("--from", dest="finished", type=Path, help="finished folder of the one named pipeline")
    options = parser.parse_args(argv)
    if options.finished and len(options.names) != 1:
        parser.error("--from works with exactly one pipeline; name it")
    console, met = Console(), True
    try:
        for name in options.names or shipped_recipes("pipeline"):
            met &= run(name, options.out, options.finished, options.write, console)
    except ConfigError as error:
        parser.error(str(error))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
