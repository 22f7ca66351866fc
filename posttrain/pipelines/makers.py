"""What makes data between the training stages of a pipeline: name → settings and function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.pipelines import best_of_n, critique, demonstrations, labeler, probing, selection, shrink

Maker = Callable[[Any, Path], dict[str, Any]]
"""make(settings, folder) → counts for JSON. Writes `folder/data.jsonl`, or a model to `folder/model`."""

MAKERS: dict[str, tuple[type, Maker]] = {
    "demonstrations": (demonstrations.Demonstrations, demonstrations.make),
    "preferences": (labeler.Preferences, labeler.make),
    "selection": (selection.Selection, selection.make),
    "critique": (critique.Critiques, critique.make),
    "best-of-n": (best_of_n.BestOfN, best_of_n.make),
    "probes": (probing.Probes, probing.make),
    "shrink": (shrink.Shrink, shrink.make),
}
"""Every random choice is a function of the settings, so the same settings make the same files."""
