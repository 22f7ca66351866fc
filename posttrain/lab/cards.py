"""Answers of a pipeline's models to the same evaluation prompts, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.lab.folders import Place
from posttrain.lab.routing import get, named
from posttrain.store.pipeline import RECORD, damaged, read_record

ANSWERS = "answers.jsonl"


def routes(place: Place) -> list[BaseRoute]:
    """The route for a pipeline's recorded answers."""

    def answers(request: Request) -> dict[str, Any]:
        return read_answers(place.pipeline(named(request, "pipeline")))

    return [get("/api/pipelines/{pipeline}/answers", answers)]


def read_answers(folder: Path) -> dict[str, Any]:
    """`stages` that stored answers, and `prompts`, each with its capability and one answer (or None) per stage.

    Raises ResumeError if the record or a file of answers cannot be read.
    """
    stages, file = read_record(folder)["stages"], folder / RECORD
    try:
        kept: dict[str, list[dict[str, Any]]] = {}
        for stage in stages:
            file = (folder / str(stage.get("card_folder") or ".") / ANSWERS).resolve()
            if file.is_relative_to(folder.resolve()) and file.is_file():
                kept[str(stage["name"])] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        asked = dict.fromkeys((row["capability"], row["prompt"]) for rows in kept.values() for row in rows)
        found = {
            name: {(row["capability"], row["prompt"]): _answer(row) for row in rows} for name, rows in kept.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(file, error) from None
    prompts = [
        {
            "capability": capability,
            "prompt": prompt,
            "answers": [rows.get((capability, prompt)) for rows in found.values()],
        }
        for capability, prompt in asked
    ]
    return {"stages": list(kept), "prompts": prompts}


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": str(row["answer"]), "passed": bool(row["passed"]), "detail": str(row.get("detail", ""))}
