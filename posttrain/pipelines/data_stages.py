"""Registry of data stages: pipeline stages that build a dataset, a measurement or a model without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.pipelines import best_of_n, critique, demonstrations, labeler, probing, search, selection, shrink
from posttrain.types import Json

Builder = Callable[[Any, Path], Json]
"""make(settings, folder) → counts for JSON. Writes `folder/data.jsonl`, or a model to `folder/model`."""

DATA_STAGES: dict[str, tuple[type, Builder]] = {
    "demonstrations": (demonstrations.Demonstrations, demonstrations.make),
    "preferences": (labeler.Preferences, labeler.make),
    "selection": (selection.Selection, selection.make),
    "critique": (critique.Critiques, critique.make),
    "best-of-n": (best_of_n.BestOfN, best_of_n.make),
    "search": (search.Search, search.make),
    "probes": (probing.Probes, probing.make),
    "shrink": (shrink.Shrink, shrink.make),
}
"""Name → settings class and builder. All randomness is seeded by the settings: same settings, same files."""
