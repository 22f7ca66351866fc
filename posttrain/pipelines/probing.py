"""Data stage `probes`: bias probes of a pipeline's reward model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from posttrain import api
from posttrain.config.sections import require_positive
from posttrain.pipelines.rows import DATA
from posttrain.types import Json


@dataclass(frozen=True)
class Probes:
    model: str = ""
    """Reward model to probe, usually `{STAGE}`; several are joined with +."""
    tasks: str = "arithmetic"
    """Held-out tasks whose gold answers are varied: longer, in Markdown, as the user expects."""
    count: int = 64
    """Number of questions."""
    seed: int = 0
    """Seed for wrong answers and fillers."""

    def __post_init__(self) -> None:
        require_positive(self, "count")


def make(cfg: Probes, folder: Path) -> dict[str, Json]:
    """Runs all bias probes; writes the findings with examples, and returns each one's value with its interval."""
    found = [finding.as_dict() for finding in api.probe(cfg.model, cfg.tasks, cfg.count, cfg.seed)]
    lines = "".join(json.dumps(finding, ensure_ascii=False) + "\n" for finding in found)
    (folder / DATA).write_text(lines, encoding="utf-8", newline="\n")
    return {finding["name"]: {**finding["estimate"], "unit": finding["unit"]} for finding in found}
