"""Pipeline record: `pipeline.json` in a pipeline's folder, rewritten each time a stage ends."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.types import Json, ResumeError

RECORD = "pipeline.json"


def is_pipeline(folder: Path) -> bool:
    """Whether a pipeline has run in this folder."""
    return (folder / RECORD).exists()


def read_record(folder: Path) -> Json:
    """Reads the record; its `stages` are a list. Raises ResumeError if the file is missing or damaged."""
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["stages"], list):
            raise TypeError("stages is not a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, error) from None
    return record


def damaged(file: Path, error: Exception) -> ResumeError:
    """The error for a pipeline file that cannot be read."""
    return ResumeError(f"{file} is damaged ({error!r}). Run the pipeline again to rewrite it.")
