"""Runs, pipelines and pipeline stages in a folder, each under a name that fits into a URL.

A run in the folder has its own name, the run of a pipeline stage PIPELINE~STAGE. A name is looked up among the existing
names and never joined to a path, so that no URL leads out of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from posttrain import config
from posttrain.config import Facts
from posttrain.evaluation.labels import LABELS
from posttrain.store.database import connect, is_run, run_folders
from posttrain.store.pipeline import RECORD, damaged, is_pipeline, read_record
from posttrain.store.run import Run
from posttrain.types import JsonView, PosttrainError, ResumeError

SEPARATOR = "~"
LISTED = ("reward", "accuracy", "eval/accuracy", "length", "kl_episode", "nll", "loss")
"""Metrics shown in the list of runs, if a run's latest steps have them."""


class RunFacts(TypedDict):
    """A run's main settings."""

    algorithm: str
    model: str
    tasks: str
    reward: str
    seed: int | None
    created: str
    steps: int | None


class RunLine(TypedDict):
    """A run in the list of runs; a damaged one has no settings."""

    name: str
    status: str
    step: int | None
    created: str
    note: str
    metrics: dict[str, float]
    algorithm: NotRequired[str]
    model: NotRequired[str]
    tasks: NotRequired[str]
    reward: NotRequired[str]
    seed: NotRequired[int | None]
    steps: NotRequired[int | None]


class CardValue(TypedDict):
    """A metric of an evaluation card: its mean over n tasks with its interval."""

    value: float
    low: float
    high: float
    n: int


Card = dict[str, CardValue]
"""Metric → its value."""


class StagePage(TypedDict):
    """A stage of a pipeline for its page; `address` is the name of its run."""

    name: str
    run: str
    seconds: float | None
    made: dict[str, int | float | str]
    card: Card | None
    address: str | None


class CardFigure(TypedDict):
    """How a metric of the cards is shown."""

    name: str
    label: str
    note: str
    share: bool


class Expected(TypedDict):
    """An expected result: its bounds, and what was found."""

    name: str
    low: float
    high: float
    found: float | None


class PipelinePage(TypedDict):
    """A pipeline for its page."""

    name: str
    pipeline: str
    about: str
    finished: bool
    stages: list[StagePage]
    figures: list[CardFigure]
    expected: list[Expected]


@dataclass(frozen=True)
class Place:
    """The folder that the lab shows; it may itself be a run or a pipeline."""

    root: Path

    def runs(self) -> dict[str, Path]:
        """Name → folder of every run, including those of pipeline stages."""
        if is_run(self.root):
            return {self.root.name: self.root}
        found = {path.name: path for path in run_folders(self.root)}
        for name, pipeline in self.pipelines().items():
            found |= {f"{name}{SEPARATOR}{path.name}": path for path in run_folders(pipeline)}
        return found

    def pipelines(self) -> dict[str, Path]:
        """Name → folder of every pipeline."""
        if is_pipeline(self.root):
            return {self.root.name: self.root}
        inside = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return {path.name: path for path in inside if is_pipeline(path)}

    def run(self, name: str) -> Path:
        """The folder of a run. Raises ResumeError if there is no run of that name."""
        return _look_up(self.runs(), name, "run", self.root)

    def pipeline(self, name: str) -> Path:
        """The folder of a pipeline. Raises ResumeError if there is no pipeline of that name."""
        return _look_up(self.pipelines(), name, "pipeline", self.root)


def trained(header: JsonView) -> Facts | None:
    """The facts of a run's algorithm; None if this version does not know the algorithm or its settings."""
    try:
        return config.stored(header["algorithm"], header["recipe"]).facts()
    except (KeyError, TypeError, PosttrainError):
        return None


def _look_up(found: Mapping[str, Path], name: str, what: str, root: Path) -> Path:
    if name not in found:
        raise ResumeError(f"{root} contains no {what} named {name!r}.")
    return found[name]


