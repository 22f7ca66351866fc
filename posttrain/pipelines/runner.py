"""Runs a pipeline: each stage once, in a folder named by the hash of its inputs, and an examination of what it made.

The hash covers a stage's settings, what earlier stages it reads were made from, and the contents of the files and
models it names. So a changed setting makes the stages below it anew and no others, and a pipeline that was killed goes
on where it was: an algorithm from its newest checkpoint, a maker from its beginning.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from posttrain import __version__, api, config
from posttrain.pipelines.card import CardConfig, examine
from posttrain.pipelines.data_stages import DATA_STAGES
from posttrain.pipelines.figures import Finished, draw
from posttrain.pipelines.recipe import GIVEN, Pipeline, Stage, filled
from posttrain.rollout.build import OnStep
from posttrain.store import durable
from posttrain.store.pipeline import RECORD, is_pipeline, read_record
from posttrain.store.run import Run
from posttrain.train import device as machine
from posttrain.types import ConfigError

Outcome = tuple[dict[str, Any] | None, dict[str, Any] | None]
_SEPARATORS = re.compile(r"[\s*+,()&]+")


@dataclass
class Record:
    """What is known of one stage; `seconds` and `cpu_seconds` are None where it did not run in one go."""

    name: str
    run: str
    folder: str
    """Relative to the pipeline's folder."""
    key: str
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_mib: float | None = None
    """Highest resident memory of the process while the stage ran, where the kernel tells."""
    made: dict[str, Any] | None = None
    """What a maker counted."""
    summary: dict[str, Any] | None = None
    """What an algorithm's run ended with."""
    card: dict[str, Any] | None = None
    card_folder: str = ""


@dataclass(frozen=True)
class Ended:
    """A pipeline that ran to its end, or that signal `stopped_by` stopped: then calling it again continues it."""

    folder: Path
    records: list[Record]
    results: dict[str, float] = field(default_factory=lambda: {})
    """Every number by `stage.name`, and `figure.name.number` of the figures."""
    missed: dict[str, tuple[float, float]] = field(default_factory=lambda: {})
    """Expected results that are not between their bounds."""
    stopped_by: int = 0


@dataclass(frozen=True)
class Screen:
    """Where a pipeline says what it does: `say` a line, and a live line for a training stage."""

    say: Callable[[str], None] = lambda text: None
    line: Callable[[Any], AbstractContextManager[OnStep]] = lambda recipe: nullcontext(lambda step, values: None)


