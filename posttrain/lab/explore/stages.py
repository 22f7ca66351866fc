"""Stages explorer: the stages of a finished pipeline, each model's answers and metrics, and what changed.

The bundled pipelines were recorded by `python -m bench.recorded`. A finished pipeline in the lab's folder is read the
same way, and its models can answer new prompts while they exist.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.evaluation.intervals import Estimate, difference
from posttrain.evaluation.labels import LABELS
from posttrain.lab.cards import CardAnswer, read_answers
from posttrain.lab.chat import unfold
from posttrain.lab.checkpoints import SHIPPED, models
from posttrain.lab.folders import SEPARATOR, Card, Place, read_pipeline
from posttrain.lab.routing import get, named
from posttrain.store.pipeline import RECORD, damaged, read_record
from posttrain.types import Json, JsonView, ResumeError

RECORDED = Path(__file__).parents[1] / "recorded"
MAIN = ("helpfulness", "safety", "reasoning")
"""The metrics shown as bars for every stage."""
COUNTED = ("eval/pair_accuracy", "eval/step_accuracy")
"""The metrics shown for a run whose model only scores."""
_REFERENCE = re.compile(r"\{([a-z0-9-]+)\}")


Origin = TypedDict("Origin", {"from": str | None, "uses": list[str]})
"""The stage whose model a stage starts from, and the others it uses."""


class StageRecord(Origin):
    """A stage; `counted` has a data stage's counts or a scoring model's evaluation, `model` its name in the chat."""

    name: str
    run: str
    seconds: float | None
    card: Card | None
    counted: Json
    model: NotRequired[str | None]


class Asked(TypedDict):
    """A prompt and the stages' answers to it."""

    capability: str
    prompt: str
    answers: dict[str, CardAnswer]


class Record(TypedDict):
    """A pipeline: its stages with their cards, and every model's answers to the same prompts."""

    pipeline: str
    about: str
    finished: bool
    stages: list[StageRecord]
    prompts: list[Asked]


class Recorded(Record):
    """The record of a bundled pipeline, with the hash of its recipe and the version of the package that ran it."""

    recipe_sha256: str
    posttrain: str


class Described(TypedDict):
    """A metric's label, whether it is a share, and whether `high` or `low` is better, or neither ("")."""

    label: str
    share: bool
    better: str


class Change(TypedDict):
    """The change of a metric, with its interval; `verdict` is `gain`, `cost`, or `unclear` if that contains 0."""

    name: str
    label: str
    before: float
    after: float
    by: float
    low: float
    high: float
    verdict: str


def routes(place: Place) -> list[BaseRoute]:
    """The routes for the list of pipelines and for each pipeline."""

    def listed(request: Request) -> Json:
        return {"recorded": [_titled(name, record) for name, record in recorded().items()], "here": _finished(place)}

    def shipped(request: Request) -> Json:
        name = named(request, "pipeline")
        if name not in (found := recorded()):
            raise ResumeError(f"no pipeline named {name!r} is recorded; choose one of {', '.join(found)}.")
        return explained(found[name])

    def own(request: Request) -> Json:
        name = named(request, "pipeline")
        folder = place.pipeline(name)
        try:
            return explained(with_models(place, name))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(folder / RECORD, error) from None

    return [
        get("/api/explore/stages", listed),
        get("/api/explore/stages/recorded/{pipeline}", shipped),
        get("/api/explore/stages/here/{pipeline}", own),
    ]


def recorded() -> dict[str, Recorded]:
    """Name → record of every bundled pipeline, `rlhf` first."""
    files = sorted(RECORDED.glob("*.json"), key=lambda file: (file.stem != "rlhf", file.stem))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def record(place: Place, name: str) -> Record:
    """A pipeline's record. Raises ResumeError if the pipeline is damaged."""
    folder = place.pipeline(name)
    read, kept = read_pipeline(place, name), read_record(folder)
    origin, counted = origins(_recipe(kept)), _counted(kept["stages"])
    answers = read_answers(folder)
    stages: list[StageRecord] = [
        {
            "name": stage["name"],
            "run": stage["run"],
            "seconds": stage["seconds"],
            **origin.get(stage["name"], {"from": None, "uses": []}),
            "card": stage["card"],
            "counted": counted[stage["name"]],
        }
        for stage in read["stages"]
    ]
    asked: dict[str, Asked] = {}
    for row in answers["prompts"]:  # two capabilities may share a prompt, which is shown once
        said = {stage: one for stage, one in zip(answers["stages"], row["answers"], strict=True) if one}
        question: Asked = {"capability": row["capability"], "prompt": row["prompt"], "answers": said}
        asked.setdefault(row["prompt"], question)
    return {
        "pipeline": read["pipeline"],
        "about": read["about"],
        "finished": read["finished"],
        "stages": stages,
        "prompts": list(asked.values()),
    }