def list_runs(place: Place) -> list[RunLine]:
    """Every run with its status, latest step and latest metrics, ready for JSON; newest first."""
    rows = [_line(name, path) for name, path in place.runs().items()]
    return sorted(rows, key=lambda row: (row["created"], row["name"]), reverse=True)


def _line(name: str, path: Path) -> RunLine:
    line: RunLine = {"name": name, "status": "damaged", "step": None, "created": "", "note": "", "metrics": {}}
    try:
        with Run.read(path) as run:
            line = {**line, "status": run.status(), "step": run.last_step(), **facts(run)}
        line["metrics"] = newest(path)
    except (PosttrainError, OSError, ValueError) as error:
        line["note"] = str(error)
    return line


def facts(run: Run) -> RunFacts:
    """A run's main settings."""
    recipe = run.header.get("recipe", {})
    data = recipe.get("data", {})
    return {
        "algorithm": str(run.header.get("algorithm", "")),
        "model": str(recipe.get("model", {}).get("path", "")),
        "tasks": str(data.get("tasks", "")),
        "reward": str(recipe.get("reward", {}).get("name", "")),
        "seed": recipe.get("run", {}).get("seed"),
        "created": str(run.header.get("created", "")),
        "steps": recipe.get("train", {}).get("steps"),
    }


def newest(path: Path) -> dict[str, float]:
    """Latest values of the metrics shown in the list of runs."""
    database = connect(path, "ro")
    try:
        last = database.execute("SELECT max(step) FROM metrics").fetchone()[0]
        if last is None:
            return {}
        marks = ", ".join("?" * len(LISTED))
        rows = database.execute(
            f"SELECT name, value FROM metrics WHERE step > ? AND name IN ({marks}) AND value IS NOT NULL ORDER BY step",
            (last - 50, *LISTED),  # held-out metrics are not measured at every step
        ).fetchall()
    finally:
        database.close()
    found = dict(rows)
    return {name: found[name] for name in LISTED if name in found}


def read_pipeline(place: Place, name: str) -> PipelinePage:
    """A pipeline's record for its page: stages with their runs, evaluation cards and expected results."""
    folder = place.pipeline(name)
    record = read_record(folder)
    try:
        stages = [_stage(name, folder, stage) for stage in record["stages"]]
    except (KeyError, TypeError) as error:
        raise damaged(folder / RECORD, error) from None
    results = record.get("results")
    return {
        "name": name,
        "pipeline": str(record.get("pipeline", name)),
        "about": str(record.get("about", "")),
        "finished": results is not None,
        "stages": stages,
        "figures": _figures([stage["card"] for stage in stages if stage["card"]]),
        "expected": [
            {"name": one, "low": low, "high": high, "found": (results or {}).get(one)}
            for one, (low, high) in (record.get("expect") or {}).items()
        ],
    }


def _stage(pipeline: str, folder: Path, stage: JsonView) -> StagePage:
    own = folder / stage["folder"]
    has_run = own.parent == folder and is_run(own)
    made = {k: v for k, v in (stage.get("made") or {}).items() if isinstance(v, int | float | str)}
    return {
        "name": str(stage["name"]),
        "run": str(stage["run"]),
        "seconds": stage.get("seconds"),
        "made": made,
        "card": _card(stage.get("card")),
        "address": f"{pipeline}{SEPARATOR}{own.name}" if has_run else None,
    }


def _card(card: JsonView | None) -> Card | None:
    """The metrics of a card; its other fields describe how it was made."""
    if not card:
        return None
    return {name: cast(CardValue, one) for name, one in card.items() if isinstance(one, dict) and "value" in one}


def _figures(cards: list[Card]) -> list[CardFigure]:
    """Every metric that any card has, in order: its label, a note, and whether it is a share."""
    names = dict.fromkeys(name for card in cards for name in card)
    said = {name: LABELS.get(name, (name.replace("_", " "), False)) for name in names}
    return [
        {"name": name, "label": text.partition(", ")[0], "note": text.partition(", ")[2], "share": share}
        for name, (text, share) in said.items()
    ]
