"""What a pipeline's folder says of itself: `pipeline.json`, written anew whenever one of its stages has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.types import ResumeError

RECORD = "pipeline.json"


def is_pipeline(folder: Path) -> bool:
    """Whether a pipeline has run here."""
    return (folder / RECORD).exists()


def read_record(folder: Path) -> dict[str, Any]:
    """The record, whose `stages` are a list. Raises ResumeError where it is damaged."""
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["stages"], list):
            raise TypeError("stages is no list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, error) from None
    return record


def damaged(file: Path, error: Exception) -> ResumeError:
    """What is said of a file of a pipeline that cannot be made sense of."""
    return ResumeError(f"{file} is damaged ({error!r}). Run the pipeline again to rewrite it.")
