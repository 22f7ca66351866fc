"""Figures of a pipeline's recipe: numbers from finished stages, drawn as PNG and SVG.

    [[figure]]
    kind = "curves"
    name = "alignment-tax"
    stages = ["ppo", "ppo-ptx"]
    metrics = ["eval/accuracy", "reward"]

A kind turns a figure and the stages into panels; `draw` draws them and returns the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from posttrain import config
from posttrain.pipelines.card import CAPABILITIES, LABELS
from posttrain.pipelines.equal_kl import equal_kl
from posttrain.pipelines.figure import Drawn, Figure, Finished, bounded, estimate_of, label, series_of, steps_label
from posttrain.pipelines.over_kl import frontier, overoptimisation
from posttrain.pipelines.over_steps import diversity, thinking
from posttrain.pipelines.plots import Panel, Series, save
from posttrain.store.run import Run
from posttrain.types import ConfigError, Json, JsonView

__all__ = ["FIGURES", "Figure", "Finished", "as_json", "cards", "curves", "draw", "read_figure"]


def cards(figure: Figure, stages: Sequence[Finished]) -> Drawn:
    """Capabilities (or other `metrics`) of every evaluated stage with their intervals, one panel each."""
    panels: list[Panel] = []
    for name in figure.metrics or CAPABILITIES:
        known = [(stage.name, found) for stage in stages if (found := estimate_of(stage.card, name))]
        value, low, high = (tuple(found[i] for _, found in known) for i in range(3))
        series = Series(name, value, value, *bounded(low, high))
        text, share = LABELS.get(name, (name, False))
        labels = tuple(stage for stage, _ in known)
        panels.append(Panel(name.replace("_", " "), text, "", (series,), share, labels))
    return Drawn(tuple(panels))


def curves(figure: Figure, stages: Sequence[Finished]) -> Drawn:
    """Metrics over the steps of each stage, one panel per metric, with intervals from `NAME_low` and `NAME_high`."""
    found: dict[str, list[Series]] = {metric: [] for metric in figure.metrics}
    longest = 0
    for stage in stages:
        if not (stage.folder / "run.json").exists():
            continue
        with Run.read(stage.folder) as run:
            for metric in figure.metrics:
                steps, values = run.curve(metric)
                longest = max(longest, len(steps))
                if steps:
                    found[metric].append(_curve(run, stage.name, metric, steps, values))
    x_label = steps_label(longest)
    panels = [
        Panel(metric, x_label, label(metric)[0], tuple(series), label(metric)[1]) for metric, series in found.items()
    ]
    return Drawn(tuple(panels))


def _curve(run: Run, stage: str, metric: str, steps: Sequence[int], values: Sequence[float]) -> Series:
    line = series_of(stage, steps, values)
    (low_at, low), (high_at, high) = run.curve(f"{metric}_low"), run.curve(f"{metric}_high")
    if len(line.x) == len(steps) and [*low_at] == [*high_at] == [*steps]:
        return Series(stage, line.x, line.y, tuple(low), tuple(high))
    return line


Kind = Callable[[Figure, Sequence[Finished]], Drawn]
FIGURES: dict[str, Kind] = {
    "cards": cards,
    "curves": curves,
    "frontier": frontier,
    "overoptimisation": overoptimisation,
    "equal-kl": equal_kl,
    "diversity": diversity,
    "thinking": thinking,
}
"""Kind → function from a figure and the finished stages to panels. Stages without the data are left out."""


def read_figure(table: JsonView, stages: Sequence[str]) -> Figure:
    """Reads a figure from its table in a recipe with these stages. Raises ConfigError if it is invalid."""
    named = f"figure {table.get('name', '')!r}"
    for wanted in ("kind", "name"):
        if not isinstance(table.get(wanted), str):
            raise ConfigError(f'{named} has no {wanted}; write one, for example {wanted} = "curves".')
    try:
        figure = cast(Figure, config.settings_from(Figure, table, ""))
    except ConfigError as error:
        raise ConfigError(f"{named}: {error}") from None
    if figure.kind not in FIGURES:
        raise ConfigError(f"{named}: unknown kind {figure.kind!r}{config.nearest(figure.kind, list(FIGURES))}")
    for name in figure.stages:
        if name not in stages:
            raise ConfigError(f"{named}: {name!r} is not a stage{config.nearest(name, [*stages])}")
    return figure


def draw(figure: Figure, stages: Sequence[Finished], folder: Path) -> Json:
    """Writes NAME.png and NAME.svg to a folder and returns what they show, as JSON.

    `panels` holds the series as drawn, `first` and `last` their end values by stage and panel; some kinds add numbers
    (`fits`, `counts`). Unfinished stages are left out.
    """
    by_name = {stage.name: stage for stage in stages}
    chosen = [by_name[name] for name in figure.stages if name in by_name] if figure.stages else [*by_name.values()]
    drawn = FIGURES[figure.kind](figure, chosen)
    save(title_of(figure), drawn.panels, folder, figure.name)
    return as_json(figure, drawn)


def title_of(figure: Figure) -> str:
    """Title of a figure."""
    return figure.title or figure.name.replace("-", " ")


def as_json(figure: Figure, drawn: Drawn) -> Json:
    """The JSON that `draw` returns."""
    ends = {"first": _ends(drawn.panels, 0), "last": _ends(drawn.panels, -1)}
    panels = [asdict(panel) for panel in drawn.panels]
    shown = {"kind": figure.kind, "title": title_of(figure), "panels": panels, **ends, **drawn.numbers}
    return cast(Json, _json(shown))


def _ends(panels: Sequence[Panel], which: int) -> dict[str, dict[str, float]]:
    """Series → panel → first or last value, for panels with lines."""
    found: dict[str, dict[str, float]] = {}
    for panel in panels:
        for series in panel.series:
            if series.y and series.kind != "fit" and not panel.labels:
                found.setdefault(series.name, {})[panel.title] = series.y[which]
    return found


def _json(value: Any) -> Any:
    """The value in JSON types: lists for tuples, None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): _json(inner) for name, inner in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in cast(Sequence[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
