"""Figures from a run's stored completions: `diversity`, and `thinking` with countable signs of self-checking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from posttrain.data.answers import final_answer
from posttrain.evaluation.intervals import Z95, wilson
from posttrain.pipelines.card import distinct
from posttrain.pipelines.counting import Counts, add, count, thought
from posttrain.pipelines.figure import MOST_POINTS, Drawn, Figure, Finished, bounded
from posttrain.pipelines.plots import Panel, Series
from posttrain.store.run import EpisodeRow, Run
from posttrain.types import Json

Point = tuple[float, float, float]
"""A value and the ends of its 95 % interval, NaN if it has none."""
STEP = f"step (at most {MOST_POINTS} evenly spaced steps are read)"
UNKNOWN: Point = (math.nan, math.nan, math.nan)


def read_answers(run: Run, most: int = MOST_POINTS) -> Iterator[tuple[int, list[EpisodeRow]]]:
    """(step, its stored training completions) for at most `most` evenly spaced steps, including the first and last."""
    steps = [step for step, _, _ in run.metrics("length") if step > 0]
    if len(steps) > most:
        steps = [steps[int(i)] for i in np.linspace(0, len(steps) - 1, most).round()]
    for step in steps:
        if rows := run.episodes("train", step):
            yield step, rows


def diversity(figure: Figure, stages: Sequence[Finished]) -> Drawn:
    """Distinct-1, -2 and -3 of the completions of one task, the share of different final answers, and the entropy.

    Distinct-n is the card's. An algorithm that samples one completion per task has no groups to compare and only
    an entropy.
    """
    panels = (
        *((f"distinct-{n}", "share of n-grams in a group", True) for n in (1, 2, 3)),
        ("different answers in a group", "share of answers", True),
        ("entropy", "nats per token", False),
    )
    return Drawn(_panels(panels, {stage.name: _diversity_of(stage) for stage in stages}))


def _diversity_of(stage: Finished) -> dict[int, dict[str, Point]]:
    found: dict[int, dict[str, Point]] = {}
    if not (stage.folder / "run.json").exists():
        return found
    with Run.read(stage.folder) as run:
        entropy = dict(zip(*run.curve("entropy"), strict=True))
        for step, rows in read_answers(run):
            groups = [[row.text for row in group] for group in by_group(rows) if len(group) > 1]
            finals = [{final_answer(text).strip() for text in group} for group in groups]
            points = {f"distinct-{n}": interval([distinct(group, n) for group in groups]) for n in (1, 2, 3)}
            shares = [len(final) / len(group) for final, group in zip(finals, groups, strict=True)]
            points["different answers in a group"] = interval(shares)
            points["entropy"] = (entropy.get(step, math.nan), *UNKNOWN[1:])
            found[step] = points
    return found


def thinking(figure: Figure, stages: Sequence[Finished]) -> Drawn:
    """Share that think, length, and for thoughts: equations, how many hold, and what looks like self-checking.

    counting.py says what a count does not prove. `counts` has the sums of the first and the last step. Self-checking is
    rare, so its panels show shares without intervals.
    """
    kinds = ("a repeated equation", "a recomputed value", "a correction", "a checking word")
    panels = (
        ("share that think", "share of answers", True),
        ("length", "tokens per answer", False),
        ("equations", "per answer that thinks", False),
        ("equations that hold", "share of equations", True),
        *((f"with {kind}", "share of answers", True) for kind in kinds),
    )
    found: dict[str, dict[int, dict[str, Point]]] = {}
    counts: dict[str, dict[str, Json]] = {}
    for stage in stages:
        found[stage.name] = {}
        if not (stage.folder / "run.json").exists():
            continue
        with Run.read(stage.folder) as run:
            sums: list[Json] = []
            for step, rows in read_answers(run):
                found[stage.name][step], total = _thoughts_of(rows)
                sums.append({"step": step, "answers": len(rows), **asdict(total)})
        if sums:
            counts[stage.name] = {"first": sums[0], "last": sums[-1]}
    return Drawn(_panels(panels, found), {"counts": counts})


def _thoughts_of(rows: Sequence[EpisodeRow]) -> tuple[dict[str, Point], Counts]:
    """One step's values, as means over groups, and the counts over all of its completions."""
    groups = by_group(rows)
    counted = [[count(thought(row.text)) for row in group] for group in groups]
    every = [one for group in counted for one in group]
    thinks = [[bool(thought(row.text).strip()) for row in group] for group in groups]
    pairs = zip(every, [has_thought for group in thinks for has_thought in group], strict=True)
    equations = [one.equations for one, has_thought in pairs if has_thought]
    right = [(sum(c.right for c in group), sum(c.equations for c in group)) for group in counted]

    def share(test: Callable[[Counts], bool]) -> Point:
        return float(np.mean([test(one) for one in every])), *UNKNOWN[1:]

    points = {
        "share that think": interval([float(np.mean(group)) for group in thinks]),
        "length": interval([float(np.mean([row.length for row in group])) for group in groups]),
        "equations": interval([float(n) for n in equations]),
        "equations that hold": interval([r / n for r, n in right if n]),
        "with a repeated equation": share(lambda c: c.repeated > 0),
        "with a recomputed value": share(lambda c: c.recomputed > 0),
        "with a correction": share(lambda c: c.corrections > 0),
        "with a checking word": share(lambda c: any(c.words.values())),
    }
    return points, add(every)


def by_group(rows: Sequence[EpisodeRow]) -> list[list[EpisodeRow]]:
    """The completions of a step, grouped by task."""
    groups: dict[int, list[EpisodeRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [*groups.values()]


def interval(values: Sequence[float]) -> Point:
    """Mean over groups ± 1.96 standard errors; Wilson's interval if all are 0 or all 1, UNKNOWN if there are none."""
    if not values:
        return UNKNOWN
    if set(values) in ({0.0}, {1.0}):
        found = wilson(int(sum(values)), len(values))
        return found.value, found.low, found.high
    mean = float(np.mean(values))
    error = Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, mean - error, mean + error


def _panels(
    wanted: Sequence[tuple[str, str, bool]], stages: Mapping[str, Mapping[int, Mapping[str, Point]]]
) -> tuple[Panel, ...]:
    """One panel per quantity, with a line for each stage that has it."""
    panels: list[Panel] = []
    for title, y_label, share in wanted:
        lines: list[Series] = []
        for stage, steps in stages.items():
            rows = [(float(s), *points[title]) for s, points in steps.items() if math.isfinite(points[title][0])]
            if rows:
                x, y, low, high = zip(*rows, strict=True)
                lines.append(Series(stage, x, y, *bounded(low, high)))
        panels.append(Panel(title, STEP, y_label, tuple(lines), share))
    return tuple(panels)
