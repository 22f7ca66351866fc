"""Lists the runs in a folder and creates the folder for the next one; torch is not imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from posttrain.store.database import run_folders
from posttrain.store.run import Run, Status
from posttrain.types import JsonView, PosttrainError


@dataclass(frozen=True)
class RunInfo:
    """Summary of a run for listings. `note` describes the damage of a damaged run."""

    path: Path
    status: Status
    last_step: int | None = None
    header: JsonView = field(default_factory=lambda: {})
    summary: JsonView | None = None
    note: str = ""


def list_runs(root: Path) -> list[RunInfo]:
    """All runs directly below `root`, sorted by name. Other folders are skipped; damaged runs are listed as damaged."""
    return [_info(path) for path in run_folders(root)]


def run_date(header: JsonView) -> date:
    """The date on which a run was created, from its header; today if the header does not have it."""
    created = str(header.get("created", ""))[:10]
    return date.fromisoformat(created) if created else date.today()


def run_behind(model: str | Path) -> Path:
    """The folder of the run that a model belongs to, if there is one: the parent of `RUN/model`, else the folder."""
    folder = Path(model)
    return folder.parent if folder.name == "model" else folder


def template_settings(model: str | Path) -> tuple[JsonView, date | None]:
    """The chat template's arguments and date in the run that a model belongs to: a run's folder, or the model in it.

    Other models have no arguments, and None for the date, which means today.
    """
    run = run_behind(model)
    if not (run / "run.json").is_file():
        return {}, None
    with Run.read(run) as store:
        header = store.header
    return header.get("recipe", {}).get("data", {}).get("template_kwargs", {}), run_date(header)


def next_folder(root: Path, algorithm: str) -> Path:
    """Creates the next free folder, e.g. runs/grpo-0007; concurrent calls get different folders."""
    root.mkdir(parents=True, exist_ok=True)
    while True:
        names = (re.fullmatch(rf"{re.escape(algorithm)}-(\d+)", path.name) for path in root.iterdir())
        folder = root / f"{algorithm}-{max((int(m[1]) for m in names if m), default=0) + 1:04d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another process was faster
            continue


def _info(path: Path) -> RunInfo:
    try:
        with Run.read(path) as run:
            return RunInfo(path, run.status(), run.last_step(), run.header, run.summary())
    except (PosttrainError, OSError, ValueError) as error:
        return RunInfo(path, "damaged", note=str(error))
