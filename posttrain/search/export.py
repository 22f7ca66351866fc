"""Training data from search trees: step labels, preference pairs that share a prefix, and demonstrations.

The task's own verifier decides which completions are right, not the scorer that steered the search. A prefix is a
beginning of a completion in whole steps; completions with equal text up to there share it, whatever their tokens. Its
value is the share of right completions among those that begin with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.data.files import json_lines, writable
from posttrain.data.messages import without_prefill
from posttrain.data.preferences import write_preferences, write_solutions
from posttrain.data.steps import split_steps
from posttrain.search import stored
from posttrain.search.best_of_n import ChosenRow
from posttrain.search.report import Outcome
from posttrain.search.solve import Searched
from posttrain.types import Json, Preference, Solution, Task


@dataclass(frozen=True)
class Ended:
    """A completion that ended by itself, its steps, and whether it is right."""

    steps: tuple[str, ...]
    text: str
    right: bool
    score: float | None = None


def ended(outcome: Outcome, tree: Json, separator: str, revisions: bool = False) -> list[Ended]:
    """The verified completions of a tree that were not cut, each once for every time it was sampled.

    Revisions answer another prompt, which holds an earlier answer; they are left out unless asked for.
    """
    texts, nodes = stored.texts(tree), tree["nodes"]
    return [
        Ended(tuple(split_steps(texts[number], separator)), texts[number], right, score)
        for number, right, score in zip(outcome.candidates, outcome.right, outcome.scores, strict=True)
        if right is not None
        and nodes[number]["end"] == "stop"
        and writable(texts[number])
        and (revisions or stored.path(tree, number)[0] == 0)
    ]


def values(found: Sequence[Ended]) -> dict[tuple[str, ...], float]:
    """The value of every prefix: the share of right completions among those that begin with it."""
    verdicts: dict[tuple[str, ...], list[bool]] = {}
    for one in found:
        for length in range(1, len(one.steps) + 1):
            verdicts.setdefault(one.steps[:length], []).append(one.right)
    return {prefix: sum(rows) / len(rows) for prefix, rows in verdicts.items()}


def solutions(task: Task, found: Sequence[Ended]) -> list[Solution]:
    """Each different completion with two steps or more, labelled with the values of its prefixes."""
    worth = values(found)
    distinct = dict.fromkeys(one.steps for one in found if len(one.steps) > 1)
    return [
        Solution(
            f"{task.id}#{i}", without_prefill(task.messages), steps,
            tuple(worth[steps[: n + 1]] for n in range(len(steps))),
        )
        for i, steps in enumerate(distinct)
    ]  # fmt: skip


def pairs(task: Task, found: Sequence[Ended]) -> list[Preference]:
    """One pair for each prefix, the empty one too, whose next steps have different values.

    `chosen` is the first right completion through the best next step, `rejected` the first wrong one through the worst.
    They are equal up to the end of the prefix, so what DPO learns is about the step and what follows (Step-DPO, arXiv
    2406.18629, with whole completions). The margin is the difference of the values.
    """
    worth = values(found)
    children: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for prefix in worth:
        children.setdefault(prefix[:-1], []).append(prefix)
    out: list[Preference] = []
    for i, nexts in enumerate(children.values()):
        best, worst = max(nexts, key=lambda one: worth[one]), min(nexts, key=lambda one: worth[one])
        if worth[best] == worth[worst]:
            continue
        chosen = next(one.text for one in found if one.right and one.steps[: len(best)] == best)
        rejected = next(one.text for one in found if not one.right and one.steps[: len(worst)] == worst)
        prompt = without_prefill(task.messages)
        out.append(Preference(f"{task.id}#{i}", prompt, chosen, rejected, margin=worth[best] - worth[worst]))
    return out


def demonstration(task: Task, outcome: Outcome, found: Sequence[Ended]) -> list[ChosenRow]:
    """The chosen completion as a conversation, if it is right, else the right one with the highest score, if any.

    Without scores, that is the first.
    """
    right = [one for one in found if one.right]
    if not right:
        return []
    best = max(right, key=lambda one: float("-inf") if one.score is None else one.score)
    text = outcome.answer if any(one.text == outcome.answer for one in right) else best.text
    messages: list[dict[str, str]] = [{"role": m.role, "content": m.content} for m in without_prefill(task.messages)]
    messages.append({"role": "assistant", "content": text})
    return [{"id": task.id, "messages": messages, "score": 1.0}]


def _each(searched: Searched, revisions: bool = False) -> Iterator[tuple[Task, Outcome, list[Ended]]]:
    for task, outcome, tree in zip(searched.tasks, searched.outcomes, searched.trees, strict=True):
        yield task, outcome, ended(outcome, tree, searched.separator, revisions)


def all_solutions(searched: Searched) -> list[Solution]:
    """`solutions` of all tasks."""
    return [row for task, _, found in _each(searched) for row in solutions(task, found)]


def all_pairs(searched: Searched) -> list[Preference]:
    """`pairs` of all tasks."""
    return [row for task, _, found in _each(searched) for row in pairs(task, found)]


def all_demonstrations(searched: Searched) -> list[ChosenRow]:
    """`demonstration` of all tasks that have one."""
    return [row for task, outcome, found in _each(searched, True) for row in demonstration(task, outcome, found)]


def write(searched: Searched, prm: str | None, pairs_to: str | None, demonstrations: str | None) -> dict[str, int]:
    """Writes the files that are named, and returns file → rows written."""
    written: dict[str, int] = {}
    if prm:
        labelled = all_solutions(searched)
        write_solutions(prm, labelled)
        written[prm] = len(labelled)
    if pairs_to:
        found = all_pairs(searched)
        write_preferences(pairs_to, found)
        written[pairs_to] = len(found)
    if demonstrations:
        rows = all_demonstrations(searched)
        Path(demonstrations).write_text(json_lines(rows), encoding="utf-8", newline="\n")
        written[demonstrations] = len(rows)
    return written
