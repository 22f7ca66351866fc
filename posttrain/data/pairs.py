"""Reads preference pairs and unpaired judgements and converts them into training samples.

A pair becomes two adjacent samples, the better answer first, with identical prompt tokens and loss masks on the final
answer only. KTO's unpaired judgements become one sample each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np

from posttrain.config import DataConfig
from posttrain.data.chat import ChatFormat
from posttrain.data.lengths import fitting
from posttrain.data.messages import answer_message, without_prefill
from posttrain.data.mixing import parts_of
from posttrain.data.preferences import COMPLETION_COLUMNS, PAIR_COLUMNS, SCORE_GAP, VERDICTS, pair_label, pair_scores
from posttrain.data.reading import read_source, unread_note
from posttrain.data.shown import require_tools_shown, unread_fields, unread_notes
from posttrain.data.sources import (
    Row,
    data_hash,
    drop_leaks,
    first_column,
    is_file_name,
    is_hub_id,
    split_holdout,
    usable,
)
from posttrain.data.tasks.load import BUILT_IN
from posttrain.types import ConfigError, DataError, Judgement, Message, Preference, Sample, TemplateError

Compared = TypeVar("Compared", Preference, Judgement)
Kind = Literal["pairs", "judgements", "tasks"]


def stored_rows(cfg: DataConfig, notes: list[str]) -> list[Row]:
    """The rows of `data.tasks` if it names files or hub datasets; none if it names built-in tasks.

    Several files, `a.jsonl + b.jsonl`, are read one after the other. Raises ConfigError if they have weights.
    """
    if cfg.tasks in BUILT_IN:
        return []
    parts = parts_of(cfg.tasks)
    if not all(is_file_name(name) or is_hub_id(name) for name, _ in parts):
        return []
    if len({weight for _, weight in parts}) > 1:
        raise ConfigError(
            f"data.tasks={cfg.tasks!r} gives its files different weights, but every row of feedback is used once. "
            "Leave the weights out, or repeat rows."
        )
    return [row for name, _ in parts for row in read_source(name, cfg, notes)]


def kind_of(rows: Sequence[Row], judged: bool = False) -> Kind:
    """The kind of most rows: pairs, judgements of single answers, or tasks. Rows of other kinds are bad rows.

    With `judged`, for a loss that learns from judgements, any label of a completion is meant as a judgement, so that a
    file whose labels are written in another way is refused, not read as tasks.
    """
    kinds: Counter[Kind] = Counter()
    for row in rows:
        labelled = _is_judgement(row) or (judged and _has_label(row))
        kinds["pairs" if _has_pair(row) else "judgements" if labelled else "tasks"] += 1
    return kinds.most_common(1)[0][0]


def read_compared(
    rows: list[Row], cfg: DataConfig, seed: int, chat: ChatFormat, parse: Callable[[Row, str, str], Compared], name: str
) -> tuple[list[Compared], list[Compared], list[str], str]:
    """Parses `rows`, those of `data.tasks`, and reads `data.eval_tasks`; returns (train, held-out, notes, hash)."""
    notes: list[str] = []
    held = read_source(cfg.eval_tasks, cfg, notes) if cfg.eval_tasks else []
    read: dict[str, Row] = {}

    def used(row: Row) -> Compared:
        item = parse(row, cfg.system, cfg.instruction)
        read[row.where] = row
        return item

    train, test = (usable(part, used, cfg, notes) for part in (rows, held))
    notes += score_notes(list(read.values()))
    for source, part in ((cfg.tasks, rows), (cfg.eval_tasks, held)):
        notes += unread_note(source, part, lambda row: replace(parse(row, cfg.system, cfg.instruction), id=""))
    if held:
        train, dropped = drop_leaks(train, test)
        if dropped:
            notes.append(f"{dropped} training {name} with a prompt that is also in {cfg.eval_tasks} were dropped.")
    else:
        try:
            train, test = split_holdout(train, cfg.holdout, seed)
        except DataError as error:
            raise DataError(f"{cfg.tasks}: {error} Or set data.holdout = 0 to hold nothing out.") from None
    for part in (train, test):
        _note_unread(part, chat, cfg, notes)
    parts = (("training", train), ("evaluation", test))
    train, test = ([x for x, _ in fitting(part, lambda x: x.prompt, kind, chat, cfg, notes)] for kind, part in parts)
    if not train:
        raise DataError(f"{cfg.tasks}: no row is left to train on after holding out {len(test)}.")
    return train, test, [f"{len(train)} {name} to train on, {len(test)} held out.", *notes], data_hash([*rows, *held])


def score_notes(rows: Sequence[Row]) -> list[str]:
    """Notes that count the pairs whose scores or margin contradict their labels, and those with equal scores.

    The labels are trained on, whatever the scores say: `chosen` is better unless the row has a `label` or `tie`.
    """
    against: list[str] = []
    equal: list[str] = []
    for row in rows:
        if not _has_pair(row):
            continue
        side = pair_label(row) - 0.5  # above 0: chosen is the better one
        gaps = pair_scores(row)
        if any(gap * side < 0 or (side == 0 and gap != 0) for gap in gaps.values()):
            shown = " and ".join(f"{name}={gap:g}" for name, gap in gaps.items())
            against.append(f"{row.where}, with {shown} where {_better(side)}")
        elif side and gaps.get(SCORE_GAP) == 0:
            equal.append(row.where)
    notes: list[str] = []
    if against:
        notes.append(
            f"{len(against)} of {len(rows)} pairs have scores that contradict their labels, which are trained on (the "
            f"first is {against[0]}). Swap or remove them if the scores are right."
        )
    if equal:
        notes.append(
            f"{len(equal)} of {len(rows)} pairs have equal scores although one answer is labelled better (the first is "
            f"{equal[0]}). The labels are trained on; set tie = true in rows that are ties."
        )
    return notes


def _better(side: float) -> str:
    return "the two are a tie" if side == 0 else f"{PAIR_COLUMNS[0] if side > 0 else PAIR_COLUMNS[1]} is better"


def _note_unread(items: Sequence[Compared], chat: ChatFormat, cfg: DataConfig, notes: list[str]) -> None:
    """Notes what the chat template does not write of the prompts. Raises TemplateError if that is their tools."""
    unread: Counter[str] = Counter()
    for item in items:
        try:
            require_tools_shown(item.prompt, chat)
        except TemplateError as error:
            raise TemplateError(f"{item.id}: {error}") from None
        unread.update(unread_fields(item.prompt, chat))
    notes += unread_notes(cfg.tasks, unread)


def pair_rows(preferences: Sequence[Preference], chat: ChatFormat, max_tokens: int) -> tuple[list[Sample], list[str]]:
    """Samples 2i (chosen) and 2i + 1 (rejected) of each preference, and notes on truncated and omitted ones.

    The loss masks cover the final answer, stop token included, and the prompts are the same tokens. A sample's `label`
    is the probability that it is the better of the two; both have the preference's margin. Rows are truncated at
    `max_tokens`; a pair whose rows are then equal has no signal and is left out. Raises DataError or TemplateError
    naming the preference.
    """
    rows: list[Sample] = []
    cut = equal = 0
    for p in preferences:
        chosen, rejected = (answer_tokens(p.id, p.prompt, a, chat) for a in (p.chosen, p.rejected))
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
        notes.append(f"{equal} pairs were left out: their answers have equal tokens up to {max_tokens} tokens.")
    if preferences and not rows:
        raise DataError(
            f"none of {len(preferences)} pairs differs in the first {max_tokens} tokens. Raise pairs.max_tokens."
        )
    return rows, notes


def judgement_rows(
    judgements: Sequence[Judgement], chat: ChatFormat, max_tokens: int
) -> tuple[list[Sample], list[str]]:
    """One sample per judgement, with a loss mask on the final answer and `label` 1 if it is desirable, else 0; and
    notes on truncated rows."""
    rows: list[Sample] = []
    cut = 0
    for j in judgements:
        row = answer_tokens(j.id, j.prompt, j.answer, chat)
        cut += len(row[0]) > max_tokens
        rows.append(_row(j.id, *row, max_tokens, float(j.desirable), 0.0))
    return rows, [f"{cut} rows were cut at pairs.max_tokens={max_tokens}."] if cut else []


def answer_tokens(
    name: str, prompt: tuple[Message, ...], answer: str, chat: ChatFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [L] of the prompt and an answer to it, and a mask [L] on the answer."""
    try:
        return chat.answer_row((*without_prefill(prompt), answer_message(answer)))
    except (DataError, TemplateError) as error:
        raise type(error)(f"{name}: {error}") from None


