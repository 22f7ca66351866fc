"""Figures over the KL from a stage's starting model: `frontier` and `overoptimisation`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.pipelines.card import LABELS
from posttrain.pipelines.figure import Drawn, Figure, Finished, bounded, estimate_of, label, series_of
from posttrain.pipelines.overoptimisation import Fit, fit_points, fit_tasks
from posttrain.pipelines.plots import Panel, Series
from posttrain.store.run import Run
from posttrain.types import Json

SEARCH = "search.json"
"""File with the results of a best-of-n stage."""
KL_LABEL = "KL from the stage's starting model, nats per answer"
FEW = 24
"""Maximum points per run in these figures; in longer runs each averages consecutive steps."""


def answer_kl(run: Run) -> dict[int, float]:
    """Step → KL from the run's starting model in nats per completion; empty if it was not measured.

    `kl_episode`, else `pair_kl`, else the mean per token times the mean length. Like other training metrics, all belong
    to the weights before the step's update.
    """
    for name in ("kl_episode", "pair_kl"):
        steps, values = run.curve(name)
        if steps:
            return dict(zip(steps, values, strict=True))
    length = dict(zip(*run.curve("length"), strict=True))
    return {step: kl * length[step] for step, kl in zip(*run.curve("kl"), strict=True) if step in length}


def paired(run: Run, metric: str) -> tuple[list[float], list[float]]:
    """(KL, value) of the same weights: an evaluation at step n is paired with the KL measured in step n + 1."""
    kl, later = answer_kl(run), 1 if metric.startswith("eval/") else 0
    rows = [(kl[step + later], value) for step, value in zip(*run.curve(metric), strict=True) if step + later in kl]
    return [a for a, _ in rows], [b for _, b in rows]


def frontier(figure: Figure, stages: Sequence[Finished]) -> Drawn:
    """A metric against KL: points over the steps of each stage, or with `card/NAME` one point per stage."""
    metric = figure.y or "accuracy"
    on_card = metric.startswith("card/")
    name = metric.removeprefix("card/")
    y_label, share = LABELS.get(name, (name, False)) if on_card else label(metric)
    series_for = _of_card if on_card else _of_run
    series = [one for stage in stages if (one := series_for(stage, metric)) is not None]
    x_label = "KL from the reference model, nats per answer" if on_card else KL_LABEL
    return Drawn((Panel(f"{name} against KL", x_label, y_label.partition(",")[0], tuple(series), share),))


def _of_card(stage: Finished, metric: str) -> Series | None:
    kl, found = estimate_of(stage.card, "kl"), estimate_of(stage.card, metric.removeprefix("card/"))
    if kl is None or found is None:
        return None
    return Series(stage.name, (kl[0],), (found[0],), *bounded((found[1],), (found[2],)), kind="points")


def _of_run(stage: Finished, metric: str) -> Series | None:
    if not (stage.folder / "run.json").exists():
        return None
    with Run.read(stage.folder) as run:
        kl, values = paired(run, metric)
    return replace(series_of(stage.name, kl, values, FEW), kind="points") if kl else None


def overoptimisation(figure: Figure, stages: Sequence[Finished]) -> Drawn:
    """Proxy and true score over d = sqrt(KL), for best-of-n stages and training steps, with Gao et al.'s fits.

    Only the true score is fitted, as in the paper. The KL of best-of-n is the upper bound log n − (n − 1)/n.
    """
    proxy_name, true_name = figure.metrics or ("reward", "accuracy")
    proxy: list[Series] = []
    true: list[Series] = []
    fits: dict[str, Json] = {}
    notes: list[str] = []
    for stage in stages:
        found = _best_of_n(stage) if (stage.folder / SEARCH).exists() else _training(stage, proxy_name, true_name)
        if found is None:
            continue
        distance, lines, fit = found
        proxy.append(lines[0])
        true.append(lines[1])
        if isinstance(fit, Fit):
            at = np.linspace(0, float(distance.max()), 60)
            true.append(Series(stage.name, tuple(at.tolist()), tuple(fit.at(at).tolist()), kind="fit"))
            fits[stage.name] = fit.as_dict()
        else:
            notes.append(f"{stage.name}: {fit}")
    x_label = "√KL, KL in nats per answer"
    y_label, share = label(true_name)
    panels = (
        Panel("proxy: the score that is optimised", x_label, "mean score", tuple(proxy)),
        Panel("true score; thick lines are fits", x_label, y_label, tuple(true), share),
    )
    return Drawn(panels, {"fits": fits, "notes": notes})


Lines = tuple[np.ndarray, tuple[Series, Series], Fit | str]


def _best_of_n(stage: Finished) -> Lines:
    kept = read_search(stage.folder)
    distance = np.sqrt([row["kl"] for row in kept["rows"]])
    lines = [
        Series(
            stage.name,
            tuple(distance.tolist()),
            tuple(float(row[of]["value"]) for row in kept["rows"]),
            tuple(float(row[of]["low"]) for row in kept["rows"]),
            tuple(float(row[of]["high"]) for row in kept["rows"]),
            "points",
        )
        for of in ("score", "accuracy")
    ]
    return distance, (lines[0], lines[1]), _tried(lambda: fit_tasks(distance, np.array(kept["gold_by_task"], float)))


def _training(stage: Finished, proxy_name: str, true_name: str) -> Lines | None:
    if not (stage.folder / "run.json").exists():
        return None
    with Run.read(stage.folder) as run:
        pairs = [paired(run, name) for name in (proxy_name, true_name)]
    if not all(kl for kl, _ in pairs):
        return None
    roots = [np.sqrt(np.maximum(0, kl)) for kl, _ in pairs]
    binned = [series_of(stage.name, d.tolist(), v, FEW) for d, (_, v) in zip(roots, pairs, strict=True)]
    lines = [replace(line, kind="points") for line in binned]
    value = np.array(pairs[1][1], float)
    known = np.isfinite(roots[1]) & np.isfinite(value)
    fit = _tried(lambda: fit_points(roots[1][known], value[known]))
    return roots[1][known], (lines[0], lines[1]), fit


def _tried(fit: Any) -> Fit | str:
    try:
        return fit()
    except ValueError as error:
        return f"no fit: {error}"


def read_search(folder: Path) -> Json:
    """Reads the results of a best-of-n stage."""
    return json.loads((folder / SEARCH).read_text(encoding="utf-8"))