def with_models(place: Place, name: str) -> Record:
    """The record of a pipeline in the lab's folder, in which each stage has `model`, None if there is no such model."""
    found = record(place, name)
    known = models(place)
    kept = read_record(place.pipeline(name))
    paths = _given(_recipe(kept))
    folders = {stage["name"]: str(stage["folder"]) for stage in kept["stages"]}
    for stage in found["stages"]:
        own = SHIPPED if paths.get(stage["name"]) == SHIPPED else f"{name}{SEPARATOR}{folders[stage['name']]}"
        stage["model"] = own if own in known and stage["card"] else None
    return found


def explained(found: Record) -> Json:
    """The record with derived data: for each model the changes from the model it started from, and its answers with
    thoughts separated."""
    cards = {stage["name"]: stage["card"] for stage in found["stages"]}
    stages = [
        {**stage, "changes": changes(cards.get(stage["from"] or "") or {}, stage["card"] or {})}
        for stage in found["stages"]
    ]
    prompts = [
        {**row, "answers": {stage: {**one, **_unfolded(one["text"])} for stage, one in row["answers"].items()}}
        for row in found["prompts"]
    ]
    names = [name for name in LABELS if any(card and name in card for card in cards.values())]
    figures = [{"name": name, **described(name)} for name in names]
    return {**found, "stages": stages, "prompts": prompts, "main": MAIN, "figures": figures}


def changes(before: Card, after: Card) -> list[Change]:
    """The change of every directed metric that two cards share."""
    found: list[Change] = []
    for name in [name for name in LABELS if name in before and name in after]:
        about = described(name)
        if about["better"]:
            step = difference(Estimate(**before[name]), Estimate(**after[name]))
            sure = step.low > 0 or step.high < 0
            verdict = ("gain" if (step.value > 0) == (about["better"] == "high") else "cost") if sure else "unclear"
            row: Change = {
                "name": name,
                "label": about["label"],
                "before": before[name]["value"],
                "after": after[name]["value"],
                "by": step.value,
                "low": step.low,
                "high": step.high,
                "verdict": verdict,
            }
            found.append(row)
    return found


def described(name: str) -> Described:
    """How a metric is shown."""
    label, share = LABELS[name]
    text, _, note = label.partition(", ")
    better = {"higher is better": "high", "lower is better": "low"}.get(note, "")
    return {"label": text, "share": share, "better": better}


def origins(recipe: str) -> dict[str, Origin]:
    """Stage → its origin, from a recipe's TOML."""
    found: dict[str, Origin] = {}
    for stage in _tables(recipe):
        model = stage.get("model")
        path = str(model.get("path", "")) if isinstance(model, dict) else ""
        start = _REFERENCE.fullmatch(path)
        rest = {key: value for key, value in stage.items() if key != "reference"}
        used = dict.fromkeys(_REFERENCE.findall(json.dumps(rest, default=str)))
        begun = start[1] if start else None
        found[str(stage["name"])] = {"from": begun, "uses": [name for name in used if name != begun]}
    return found


def _given(recipe: str) -> dict[str, str]:
    """Stage → model path, for the stages that use an existing model."""
    return {str(s["name"]): str(s.get("path", SHIPPED)) for s in _tables(recipe) if s.get("run") == "model"}


def _tables(recipe: str) -> list[Json]:
    try:
        return [stage for stage in tomllib.loads(recipe).get("stage", []) if "name" in stage]
    except (tomllib.TOMLDecodeError, AttributeError, TypeError):
        return []


def _recipe(kept: JsonView) -> str:
    return str(kept.get("recipe", ""))


def _counted(stages: Sequence[JsonView]) -> dict[str, Json]:
    """Stage → counts of a data stage, or the last evaluation of a scoring model, as numbers or estimates."""
    found: dict[str, Json] = {}
    for stage in stages:
        made = {name: value for name, value in (stage.get("made") or {}).items() if _is_figure(value)}
        last = (stage.get("summary") or {}).get("after") or {}
        for name in [name for name in COUNTED if name in last and not stage.get("card")]:
            ends = {end: last.get(f"{name}_{end}", last[name]) for end in ("low", "high")}
            made[name.removeprefix("eval/")] = {"value": last[name], **ends}
        found[str(stage["name"])] = made
    return found


def _is_figure(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number or (isinstance(value, dict) and isinstance(value.get("value"), int | float))


def _unfolded(text: str) -> dict[str, str]:
    thought, answer = unfold(text)
    return {"thought": thought, "answer": answer}


def _titled(name: str, found: Record) -> dict[str, str]:
    return {"name": name, "about": str(found["about"])}


def _finished(place: Place) -> list[dict[str, str]]:
    """The finished pipelines of the lab's folder, without damaged ones, which report that on their own page."""
    found: list[dict[str, str]] = []
    for name, folder in place.pipelines().items():
        try:
            known = read_record(folder)
        except ResumeError:
            continue
        if known.get("results") is not None:
            found.append({"name": name, "about": str(known.get("about", ""))})
    return found
