"""The bias probes as a stage: what a pipeline's reward model pays for besides being right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import api
from posttrain.config.sections import require_positive
from posttrain.pipelines.rows import DATA


@dataclass(frozen=True)
class Probes:
    model: str = ""
    """The reward model that is asked, usually `{STAGE}`; several are joined with +."""
    tasks: str = "arithmetic"
    """Held-out tasks whose gold answers are dressed up: longer, in Markdown, as the user expects."""
    count: int = 64
    """Questions."""
    seed: int = 0
    """Which wrong answers and fillers are used."""

    def __post_init__(self) -> None:
        require_positive(self, "count")


def make(cfg: Probes, folder: Path) -> dict[str, Any]:
    """Asks every probe of posttrain/evaluation/bias_probes.py; returns each finding's value with its interval, and keeps examples."""
    found = [finding.as_dict() for finding in api.probe(cfg.model, cfg.tasks, cfg.count, cfg.seed)]
    lines = "".join(json.dumps(finding, ensure_ascii=False) + "\n" for finding in found)
    (folder / DATA).write_text(lines, encoding="utf-8", newline="\n")
    return {finding["name"]: {**finding["estimate"], "unit": finding["unit"]} for finding in found}
