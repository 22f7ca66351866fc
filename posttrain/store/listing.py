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


def run_of(model: str | Path) -> Path | None:
    """The run that a folder is, or is a checkpoint of (`RUN/ckpt/step_0000010`); None for other folders."""
    folder = Path(model)
    if (folder / "run.json").is_file():
        return folder
    run = folder.parent.parent
    return run if folder.parent.name == "ckpt" and (run / "run.json").is_file() else None


def run_behind(model: str | Path) -> Path | None:
    """The run that a model belongs to: as `run_of`, and for the exported `RUN/model`, too; None for other models."""
    return run_of(Path(model).parent if Path(model).name == "model" else model)


def recipe_behind(model: str | Path) -> JsonView:
    """The stored settings of the run that a model belongs to, by section; empty for other models."""
    return _header_behind(model).get("recipe", {})


def template_settings(model: str | Path) -> tuple[JsonView, date | None]:
    """The chat template's arguments and date in the run that a model belongs to.

    Other models have no arguments, and None for the date, which means today.
    """
    header = _header_behind(model)
    return header.get("recipe", {}).get("data", {}).get("template_kwargs", {}), run_date(header) if header else None


def stop_settings(model: str | Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The stop strings and extra stop token ids of the run that a model belongs to; none for other models."""
    rollout = recipe_behind(model).get("rollout", {})
    return tuple(rollout.get("stop", ())), tuple(rollout.get("stop_token_ids", ()))


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


def _header_behind(model: str | Path) -> JsonView:
    run = run_behind(model)
    if run is None:
        return {}
    with Run.read(run) as store:
        return store.header


def _info(path: Path) -> RunInfo:
    try:
        with Run.read(path) as run:
            return RunInfo(path, run.status(), run.last_step(), run.header, run.summary())
    except (PosttrainError, OSError, ValueError) as error:
        return RunInfo(path, "damaged", note=str(error))
