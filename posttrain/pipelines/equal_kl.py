"""Methods at one KL: what each is worth at the divergence that all of them reach, read off between its own models."""

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
    """Entries of the card over sqrt(KL), one line a method, and their values at the largest KL that all reach.

    The first examined stage is where all methods began. A method's stages are NAME and NAME-something; between them,
    and from the first stage, values are interpolated linearly in sqrt(KL), which bounds the change of a mean (Pinsker).
    Numbers: `kl`, and `at_equal_kl.METHOD.ENTRY`.
    """
    examined = [stage for stage in stages if estimate_of(stage.card, "kl") is not None]
    methods = methods_of(examined[1:])
    if not methods:
        return Drawn(())
    common = min(points[-1][0] for points in methods.values())
    panels: list[Panel] = []
    at: dict[str, dict[str, float]] = {name: {} for name in methods}
    for entry in figure.metrics or STANDARD:
        begun = estimate_of(examined[0].card, entry)
        if begun is None:
            continue
        lines: list[Series] = []
        for name, points in methods.items():
            known = [(d, found[0]) for d, stage in points if (found := estimate_of(stage.card, entry)) is not None]
            x, y = (0.0, *(d for d, _ in known)), (begun[0], *(value for _, value in known))
            lines.append(Series(name, x, y))
            at[name][entry] = float(np.interp(common, x, y))
        said, share = LABELS.get(entry, (entry, False))
        panels.append(
            Panel(entry.replace("_", " "), "square root of the KL", said.partition(",")[0], tuple(lines), share)
        )
    return Drawn(tuple(panels), {"kl": common**2, "at_equal_kl": at})


def methods_of(stages: Sequence[Finished]) -> Mapping[str, Points]:
    """Method → its stages with their sqrt(KL), nearest first; `NAME-x` belongs to NAME where that is a stage, too."""
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
