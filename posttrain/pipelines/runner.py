"""Runs a pipeline: each stage once, in a folder named by the hash of its inputs, then evaluates the stage's model.

The hash covers a stage's settings, the hashes of the earlier stages it uses, and the contents of the files and models
it names. A changed setting therefore reruns only the stages that depend on it, and a killed pipeline continues where it
stopped: training from its newest checkpoint, a data stage from its beginning.
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
from typing import Any, NamedTuple

from posttrain import __version__, api, config
from posttrain.pipelines.card import CardConfig, make_card
from posttrain.pipelines.data_stages import DATA_STAGES
from posttrain.pipelines.figures import Finished, draw
from posttrain.pipelines.recipe import GIVEN, Pipeline, Stage, filled
from posttrain.store import durable
from posttrain.store.pipeline import RECORD, is_pipeline, read_record
from posttrain.store.run import Run
from posttrain.train.device import file_hash, model_hash
from posttrain.train.job import OnStep
from posttrain.types import ConfigError, Json

_SEPARATORS = re.compile(r"[\s*+,()&]+")


class Outcome(NamedTuple):
    """What a finished stage left: a data stage's counts, or a training run's summary."""

    made: Json | None = None
    summary: Json | None = None


@dataclass
class Record:
    """Record of one stage; `seconds` and `cpu_seconds` are None if it did not run in one go."""

    name: str
    run: str
    folder: str
    """Relative to the pipeline's folder."""
    key: str
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_mib: float | None = None
    """Peak resident memory of the process while the stage ran, if the kernel reports it."""
    made: Json | None = None
    """A data stage's counts."""
    summary: Json | None = None
    """A training run's summary."""
    card: Json | None = None
    card_folder: str = ""


@dataclass(frozen=True)
class PipelineResult:
    """A pipeline that finished, or that signal `stopped_by` stopped; running it again then continues it."""

    folder: Path
    records: list[Record]
    results: dict[str, float] = field(default_factory=lambda: {})
    """Every number as `stage.name`, those of figures as `figure.name.number`."""
    missed: dict[str, tuple[float, float]] = field(default_factory=lambda: {})
    """Expected results outside their bounds."""
    stopped_by: int = 0


@dataclass(frozen=True)
class Screen:
    """Progress output: `say` prints a line, `line` opens the live line of a training stage."""

    say: Callable[[str], None] = lambda text: None
    line: Callable[[Any], AbstractContextManager[OnStep]] = lambda recipe: nullcontext(lambda step, values: None)


def run_pipeline(pipeline: Pipeline, folder: Path, screen: Screen | None = None, again: str = "") -> PipelineResult:
    """Runs the stages that are not done yet and evaluates every model; `again` names a stage to rerun.

    Raises ConfigError for an unknown `again`, ResumeError if another process is running this pipeline.
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


def _run(pipeline: Pipeline, folder: Path, screen: Screen, again: str) -> PipelineResult:
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
        _write(pipeline, folder, records)  # also before the evaluation, which may be killed
        if stopped:
            return PipelineResult(folder, records, stopped_by=stopped)
        products[stage.name] = _product(stage, place, products)
        if stage.card:
            first = products[pipeline.stages[0].name] if pipeline.stages[0].run == GIVEN else "abacus"
            reference = filled(stage.reference, products) or first
            _evaluate(stage, products[stage.name], reference, pipeline.card, folder, record, screen)
            _write(pipeline, folder, records)
    return _close(pipeline, folder, records, screen)


def _advance(stage: Stage, place: Path, products: Mapping[str, str], record: Record, screen: Screen) -> int:
    """Runs an unfinished stage; returns the number of the signal that stopped it, else 0."""
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


def _make(stage: Stage, place: Path, products: Mapping[str, str]) -> Json:
    """Runs a data stage in an empty folder; `made.json` is written last, so a folder that has it is complete."""
    if place.exists():
        durable.remove_folder(place)
    place.mkdir(parents=True)
    counts = DATA_STAGES[stage.run][1](stage.resolve(products), place)
    durable.publish_file(place / "made.json", json.dumps(counts, indent=2) + "\n")
    return counts


def _evaluate(
    stage: Stage, model: str, reference: str, cfg: CardConfig, folder: Path, record: Record, screen: Screen
) -> None:
    """Evaluates a model; the card's folder is named by the hash of its settings, the model and the reference."""
    settings = {**asdict(cfg), **_contents(asdict(cfg))}  # tasks may be files
    key = _digest({"card": settings, "model": model_hash(model), "from": model_hash(reference)})
    place = folder / record.folder / f"card-{key[:8]}"
    record.card_folder = str(place.relative_to(folder))
    if not (place / "card.json").exists():
        screen.say(f"  evaluating {stage.name}")
        place.mkdir(parents=True, exist_ok=True)
        make_card(model, reference, cfg, place)
    record.card = json.loads((place / "card.json").read_text(encoding="utf-8"))


