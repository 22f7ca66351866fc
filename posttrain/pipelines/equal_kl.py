"""Figure `equal-kl`: methods compared at the largest KL that all of them reach, interpolated between their models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from posttrain.pipelines.card import LABELS
from posttrain.pipelines.figure import Drawn, Figure, Finished, estimate_of
from posttrain.pipelines.plots import Panel, Series

STANDARD = ("helpfulness", "safety", "over_refusal", "reasoning")
Points = list[tuple[float, Finished]]


def equal_kl(figure: Figure, stages: Sequence[Finished]) -> Drawn:
    """Card metrics over sqrt(KL), one line per method, and their values at the largest KL that all methods reach.

    The first evaluated stage is the starting model of all methods. A method's stages are NAME and NAME-something;
    between them, and from the first stage, values are interpolated linearly in sqrt(KL), which bounds the change of a
    mean (Pinsker). Numbers: `kl`, and `at_equal_kl.METHOD.METRIC`.
    """
    evaluated = [stage for stage in stages if estimate_of(stage.card, "kl") is not None]
    methods = methods_of(evaluated[1:])
    if not methods:
        return Drawn(())
    common = min(points[-1][0] for points in methods.values())
    panels: list[Panel] = []
    at: dict[str, dict[str, float]] = {name: {} for name in methods}
    for metric in figure.metrics or STANDARD:
        start = estimate_of(evaluated[0].card, metric)
        if start is None:
            continue
        lines: list[Series] = []
        for name, points in methods.items():
            known = [(d, found[0]) for d, stage in points if (found := estimate_of(stage.card, metric)) is not None]
            x, y = (0.0, *(d for d, _ in known)), (start[0], *(value for _, value in known))
            lines.append(Series(name, x, y))
            at[name][metric] = float(np.interp(common, x, y))
        label, share = LABELS.get(metric, (metric, False))
        panels.append(
            Panel(metric.replace("_", " "), "square root of the KL", label.partition(",")[0], tuple(lines), share)
        )
    return Drawn(tuple(panels), {"kl": common**2, "at_equal_kl": at})


def methods_of(stages: Sequence[Finished]) -> Mapping[str, Points]:
    """Method → its stages with their sqrt(KL), nearest first; `NAME-x` belongs to NAME if that is a stage, too."""
    names = {stage.name for stage in stages}
    found: dict[str, Points] = {}
    for stage in stages:
        kl = estimate_of(stage.card, "kl")
        if kl is None:
            continue
        before = stage.name.rpartition("-")[0]
        method = before if before in names else stage.name
        found.setdefault(method, []).append((math.sqrt(max(0.0, kl[0])), stage))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}
