"""What makes data between the training stages of a pipeline: name → settings and function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.pipelines import critique, demonstrations, labeler, selection, shrink

Maker = Callable[[Any, Path], dict[str, Any]]
"""make(settings, folder) → counts for JSON. Writes `folder/data.jsonl`, or a model to `folder/model`."""

MAKERS: dict[str, tuple[type, Maker]] = {
    "demonstrations": (demonstrations.Demonstrations, demonstrations.make),
    "preferences": (labeler.Preferences, labeler.make),
    "selection": (selection.Selection, selection.make),
    "critique": (critique.Critiques, critique.make),
    "shrink": (shrink.Shrink, shrink.make),
}
"""Every random choice is a function of the settings, so the same settings make the same files."""