def _close(pipeline: Pipeline, folder: Path, records: list[Record], screen: Screen) -> PipelineResult:
    """Draws the figures, collects the results and compares them with what is expected."""
    finished = [Finished(r.name, folder / r.folder, r.card) for r in records]
    results = dict(_numbers(records))
    for figure in pipeline.figures:
        screen.say(f"figure {figure.name}")
        drawn = draw(figure, finished, folder / "figures")
        results |= {f"figure.{figure.name}.{name}": value for name, value in _flat(drawn)}
    unknown = [name for name in pipeline.expect if name not in results]
    if unknown:
        close = config.nearest(unknown[0], list(results))
        raise ConfigError(f"pipeline {pipeline.name}: expect.{unknown[0]} is not one of its results{close}")
    missed = pipeline.missed(results)
    _write(pipeline, folder, records, results, missed)
    return PipelineResult(folder, records, results, missed)


def read_records(folder: Path) -> list[Record]:
    """The stages in `pipeline.json`, including those of earlier versions of the recipe."""
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
    """The outcome of a stage, if it has already finished."""
    if not stage.is_training:
        made = place / "made.json"
        return Outcome(made=json.loads(made.read_text(encoding="utf-8"))) if made.exists() else None
    if not (place / "run.json").exists():
        return None
    with Run.read(place) as store:
        summary = store.summary()
    return None if summary is None else Outcome(summary=summary)


def _state(stage: Stage, place: Path, found: Outcome | None) -> str:
    if stage.run == GIVEN:
        return "existing model"
    if found is not None:
        return "already done"
    return "resuming" if (place / "run.json").exists() else "starting"


def _product(stage: Stage, place: Path, products: Mapping[str, str]) -> str:
    """What `{name}` stands for: the folder of a given, trained or built model, or a data file."""
    if stage.run == GIVEN:
        return stage.resolve(products).path
    return str(place / "model") if (place / "model").exists() else str(place / "data.jsonl")


def stage_keys(pipeline: Pipeline) -> dict[str, str]:
    """Stage → hash of everything that determines its output."""
    keys: dict[str, str] = {}
    for stage in pipeline.stages:
        keys[stage.name] = _key(stage, keys)
    return keys


def _key(stage: Stage, keys: Mapping[str, str]) -> str:
    """The hash of one stage, given those of the stages before it."""
    settings = stage.described({name: f"made-{key}" for name, key in keys.items()})
    return _digest({"posttrain": __version__, "run": stage.run, "settings": settings, "files": _contents(settings)})


def _contents(settings: Any) -> dict[str, str]:
    """Hashes of the files and models that the strings in some settings name."""
    if isinstance(settings, Mapping):
        return {name: digest for value in settings.values() for name, digest in _contents(value).items()}
    if not isinstance(settings, str):
        return {}
    words = {settings, *_SEPARATORS.split(settings), *settings.split(":"), *settings.rpartition(":")[::2]}
    return {word: _content(word) for word in sorted(words) if word == "abacus" or (word and Path(word).exists())}


def _content(name: str) -> str:
    return file_hash(name) if Path(name).is_file() else model_hash(name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _numbers(records: list[Record]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for record in records:
        parts: Json = {**(record.made or {}), **(record.summary or {}), **(record.card or {})}
        parts |= {"seconds": record.seconds, "cpu_seconds": record.cpu_seconds, "peak_mib": record.peak_mib}
        found += [(f"{record.name}.{name}", value) for name, value in _flat(parts)]
    return found


def _flat(values: Any, before: str = "") -> list[tuple[str, float]]:
    """The numbers in nested tables, by dotted name; a table with a `value` counts as that number."""
    if isinstance(values, bool) or values is None or isinstance(values, str | list):
        return []
    if not isinstance(values, Mapping):
        return [(before, float(values))]
    if "value" in values:
        return [(before, float(values["value"]))]
    inner = f"{before}." if before else ""
    return [one for name, value in values.items() for one in _flat(value, f"{inner}{name}")]


def _forget_peak() -> None:
    """Resets the kernel's record of this process's peak memory, if it can."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> float | None:
    """Peak resident memory since `_forget_peak`, in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return round(found[0] / 1024, 1) if found else None
