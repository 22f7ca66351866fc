"""Trains a reward model on labels: writes the export and starts `posttrain reward` on it in a separate process.

The process is detached: it keeps running when the lab is closed, and its run is shown like any other. A run is named
after its data and settings, so that requesting the same training twice starts it once.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, TypedDict

from posttrain.lab.checkpoints import SHIPPED, find_model
from posttrain.lab.folders import Place, trained
from posttrain.lab.label import export
from posttrain.lab.label.store import FOLDER, Queue
from posttrain.store.run import Run
from posttrain.types import ConfigError, PosttrainError

SETTINGS = {"train.lr": "3e-4", "train.schedule": "cosine", "algo.batch_pairs": "16", "data.holdout": "0.25"}
"""For a few dozen labels: small batches, and a quarter of the prompts held out to evaluate the model."""
STEPS, MOST_STEPS = 40, 10_000


class Training(TypedDict):
    """A reward model that is or was trained on a queue; `said` is the end of its output if it failed to start."""

    run: str
    status: str
    step: int | None
    steps: int | None
    file: str
    created: str
    said: str


def arguments(place: Place, data: Path, model: str, steps: int, run: str) -> list[str]:
    """The arguments of the `posttrain` command that trains on an export."""
    name = SHIPPED if model == SHIPPED else str(find_model(place, model))
    words = ["reward", "--model", name, "--data", str(data), "--out", str(place.root / run)]
    for setting, value in {"train.steps": str(steps), **SETTINGS}.items():
        words += [f"--{setting}", value]
    return words


def commands(place: Place, queue: Queue, data: Path, model: str, steps: int) -> dict[str, str]:
    """Commands that train on an export: a reward model, or a policy with DPO."""
    run = run_name(queue, data, model, steps)
    dpo = ["dpo", "--model", arguments(place, data, model, steps, run)[2], "--data", str(data)]
    dpo += ["--out", str(place.root / run.replace("-reward-", "-dpo-"))]
    return {
        "reward": shlex.join(["posttrain", *arguments(place, data, model, steps, run)]),
        "dpo": shlex.join(["posttrain", *dpo]),
    }


def run_name(queue: Queue, data: Path, model: str, steps: int) -> str:
    """QUEUE-reward-DIGEST, with a digest of the data, model and steps."""
    digest = hashlib.sha256(f"{data.name} {model} {steps}".encode()).hexdigest()[:8]
    return f"{queue.name}-reward-{digest}"


def steps_of(given: Any) -> int:
    """Validates a number of updates. Raises ConfigError for anything else."""
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= MOST_STEPS:
        raise ConfigError(f"steps={given!r}, expected a whole number from 1 to {MOST_STEPS}.")
    return given


class Trainings:
    """The training processes started by this lab."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(self, queue: Queue, who: str, ties: str, model: str, steps: int) -> dict[str, str | int]:
        """Exports and trains, unless that run exists or is starting. Returns the run's name, rows and file."""
        if (self.place.root / "run.json").exists():
            raise ConfigError(
                "this lab shows a single run, which cannot contain another. Open the folder above it instead."
            )
        data, count = export.write(queue, who, ties)
        run = run_name(queue, data, model, steps)
        words = arguments(self.place, data, model, steps, run)
        with self._lock:
            known = self._started.get(run)
            busy = known is not None and known.poll() is None
            if not busy and not (self.place.root / run / "run.json").exists():
                with self._log(run).open("wb") as log:
                    self._started[run] = subprocess.Popen(
                        [sys.executable, "-m", "posttrain", *words],
                        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
        return {"run": run, "rows": count, "file": data.name}

    def of(self, queue: Queue) -> list[Training]:
        """The reward models of a queue, newest first."""
        exported = export.written(self.place.root, queue.name)
        found = [_line(name, path, exported) for name, path in self.place.runs().items()]
        lines = [line for line in found if line]
        shown = {line["run"] for line in lines}
        with self._lock:
            for run, process in self._started.items():
                if run.startswith(f"{queue.name}-reward-") and run not in shown:
                    status = "starting" if process.poll() is None else "failed"
                    said = self._said(run) if status == "failed" else ""
                    line = Training(run=run, status=status, step=None, steps=None, file="", created="~", said=said)
                    lines.append(line)  # "~" sorts after every date
        return sorted(lines, key=lambda line: line["created"], reverse=True)

    def _log(self, run: str) -> Path:
        return self.place.root / FOLDER / f"{run}.log"

    def _said(self, run: str) -> str:
        """The last lines of a process's output."""
        return "\n".join(self._log(run).read_text(encoding="utf-8", errors="replace").split("\n")[-8:]).strip()


def _line(name: str, folder: Path, exported: dict[str, Path]) -> Training | None:
    """Summary of a run that was trained on one of these files, else None."""
    try:
        with Run.read(folder) as run:
            recipe = run.header.get("recipe", {})
            file = Path(str(recipe.get("data", {}).get("tasks", ""))).name
            facts = trained(run.header)
            if facts is None or (facts.trains, facts.data) != ("scorer", "pairs") or file not in exported:
                return None
            steps = recipe.get("train", {}).get("steps")
            return {
                "run": name,
                "status": run.status(),
                "step": run.last_step(),
                "steps": steps,
                "file": file,
                "created": str(run.header.get("created", "")),
                "said": "",
            }
    except (PosttrainError, OSError, ValueError):
        return None
