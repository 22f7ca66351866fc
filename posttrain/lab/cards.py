"""Answers of a pipeline's models to the same evaluation prompts, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.lab.folders import Place
from posttrain.lab.routing import get, named
from posttrain.store.pipeline import RECORD, damaged, read_record
from posttrain.types import Json, JsonView

ANSWERS = "answers.jsonl"


class CardAnswer(TypedDict):
    """A model's answer to a prompt of its evaluation."""

    text: str
    passed: bool
    detail: str


class AnsweredPrompt(TypedDict):
    """A prompt with one answer (or None) per stage."""

    capability: str
    prompt: str
    answers: list[CardAnswer | None]


class Answers(TypedDict):
    """The stages that stored answers, and the prompts."""

    stages: list[str]
    prompts: list[AnsweredPrompt]


def routes(place: Place) -> list[BaseRoute]:
    """The route for a pipeline's recorded answers."""

    def answers(request: Request) -> Answers:
        return read_answers(place.pipeline(named(request, "pipeline")))

    return [get("/api/pipelines/{pipeline}/answers", answers)]


def read_answers(folder: Path) -> Answers:
    """The stored answers of all stages, by prompt.

    Raises ResumeError if the record or a file of answers cannot be read.
    """
    stages, file = read_record(folder)["stages"], folder / RECORD
    try:
        kept: dict[str, list[Json]] = {}
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
    prompts: list[AnsweredPrompt] = [
        {
            "capability": capability,
            "prompt": prompt,
            "answers": [rows.get((capability, prompt)) for rows in found.values()],
        }
        for capability, prompt in asked
    ]
    return {"stages": list(kept), "prompts": prompts}


def _answer(row: JsonView) -> CardAnswer:
    return {"text": str(row["answer"]), "passed": bool(row["passed"]), "detail": str(row.get("detail", ""))}
