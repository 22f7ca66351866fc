"""Loads preference data: from a file or hub dataset, or sampled from the model and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Generic

from posttrain import rng
from posttrain.config import PairRecipe
from posttrain.data.files import writable
from posttrain.data.messages import without_prefill
from posttrain.data.pairs import Compared, kind_of, read_compared, stored_rows
from posttrain.data.preferences import (
    judgements_of,
    read_preferences,
    row_to_judgement,
    row_to_preference,
    write_preferences,
)
from posttrain.data.sources import Row, data_hash
from posttrain.data.tasks.load import TaskSets, chosen
from posttrain.rollout.build import make_collector, with_opening
from posttrain.rollout.collector import Verifier, check_failures
from posttrain.rollout.tasks import judged_tasks
from posttrain.store import samples as sampled
from posttrain.train.job import Setup
from posttrain.types import DataError, Episode, Judgement, Preference, Task

TRAIN_FILE, TEST_FILE = "pairs.jsonl", "held-out-pairs.jsonl"
"""Files in the run folder with the sampled pairs."""


@dataclass(frozen=True)
class ComparedSets(Generic[Compared]):
    """Training and held-out preferences or judgements; `tasks` and `verify` are set if they were sampled."""

    train: list[Compared]
    test: list[Compared]
    notes: list[str]
    hash: str
    tasks: TaskSets | None = None
    verify: Verifier | None = None


def load_pairs(setup: Setup[PairRecipe]) -> ComparedSets[Preference]:
    """Loads the preferences of a recipe with sections data, pairs, reward, rollout and eval.

    `data.tasks` names a file or hub dataset of preferences, or tasks. For tasks, the starting model samples
    `pairs.samples` completions each, and completions with different rewards form pairs, which are saved in the run
    folder for resuming. Raises DataError if there are no pairs.
    """
    notes: list[str] = []
    rows = stored_rows(setup.recipe.data, notes) if setup.given is None else []
    sets = _pair_sets(setup, rows)
    return replace(sets, notes=[*notes, *sets.notes])


def _pair_sets(setup: Setup[PairRecipe], rows: list[Row]) -> ComparedSets[Preference]:
    cfg = setup.recipe.data
    kind = kind_of(rows) if rows else "tasks"
    if kind == "pairs":
        return ComparedSets(*read_compared(rows, cfg, setup.recipe.run.seed, setup.chat, row_to_preference, "pairs"))
    if kind == "judgements":
        raise DataError(
            f"{cfg.tasks} holds judgements of single answers, but this loss compares two. Give rows with chosen and "
            "rejected, or learn from single answers with algo.loss=kto."
        )
    return _sampled(setup)


def load_judgements(setup: Setup[PairRecipe]) -> ComparedSets[Judgement]:
    """Loads unpaired feedback: a file of judgements, or `load_pairs` with each pair split into two judgements."""
    cfg = setup.recipe.data
    read: list[str] = []
    rows = stored_rows(cfg, read) if setup.given is None else []
    if rows and kind_of(rows, judged=True) == "judgements":
        parsed = read_compared(rows, cfg, setup.recipe.run.seed, setup.chat, row_to_judgement, "judgements")
        sets = ComparedSets(*parsed)
        return replace(sets, notes=[*read, *sets.notes])
    sets = _pair_sets(setup, rows)
    train, test = ([one for pair in part for one in judgements_of(pair)] for part in (sets.train, sets.test))
    notes = [*read, *sets.notes, f"each pair counts as two judgements: {len(train)} to train on, {len(test)} held out."]
    return ComparedSets(train, test, notes, sets.hash, sets.tasks, sets.verify)


def pairs_of(
    groups: Sequence[Sequence[Episode]], tasks: Sequence[Task], per_task: int, seed: int
) -> tuple[list[Preference], dict[str, int]]:
    """Pairs completions of each task with different rewards: at most `per_task` pairs, drawn by seed, and drop counts.

    The margin is the reward difference. Dropped are completions that were not scored, were truncated (training on them
    would teach the model to stop there), are blank, or are not valid text (they could not be written to a file, and
    tokenizing them again would not give the sampled tokens).
    """
    pairs: list[Preference] = []
    counts = {"answers": 0, "unusable": 0, "flat": 0}
    for task, group in zip(tasks, groups, strict=True):
        usable = [e for e in group if e.reward is not None and e.stop == "stop" and writable(e.text)]
        counts["answers"] += len(group)
        counts["unusable"] += len(group) - len(usable)
        scores = {(e.text, e.reward or 0.0): None for e in usable}  # each text and reward once, in order
        candidates = [(a, b) for a, b in product(scores, scores) if a[1] > b[1] and a[0] != b[0]]
        counts["flat"] += not candidates
        for n, i in enumerate(rng.permutation(len(candidates), seed, "pairs", task.id)[:per_task]):
            (chosen, high), (rejected, low) = candidates[i]
            pairs.append(
                Preference(f"{task.id}#{n}", without_prefill(task.messages), chosen, rejected, margin=high - low)
            )
    return pairs, counts


def _sampled(setup: Setup[PairRecipe]) -> ComparedSets[Preference]:
    """Pairs of the starting model's completions; read from the run folder if this run has sampled them before."""
    recipe, folder = setup.recipe, setup.folder
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    notes = list(sets.notes)
    if kept := sampled.read(folder, (TRAIN_FILE, TEST_FILE), read_preferences):
        train, test = kept
    else:
        plain = make_collector(setup.policy, setup.chat, verify, recipe, workers=setup.workers)
        collector = with_opening(plain, setup.chat, recipe.pairs.opening)
        parts: list[list[Preference]] = []
        most = recipe.pairs.held_out
        held_out = chosen(sets.test, most, sets.shuffled) if most else []
        for name, tasks in (
            ("training", sets.train),
            ("held-out", held_out),
        ):
            groups = collector.groups(tasks, recipe.pairs.samples, 0, "pairs")
            check_failures(groups, recipe.reward.max_failure_rate)
            pairs, counts = pairs_of(groups, tasks, recipe.pairs.per_task, recipe.run.seed)
            parts.append(pairs)
            notes.append(
                f"{len(pairs)} {name} pairs from {len(tasks)} tasks with {recipe.pairs.samples} sampled answers each; "
                f"{counts['flat']} tasks gave none (no two answers of different reward), and {counts['unusable']} of "
                f"{counts['answers']} answers were left out (cut, blank, not text or not scored)."
            )
        train, test = parts
        if not train:
            raise DataError(
                f"no task of {recipe.data.tasks} got answers of different reward in {recipe.pairs.samples} samples, "
                "so there is no pair. Use easier or harder tasks, more pairs.samples, or a longer rollout.max_tokens."
            )
        sampled.keep(folder, (TRAIN_FILE, TEST_FILE), train, test, write_preferences)
    content = data_hash(Row(p.id, asdict(p)) for p in (*train, *test))
    return ComparedSets(train, test, notes, data_hash([Row("", {"tasks": sets.hash, "pairs": content})]), sets, verify)
