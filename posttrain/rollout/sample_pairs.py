"""The preferences a recipe names: read from a file or hub set, or sampled from the model and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

from posttrain import rng
from posttrain.config import PairRecipe
from posttrain.data.files import writable
from posttrain.data.pairs import is_data, kind_of, read_compared
from posttrain.data.preferences import (
    judgements_of,
    read_preferences,
    row_to_judgement,
    row_to_preference,
    write_preferences,
)
from posttrain.data.sources import (
    Row,
    data_hash,
    read_rows,
)
from posttrain.data.tasks.load import TaskSets
from posttrain.rollout.build import make_collector, with_opening
from posttrain.rollout.collector import Verifier, check_failures
from posttrain.rollout.tasks import judged_tasks
from posttrain.store import samples as sampled
from posttrain.train.job import Setup
from posttrain.types import DataError, Episode, Judgement, Preference, Task

TRAIN_FILE, TEST_FILE = "pairs.jsonl", "held-out-pairs.jsonl"
"""Where a run folder keeps the pairs it sampled."""


@dataclass(frozen=True)
class PairSets:
    """Preferences to learn from and held-out ones; `tasks` and `verify` are there when they were sampled and judged."""

    train: list[Preference]
    test: list[Preference]
    notes: list[str]
    hash: str
    tasks: TaskSets | None = None
    verify: Verifier | None = None


@dataclass(frozen=True)
class JudgementSets:
    """The same for unpaired feedback."""

    train: list[Judgement]
    test: list[Judgement]
    notes: list[str]
    hash: str
    tasks: TaskSets | None = None
    verify: Verifier | None = None


def load_pairs(setup: Setup[PairRecipe]) -> PairSets:
    """The preferences of a recipe with sections data, pairs, reward, rollout and eval.

    `data.tasks` names a file or hub set of preferences, or tasks: then the starting model answers each task
    `pairs.samples` times and answers of different reward make pairs. Those are kept in the run folder, so that a
    resumed run reads what it started with. Raises DataError where no pair is left.
    """
    cfg = setup.recipe.data
    kind = kind_of(read_rows(cfg.tasks, cfg.count)) if setup.given is None and is_data(cfg.tasks) else "tasks"
    if kind == "pairs":
        return PairSets(*read_compared(cfg, setup.recipe.run.seed, setup.chat, row_to_preference, "pairs"))
    if kind == "judgements":
        raise DataError(
            f"{cfg.tasks} holds judgements of single answers, but this loss compares two. Give rows with chosen and "
            "rejected, or learn from single answers with algo.loss=kto."
        )
    return _sampled(setup)


def load_judgements(setup: Setup[PairRecipe]) -> JudgementSets:
    """Unpaired feedback: a file of judgements, or else `load_pairs` with each pair split into two judgements."""
    cfg = setup.recipe.data
    if setup.given is None and is_data(cfg.tasks) and kind_of(read_rows(cfg.tasks, cfg.count)) == "judgements":
        return JudgementSets(*read_compared(cfg, setup.recipe.run.seed, setup.chat, row_to_judgement, "judgements"))
    sets = load_pairs(setup)
    train, test = ([one for pair in part for one in judgements_of(pair)] for part in (sets.train, sets.test))
    notes = [*sets.notes, f"each pair counts as two judgements: {len(train)} to train on, {len(test)} held out."]
    return JudgementSets(train, test, notes, sets.hash, sets.tasks, sets.verify)


def pairs_of(
    groups: Sequence[Sequence[Episode]], tasks: Sequence[Task], per_task: int, seed: int
) -> tuple[list[Preference], dict[str, int]]:
    """At most `per_task` pairs (better, worse) of each task's answers, drawn by the seed; and what was left out.

    Answers pair up where their rewards differ; the margin is that difference. Left out are answers that were not
    scored, were cut by max_tokens (training would teach the model to stop there), are blank, or are no proper text
    (a file could not hold them, and encoding them again would not give the tokens that were sampled).
    """
    pairs: list[Preference] = []
    counts = {"answers": 0, "unusable": 0, "flat": 0}
    for task, group in zip(tasks, groups, strict=True):
        usable = [e for e in group if e.reward is not None and e.stop == "stop" and writable(e.text)]
        counts["answers"] += len(group)
        counts["unusable"] += len(group) - len(usable)
        scores = {(e.text, e.reward or 0.0): None for e in usable}  # each answer once, in the order it was given
        found = [(a, b) for a, b in product(scores, scores) if a[1] > b[1] and a[0] != b[0]]
        counts["flat"] += not found
        for n, i in enumerate(rng.permutation(len(found), seed, "pairs", task.id)[:per_task]):
            (chosen, high), (rejected, low) = found[i]
            pairs.append(Preference(f"{task.id}#{n}", task.messages, chosen, rejected, margin=high - low))
    return pairs, counts


def _sampled(setup: Setup[PairRecipe]) -> PairSets:
    """Pairs of the starting model's own answers to judged tasks, read back where this run has sampled them before."""
    recipe, folder = setup.recipe, setup.folder
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    notes = list(sets.notes)
    if kept := sampled.read(folder, (TRAIN_FILE, TEST_FILE), read_preferences):
        train, test = kept
    else:
        collector = with_opening(
            make_collector(setup.policy, setup.chat, verify, recipe), setup.chat, recipe.pairs.opening
        )
        parts: list[list[Preference]] = []
        for name, tasks in (("training", sets.train), ("held-out", sets.test[: recipe.pairs.held_out])):
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
    return PairSets(train, test, notes, data_hash([Row("", {"tasks": sets.hash, "pairs": content})]), sets, verify)