def run_pipeline(pipeline: Pipeline, folder: Path, screen: Screen | None = None, again: str = "") -> Ended:
    """Runs what is not there yet and examines every model; `again` names a stage to make anew.

    Raises ConfigError for an unknown `again`, ResumeError where another process runs this pipeline.
    """
    screen = screen or Screen()
    if again and again not in [stage.name for stage in pipeline.stages]:
        raise ConfigError(f"no stage is named {again!r}{config.nearest(again, [s.name for s in pipeline.stages])}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = durable.FolderLock(folder)
    try:
        return _run(pipeline, folder, screen, again)
    finally:
        lock.release()


def _run(pipeline: Pipeline, folder: Path, screen: Screen, again: str) -> Ended:
    before = {r.folder: r for r in read_records(folder)}
    keys = stage_keys(pipeline)
    products: dict[str, str] = {}
    records: list[Record] = []
    for number, stage in enumerate(pipeline.stages, 1):
        key = keys[stage.name]
        place = folder / f"{stage.name}-{key[:8]}"
        if stage.name == again and place.exists():
            durable.remove_folder(place)
            before.pop(place.name, None)
        record = before.get(place.name) or Record(stage.name, stage.run, place.name, key)
        found = _found(stage, place)
        state = _state(stage, place, found)
        screen.say(f"stage {number} of {len(pipeline.stages)}, {stage.name} ({stage.run}): {state}")
        stopped = 0
        if found is not None:
            record.made, record.summary = found
        elif stage.run != GIVEN:
            stopped = _advance(stage, place, products, record, screen)
        records.append(record)
        _write(pipeline, folder, records)  # also before its card, which may be killed
        if stopped:
            return Ended(folder, records, stopped_by=stopped)
        products[stage.name] = _product(stage, place, products)
        if stage.card:
            first = products[pipeline.stages[0].name] if pipeline.stages[0].run == GIVEN else "abacus"
            reference = filled(stage.reference, products) or first
            _examine(stage, products[stage.name], reference, pipeline.card, folder, record, screen)
            _write(pipeline, folder, records)
    return _close(pipeline, folder, records, screen)


def _advance(stage: Stage, place: Path, products: Mapping[str, str], record: Record, screen: Screen) -> int:
    """Runs a stage that has not ended to its end; the number of the signal that stopped it, else 0."""
    whole, stopped = not place.exists(), 0
    _forget_peak()
    began, cpu = time.monotonic(), time.process_time()
    if stage.is_training:
        result = _train(stage, place, products, screen)
        stopped, record.summary = result.stopped_by, result.summary
    else:
        record.made = _make(stage, place, products)
    if record.summary is None and record.made is None:
        return stopped
    record.seconds = round(time.monotonic() - began, 1) if whole else None
    record.cpu_seconds = round(time.process_time() - cpu, 1) if whole else None
    record.peak_mib = _peak()
    return stopped


def _train(stage: Stage, place: Path, products: Mapping[str, str], screen: Screen) -> api.Result:
    recipe = stage.resolve(products)
    recipe = replace(recipe, run=replace(recipe.run, out=str(place)))
    with screen.line(recipe) as line:
        if (place / "run.json").exists():
            return api.resume(place, on_step=line)
        return api.start(stage.run, recipe, line, on_warning=lambda text: screen.say(f"warning: {text}"))


def _make(stage: Stage, place: Path, products: Mapping[str, str]) -> dict[str, Any]:
    """Runs a maker in a clean folder; `made.json` is written last, so that a folder with one is whole."""
    if place.exists():
        durable.remove_folder(place)
    place.mkdir(parents=True)
    counts = DATA_STAGES[stage.run][1](stage.resolve(products), place)
    durable.publish_file(place / "made.json", json.dumps(counts, indent=2) + "\n")
    return counts


def _examine(
    stage: Stage, model: str, reference: str, cfg: CardConfig, folder: Path, record: Record, screen: Screen
) -> None:
    """The card of a model, kept in a folder that names how it was examined."""
    examined = {**asdict(cfg), **_contents(asdict(cfg))}  # tasks may be files
    key = _digest({"card": examined, "model": machine.model_hash(model), "from": machine.model_hash(reference)})
    place = folder / record.folder / f"card-{key[:8]}"
    record.card_folder = str(place.relative_to(folder))
    if not (place / "card.json").exists():
        screen.say(f"  examining {stage.name}")
        place.mkdir(parents=True, exist_ok=True)
        examine(model, reference, cfg, place)
    record.card = json.loads((place / "card.json").read_text(encoding="utf-8"))


def _close(pipeline: Pipeline, folder: Path, records: list[Record], screen: Screen) -> Ended:
    """Figures, results and what was expected of them."""
    finished = [Finished(r.name, folder / r.folder, r.card) for r in records]
    results = dict(_numbers(records))
    for figure in pipeline.figures:
        screen.say(f"figure {figure.name}")
        drawn = draw(figure, finished, folder / "figures")
        results |= {f"figure.{figure.name}.{name}": value for name, value in _flat(drawn)}
    unknown = [name for name in pipeline.expect if name not in results]
    if unknown:
        close = config.nearest(unknown[0], list(results))
        raise ConfigError(f"pipeline {pipeline.name}: expect.{unknown[0]} is no result of it{close}")
    missed = pipeline.missed(results)
    _write(pipeline, folder, records, results, missed)
    return Ended(folder, records, results, missed)


def read_records(folder: Path) -> list[Record]:
    """The stages that `pipeline.json` knows, also of an earlier version of the recipe."""
    if not is_pipeline(folder):
        return []
    known = {f.name for f in fields(Record)}
    rows = read_record(folder)
    found = [*rows.get("earlier", []), *rows["stages"]]
    return [Record(**{name: value for name, value in row.items() if name in known}) for row in found]


def _write(
    pipeline: Pipeline,
    folder: Path,
    records: list[Record],
    results: Mapping[str, float] | None = None,
    missed: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    now = {r.folder for r in records}
    earlier = {r.folder: r for r in read_records(folder) if r.folder not in now}
    text = {
        "pipeline": pipeline.name,
        "about": pipeline.about,
        "mini": pipeline.mini,
        "posttrain": __version__,
        "recipe": pipeline.text,
        "stages": [asdict(r) for r in records],
        "figures": [figure.name for figure in pipeline.figures],
        "results": None if results is None else dict(results),
        "expect": {name: list(bounds) for name, bounds in pipeline.expect.items()},
        "missed": list(missed or ()),
        "earlier": [asdict(r) for r in earlier.values()],
    }
    durable.publish_file(folder / RECORD, json.dumps(text, indent=1) + "\n")


def _found(stage: Stage, place: Path) -> Outcome | None:
    """What a maker counted, and what an algorithm's run ended with, where the stage has ended before."""
    if not stage.is_training:
        made = place / "made.json"
        return (json.loads(made.read_text(encoding="utf-8")), None) if made.exists() else None
    if not (place / "run.json").exists():
        return None
    with Run.read(place) as store:
        summary = store.summary()
    return None if summary is None else (None, summary)


def _state(stage: Stage, place: Path, found: Outcome | None) -> str:
    if stage.run == GIVEN:
        return "given"
    if found is not None:
        return "done before"
    return "continued" if (place / "run.json").exists() else "begun"


def _product(stage: Stage, place: Path, products: Mapping[str, str]) -> str:
    """What `{name}` stands for: a given model, a trained or made one, or the file of data."""
    if stage.run == GIVEN:
        return stage.resolve(products).path
    return str(place / "model") if (place / "model").exists() else str(place / "data.jsonl")


def stage_keys(pipeline: Pipeline) -> dict[str, str]:
    """Stage → the hash of everything that decides what it makes."""
    keys: dict[str, str] = {}
    for stage in pipeline.stages:
        keys[stage.name] = _key(stage, keys)
    return keys


def _key(stage: Stage, keys: Mapping[str, str]) -> str:
    """`stage_keys` of a stage, given those of the stages before it."""
    settings = stage.described({name: f"made-{key}" for name, key in keys.items()})
    return _digest({"posttrain": __version__, "run": stage.run, "settings": settings, "files": _contents(settings)})


def _contents(settings: Any) -> dict[str, str]:
    """Hashes of the files and models that the texts among some settings name."""
    if isinstance(settings, Mapping):
        return {name: digest for value in settings.values() for name, digest in _contents(value).items()}
    if not isinstance(settings, str):
        return {}
    words = {settings, *_SEPARATORS.split(settings), *settings.split(":"), *settings.rpartition(":")[::2]}
    return {word: _content(word) for word in sorted(words) if word == "abacus" or (word and Path(word).exists())}


def _content(name: str) -> str:
    return machine.file_hash(name) if Path(name).is_file() else machine.model_hash(name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _numbers(records: list[Record]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for record in records:
        parts: dict[str, Any] = {**(record.made or {}), **(record.summary or {}), **(record.card or {})}
        parts |= {"seconds": record.seconds, "cpu_seconds": record.cpu_seconds, "peak_mib": record.peak_mib}
        found += [(f"{record.name}.{name}", value) for name, value in _flat(parts)]
    return found


def _flat(values: Any, before: str = "") -> list[tuple[str, float]]:
    """The numbers in nested tables by dotted names; a table with a `value` is that number."""
    if isinstance(values, bool) or values is None or isinstance(values, str | list):
        return []
    if not isinstance(values, Mapping):
        return [(before, float(values))]
    if "value" in values:
        return [(before, float(values["value"]))]
    inner = f"{before}." if before else ""
    return [one for name, value in values.items() for one in _flat(value, f"{inner}{name}")]


def _forget_peak() -> None:
    """Lets the kernel measure this process's highest memory anew, where it can."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> float | None:
    """Highest resident memory since `_forget_peak`, in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return round(found[0] / 1024, 1) if found else None
