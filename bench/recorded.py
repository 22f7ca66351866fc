"""Records finished pipelines for the lab: every model's card and its completions for the same prompts.

    python -m bench.recorded --from FOLDER [--from FOLDER ...]

writes posttrain/lab/recorded/NAME.json for each folder of a finished full run, with a hash of what was run, so that a
test fails if the recipe has changed since. Nothing in the file is written by hand, and no model is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.pipelines import DIGITS, recipe_sha256, require_run_of
from posttrain import __version__
from posttrain.cli.arguments import find_recipe
from posttrain.lab.explore.stages import record
from posttrain.lab.folders import Place
from posttrain.pipelines.recipe import read_pipeline
from posttrain.store.pipeline import read_record
from posttrain.types import ConfigError

RECORDED = ROOT / "posttrain" / "lab" / "recorded"
LARGEST = 100_000  # largest allowed record, in bytes


def recorded(folder: Path) -> dict[str, Any]:
    """The record of a finished run. Raises ConfigError unless the folder holds a full run of a shipped recipe."""
    pipeline = read_pipeline(find_recipe(str(read_record(folder).get("pipeline"))))
    require_run_of(pipeline, folder)
    made_by = {"recipe_sha256": recipe_sha256(pipeline), "posttrain": __version__}
    return {**made_by, **rounded(record(Place(folder), folder.name))}


def rounded(value: Any) -> Any:
    """The value with every float rounded to DIGITS significant digits, like the results stored with the recipes."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.recorded", description="Record pipelines for the lab.")
    parser.add_argument("--from", dest="folders", type=Path, action="append", required=True, help="a finished pipeline")
    try:
        for folder in parser.parse_args(argv).folders:
            kept = recorded(folder.resolve())
            text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
            if len(text.encode()) > LARGEST:
                raise ConfigError(f"the record of {folder} has {len(text.encode())} bytes; the limit is {LARGEST}.")
            RECORDED.mkdir(exist_ok=True)
            (RECORDED / f"{kept['pipeline']}.json").write_text(text, encoding="utf-8")
            print(f"{kept['pipeline']}: {len(kept['stages'])} stages, {len(kept['prompts'])} prompts")
    except ConfigError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