def _row(name: str, tokens: np.ndarray, mask: np.ndarray, most: int, label: float, margin: float) -> Sample:
    tokens, mask = tokens[:most], mask[:most]
    if not mask.any():
        raise DataError(
            f"{name}: the prompt alone has at least {most} tokens, so none of the answer is left. Raise "
            'pairs.max_tokens, or drop long prompts with data.max_prompt_tokens and data.overlong = "drop".'
        )
    blank = np.zeros(len(tokens), np.float32)
    return Sample(tokens, mask, blank, blank + 1, label=label, margin=margin)


def _has_pair(row: Row) -> bool:
    return first_column(row.values, PAIR_COLUMNS) is not None


def _is_judgement(row: Row) -> bool:
    """Whether a row has an answer and a desirable/undesirable label; any other `label`, e.g. a class, is a task's."""
    label = row.values.get("label")
    verdict = label.strip().lower() in VERDICTS if isinstance(label, str) else label in (0, 1)
    return verdict and first_column(row.values, (*COMPLETION_COLUMNS, "messages")) is not None


def _has_label(row: Row) -> bool:
    """Whether a row has a label of any kind beside a completion (an `answer` may be the gold answer of a task)."""
    given = [name for name in COMPLETION_COLUMNS if name != "answer"]
    return row.values.get("label") is not None and first_column(row.values, given) is not None
