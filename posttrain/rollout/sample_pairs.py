"""Preference pairs for whoever learns from them: read from a file or hub set, or sampled from the model and judged.

A pair becomes two adjacent rows, the better answer first, whose loss masks cover the final answer alone and whose
prompts are the same tokens. KTO's unpaired judgements become one row each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TypeVar

import numpy as np

from posttrain import rng
from posttrain.config import DataConfig
from posttrain.data.chat import ChatFormat
from posttrain.data.files import writable
from posttrain.data.preferences import (
    COMPLETION_COLUMNS,
    PAIR_COLUMNS,
    judgements_of,
    read_preferences,
    row_to_judgement,
    row_to_preference,
    write_preferences,
)
from posttrain.data.sources import (
    Row,
    data_hash,
    drop_leaks,
    first_column,
    is_file_name,
    is_hub_id,
    read_rows,
    split_holdout,
    usable,
)
from posttrain.data.tasks.load import BUILT_IN, TaskSets
from posttrain.rollout.build import Setup, judged_tasks, make_collector, opened
from posttrain.rollout.collector import Verifier, check_failures
from posttrain.store import samples as sampled
from posttrain.types import DataError, Episode, Judgement, Message, Preference, Sample, Task, TemplateError

TRAIN_FILE, TEST_FILE = "pairs.jsonl", "held-out-pairs.jsonl"
"""Where a run folder keeps the pairs it sampled."""
Compared = TypeVar("Compared", Preference, Judgement)


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


def load_pairs(setup: Setup) -> PairSets:
    """The preferences of a recipe with sections data, pairs, reward, rollout and eval.

    `data.tasks` names a file or hub set of preferences, or tasks: then the starting model answers each task
    `pairs.samples` times and answers of different reward make pairs. Those are kept in the run folder, so that a
    resumed run reads what it started with. Raises DataError where no pair is left.
    """
    cfg = setup.recipe.data
    if setup.given is not None or not _is_data(cfg.tasks):
        return _sampled(setup)
    first = read_rows(cfg.tasks, 1)[0]
    if _has_pair(first):
        train, test, notes, digest = _from_rows(setup, row_to_preference, "pairs")
        return PairSets(train, test, notes, digest)
    if _is_judgement(first):
        raise DataError(
            f"{cfg.tasks} holds judgements of single answers, but this loss compares two. Give rows with chosen and "
            "rejected, or learn from single answers with algo.loss=kto."
        )
    return _sampled(setup)


def load_judgements(setup: Setup) -> JudgementSets:
    """Unpaired feedback: a file of judgements, or else `load_pairs` with each pair split into two judgements."""
    cfg = setup.recipe.data
    if setup.given is None and _is_data(cfg.tasks):
        first = read_rows(cfg.tasks, 1)[0]
        if _is_judgement(first) and not _has_pair(first):
            train, test, notes, digest = _from_rows(setup, row_to_judgement, "judgements")
            return JudgementSets(train, test, notes, digest)
    sets = load_pairs(setup)
    train, test = ([one for pair in part for one in judgements_of(pair)] for part in (sets.train, sets.test))
    notes = [*sets.notes, f"each pair counts as two judgements: {len(train)} to train on, {len(test)} held out."]
    return JudgementSets(train, test, notes, sets.hash, sets.tasks, sets.verify)


def pair_rows(preferences: Sequence[Preference], chat: ChatFormat, max_tokens: int) -> tuple[list[Sample], list[str]]:
    """Rows 2i (chosen) and 2i + 1 (rejected) of each preference, and notes on what was cut or left out.

    Their loss masks cover the final answer, stop token included, and their prompts are the same tokens. A row's
    `label` is the probability that it is the better of the two; both carry the preference's margin. Rows are cut at
    the end at `max_tokens`; a pair whose two rows are then equal teaches nothing and is left out. Raises DataError or
    TemplateError naming the preference.
    """
    rows: list[Sample] = []
    cut = equal = 0
    for p in preferences:
        (chosen, start), (rejected, other) = (answer_tokens(p.id, p.prompt, a, chat) for a in (p.chosen, p.rejected))
        if start != other or not np.array_equal(chosen[0][:start], rejected[0][:start]):
            raise TemplateError(
                f"preference {p.id!r}: the chat template writes the prompt differently before the two answers, so "
                "their log-probabilities cannot be compared. Use a template that only appends."
            )
        cut += sum(len(tokens) > max_tokens for tokens, _ in (chosen, rejected))
        two = [
            _row(p.id, *chosen, max_tokens, p.label, p.margin),
            _row(p.id, *rejected, max_tokens, 1 - p.label, p.margin),
        ]
        same = np.array_equal(two[0].tokens, two[1].tokens)
        equal += same
        rows += [] if same else two
    notes = [f"{cut} rows were cut at pairs.max_tokens={max_tokens}."] if cut else []
    if equal:
        notes.append(f"{equal} pairs were left out: cut at {max_tokens} tokens (or as tokens), both answers are equal.")
    if preferences and not rows:
        raise DataError(f"none of {len(preferences)} pairs differs in its first {max_tokens} tokens; see max_tokens.")
    return rows, notes


def judgement_rows(
    judgements: Sequence[Judgement], chat: ChatFormat, max_tokens: int
) -> tuple[list[Sample], list[str]]:
    """One row for each judgement, its final answer masked in, `label` 1 where it is desirable, else 0; and notes."""
    rows: list[Sample] = []
    cut = 0
    for j in judgements:
        row, _ = answer_tokens(j.id, j.prompt, j.answer, chat)
        cut += len(row[0]) > max_tokens
        rows.append(_row(j.id, *row, max_tokens, float(j.desirable), 0.0))
    return rows, [f"{cut} rows were cut at pairs.max_tokens={max_tokens}."] if cut else []


def answer_tokens(
    name: str, prompt: tuple[Message, ...], answer: str, chat: ChatFormat
) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """((tokens [L], mask [L] of the final answer alone), where that answer starts)."""
    try:
        tokens, mask = chat.conversation_tokens((*prompt, Message("assistant", answer)))
    except (DataError, TemplateError) as error:
        raise type(error)(f"{name}: {error}") from None
    end = int(np.flatnonzero(mask)[-1])
    start = int(np.flatnonzero(~mask[:end])[-1]) + 1  # earlier assistant turns are context here
    return (tokens, mask & (np.arange(len(mask)) >= start)), start


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


def _row(name: str, tokens: np.ndarray, mask: np.ndarray, most: int, label: float, margin: float) -> Sample:
    tokens, mask = tokens[:most], mask[:most]
    if not mask.any():
        raise DataError(
            f"{name}: its prompt alone is {most} tokens or longer, so nothing of the answer is left. Raise "
            'pairs.max_tokens, or leave long prompts out with data.max_prompt_tokens and data.overlong = "drop".'
        )
    blank = np.zeros(len(tokens), np.float32)
    return Sample(tokens, mask, blank, blank + 1, label=label, margin=margin)


def _is_data(source: str) -> bool:
    return source not in BUILT_IN and (is_file_name(source) or is_hub_id(source))


def _has_pair(row: Row) -> bool:
    return first_column(row.values, PAIR_COLUMNS) is not None


def _is_judgement(row: Row) -> bool:
    """An answer beside a verdict on it; another `label`, such as a gold class, belongs to a task."""
    label = row.values.get("label")
    verdict = label in ("desirable", "undesirable") or (isinstance(label, int | float) and label in (0, 1))
    return verdict and first_column(row.values, (*COMPLETION_COLUMNS, "messages")) is not None


def _from_rows(
    setup: Setup, parse: Callable[[Row, str, str], Compared], name: str
) -> tuple[list[Compared], list[Compared], list[str], str]:
    """(train, held out, notes, hash) of the rows that `data.tasks` and `data.eval_tasks` name."""
    cfg: DataConfig = setup.recipe.data
    rows = read_rows(cfg.tasks, cfg.count)
    held = read_rows(cfg.eval_tasks, cfg.count) if cfg.eval_tasks else []
    notes: list[str] = []
    train, test = (
        usable(part, lambda row: parse(row, cfg.system, cfg.instruction), cfg, notes) for part in (rows, held)
    )
    if held:
        train, dropped = drop_leaks(train, test)
        if dropped:
            notes.append(f"{dropped} training {name} whose prompt {cfg.eval_tasks} also has were dropped.")
    else:
        train, test = split_holdout(train, cfg.holdout, setup.recipe.run.seed)
    train, test = (_fitting(part, setup.chat, cfg, notes) for part in (train, test))
    if not train:
        raise DataError(f"{cfg.tasks}: no row is left to train on after holding out {len(test)}.")
    return train, test, [f"{len(train)} {name} to train on, {len(test)} held out.", *notes], data_hash([*rows, *held])


def _fitting(items: list[Compared], chat: ChatFormat, cfg: DataConfig, notes: list[str]) -> list[Compared]:
    """Refuses, or drops and counts, items whose prompt is over `data.max_prompt_tokens`."""
    lengths = [len(chat.prompt_tokens(item.prompt)) for item in items]
    over = [(n, item.id) for n, item in zip(lengths, items, strict=True) if n > cfg.max_prompt_tokens]
    if over and cfg.overlong == "refuse":
        raise DataError(
            f"{len(over)} prompts are longer than data.max_prompt_tokens={cfg.max_prompt_tokens} (longest: "
            f'{max(over)[0]} tokens, row {max(over)[1]}). Raise it, or set data.overlong = "drop".'
        )
    if over:
        notes.append(f"{len(over)} rows with prompts over {cfg.max_prompt_tokens} tokens were dropped.")
    return [item for n, item in zip(lengths, items, strict=True) if n <= cfg.max_prompt_tokens]


def _sampled(setup: Setup) -> PairSets:
    """Pairs of the starting model's own answers to judged tasks, read back where this run has sampled them before."""
    recipe, folder = setup.recipe, setup.folder
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    notes = list(sets.notes)
    if kept := sampled.read(folder, (TRAIN_FILE, TEST_FILE), read_preferences):
        train, test = kept
    else:
        collector = opened(make_collector(setup.policy, setup.chat, verify, recipe), setup.chat, recipe.pairs.opening)
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
