"""Reads solutions with labelled steps, and determines how many steps are labelled and whether the answer is correct."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.config import DataConfig
from posttrain.config.prm import PRMConfig
from posttrain.data.preferences import STEP_COLUMNS, row_to_judgement, row_to_outcome, row_to_solution
from posttrain.data.reading import read_source, unread_note
from posttrain.data.sources import Row, content_key, data_hash, split_by_key, usable
from posttrain.types import DataError, Solution


@dataclass(frozen=True)
class Graded:
    """A solution whose first `known` steps are labelled; `right` says whether its final answer is correct."""

    solution: Solution
    known: int
    right: bool


@dataclass(frozen=True)
class SolutionSets:
    """Training and held-out solutions; `notes` report what was left out, `hash` identifies the content."""

    train: list[Graded]
    test: list[Graded]
    notes: list[str]
    hash: str


def has_solutions(rows: list[Row]) -> bool:
    """Whether most rows are labelled solutions rather than tasks."""
    found = sum(
        any(row.values.get(column) is not None for column in STEP_COLUMNS) or "label" in row.values for row in rows
    )
    return 2 * found >= len(rows)


def graded(row: Row, cfg: PRMConfig, system: str = "", instruction: str = "") -> Graded:
    """Converts a row into a solution; for `outcome`, all steps are joined into one, labelled with the outcome.

    If a row does not say whether its final answer is correct, it counts as correct if no step is labelled wrong.
    """
    steps = any(row.values.get(column) is not None for column in STEP_COLUMNS)
    says = "final_answer_correct" in row.values or {"answer", "target"} <= row.values.keys()
    if cfg.level == "outcome" and (says or not steps):
        found = row_to_outcome(row, system, instruction, cfg.separator) if steps else row_to_judgement(row)
        label = float(found.desirable)
        return Graded(Solution(found.id, found.prompt, (found.answer,), (label,)), 1, found.desirable)
    whole = row_to_solution(row, system, instruction, "wrong")
    known = len(row_to_solution(row, system, instruction, cfg.after_mistake).steps)
    right = row_to_outcome(row).desirable if says else min(whole.labels) >= 0.5
    if cfg.level == "outcome":
        whole = Solution(whole.id, whole.prompt, (cfg.separator.join(whole.steps),), (float(right),))
        known = 1
    return Graded(whole, known, right)


def read_solution_sets(rows: list[Row], cfg: DataConfig, algo: PRMConfig, seed: int) -> SolutionSets:
    """Training and held-out solutions of `rows`, those of `data.tasks`, and of `data.eval_tasks`, which is read."""
    notes: list[str] = []
    held = read_source(cfg.eval_tasks, cfg, notes) if cfg.eval_tasks else []
    train, test = (
        usable(part, lambda row: graded(row, algo, cfg.system, cfg.instruction), cfg, notes) for part in (rows, held)
    )
    notes += unread_note(cfg.tasks, rows, lambda row: graded(row, algo, cfg.system, cfg.instruction))
    if held:
        test_prompts = {content_key(one.solution) for one in test}
        kept = [one for one in train if content_key(one.solution) not in test_prompts]
        notes.append(
            f"{len(train) - len(kept)} training solutions with a prompt that is also in {cfg.eval_tasks} were dropped."
        )
        train = kept
    else:
        names = [content_key(one.solution) for one in train]
        train, test = split_by_key(train, names, cfg.holdout, seed)
    if not train:
        raise DataError(f"{cfg.tasks}: no solution is left to train on after holding out {len(test)}.")
    inside = sum(algo.separator in step for one in train for step in one.solution.steps) * (algo.level == "step")
    if inside:
        notes.append(
            f"{inside} labelled steps contain algo.separator={algo.separator!r}; a solution that is scored later is "
            "also split there."
        )
    notes.append(f"{len(train)} solutions to train on, {len(test)} held out.")
    return SolutionSets(train, test, notes, data_hash([*rows, *held]))
