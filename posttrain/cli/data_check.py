"""Builds the report of `posttrain data check` with the functions that training uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from posttrain import config
from posttrain.cli.tables import printable
from posttrain.config import DataConfig, GRPORecipe, Recipe, SFTRecipe
from posttrain.config.dpo import DPORecipe
from posttrain.data.chat import ChatFormat
from posttrain.data.conversation_rows import training_rows
from posttrain.data.conversations import load_conversations
from posttrain.data.files import Row
from posttrain.data.mixing import parts_of
from posttrain.data.pairs import judgement_rows, kind_of, pair_rows, read_compared, stored_rows
from posttrain.data.preferences import judgements_of, row_to_judgement, row_to_preference
from posttrain.data.reading import EMPTY, read_source, unread_columns
from posttrain.data.sources import parse_rows, row_to_conversation, row_to_task
from posttrain.data.tasks.load import is_generated, seen_of
from posttrain.models.weights import base_of, load_tokenizer
from posttrain.rollout.tasks import env_tasks
from posttrain.types import ConfigError, DataError, Json, Sample

VARIANTS = {"kto": ("dpo", {"algo.loss": "kto"})}
"""Names of `--algo` that are an algorithm with other settings."""
SUPERVISED = ("text", "messages", "completion", "output")
"""Columns that make rows demonstrations rather than questions, if the algorithm is not given."""


@dataclass(frozen=True)
class Built:
    """Rows as an algorithm trains on them. A prompt to sample from has no trained tokens."""

    train: list[Sample]
    held_out: int
    notes: list[str]


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a row that are all trained, or all context."""

    trained: bool
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Checked:
    """What `posttrain data check` found. Lengths are in tokens, over the rows that are trained on."""

    file: str
    algorithm: str
    rows: int
    held_out: int
    tokens: int
    trained_tokens: int
    shortest: int
    median: float
    longest: int
    duplicates: int
    columns: list[str]  # read in some row
    unread: list[str]  # filled in some row and not read there
    notes: list[str]
    examples: list[list[Span]]

    def as_dict(self, ids: bool) -> Json:
        """A JSON-serialisable dict, with the token ids of the examples if asked for."""
        found = asdict(self)
        if not ids:
            found["examples"] = [[{k: v for k, v in s.items() if k != "ids"} for s in row] for row in found["examples"]]
        return found


def check(file: str, model: str, algorithm: str, settings: Mapping[str, str], shown: int = 5) -> Checked:
    """Reads `file` as `algorithm` (sft, dpo, kto or grpo; empty: by its columns) would, with its settings.

    Raises the error that training would raise before step 0.
    """
    if is_generated(file):
        raise ConfigError(f"{file!r} is a built-in task. Name a file or a hub dataset to check.")
    data = config.resolve("sft", {}, {k: v for k, v in settings.items() if k.startswith("data.")}).data
    read: list[str] = []
    rows = [row for name, _ in parts_of(file) for row in read_source(name, data, read)]
    algorithm = algorithm or _algorithm(rows)
    named, more = VARIANTS.get(algorithm, (algorithm, {}))
    overrides = {"data.tasks": file, "model.path": model, **more, **settings}
    recipe: Recipe = config.resolve(named, {}, overrides)
    tokenizer = load_tokenizer(base_of(recipe.model.path), recipe.model.path)
    chat = ChatFormat(tokenizer, recipe.data.format, recipe.data.template_kwargs)
    parse, build = BUILDERS[algorithm]
    built = build(recipe, chat)
    if not built.train:
        raise DataError(f"{file}: no row is left to train on.")
    lengths = [len(sample.tokens) for sample in built.train]
    unread = unread_columns(rows, lambda row: parse(row, recipe.data))
    filled = Counter(name for row in rows for name, value in row.values.items() if value not in EMPTY)
    return Checked(
        file=file,
        algorithm=algorithm,
        rows=len(built.train),
        held_out=built.held_out,
        tokens=sum(lengths),
        trained_tokens=sum(int(sample.loss_mask.sum()) for sample in built.train),
        shortest=min(lengths),
        median=median(lengths),
        longest=max(lengths),
        duplicates=len(lengths) - len({(s.tokens.tobytes(), s.loss_mask.tobytes()) for s in built.train}),
        columns=[name for name, count in filled.items() if unread.get(name, 0) < count],
        unread=list(unread),
        notes=list(dict.fromkeys([*read, *built.notes])),
        examples=[_spans(built.train[i], tokenizer) for i in _spread(len(lengths), shown)],
    )


def show(out: Console, found: Checked, ids: bool) -> None:
    """Prints a report: rows with trained tokens in green, or between ⟦ and ⟧ where there are no colours."""
    for number, spans in enumerate(found.examples, 1):
        line = Text(f"row {number} ", style="bold")
        for span in spans:
            text = printable(span.text)
            marked = f"⟦{text}⟧" if span.trained and not out.color_system else text
            line.append(marked, style="green" if span.trained else "dim")
        out.print(line, soft_wrap=True)
        if ids:
            out.print(Text(" ".join(f"{i}*" if s.trained else str(i) for s in spans for i in s.ids)), soft_wrap=True)
    kind = "rows to train on" if found.trained_tokens else "prompts to sample from"
    out.print(f"{found.algorithm}: {found.rows} {kind}, {found.held_out} held out")
    out.print(
        f"{found.tokens} tokens, {found.trained_tokens} of them trained; {found.shortest} to {found.longest} a row, "
        f"median {found.median:g}"
    )
    if found.duplicates:
        out.print(f"{found.duplicates} rows repeat another row")
    out.print(Text(printable(f"columns that are read: {', '.join(found.columns)}")), soft_wrap=True)
    if found.unread:
        out.print(Text(printable(f"not read by the model: {', '.join(found.unread)}"), style="yellow"), soft_wrap=True)
    for note in found.notes:
        out.print(Text(printable(note)), soft_wrap=True)


def _algorithm(rows: Sequence[Row]) -> str:
    kind = kind_of(rows)
    if kind != "tasks":
        return {"pairs": "dpo", "judgements": "kto"}[kind]
    shown = sum(any(row.values.get(name) is not None for name in SUPERVISED) for row in rows)
    return "sft" if 2 * shown >= len(rows) else "grpo"


def _sft(recipe: SFTRecipe, chat: ChatFormat) -> Built:
    sets = load_conversations(recipe.data, recipe.run.seed)
    notes = list(sets.notes)
    train = [row for source in sets.sources for row in training_rows(source, chat, recipe.algo, notes)]
    test = [row for s in sets.held_out for row in training_rows(s, chat, recipe.algo, notes, "held-out ")]
    return Built(train, len(test), notes)


def _dpo(recipe: DPORecipe, chat: ChatFormat) -> Built:
    notes: list[str] = []
    rows = stored_rows(recipe.data, notes)
    kind = kind_of(rows) if rows else "tasks"
    if kind != "pairs":
        raise _other_kind(recipe, rows, "pairs of chosen and rejected")
    train, test, more, _ = read_compared(rows, recipe.data, recipe.run.seed, chat, row_to_preference, "pairs")
    samples, cut = pair_rows(train, chat, recipe.pairs.max_tokens)
    return Built(samples, 2 * len(test), [*notes, *more, *cut])


def _kto(recipe: DPORecipe, chat: ChatFormat) -> Built:
    notes: list[str] = []
    rows = stored_rows(recipe.data, notes)
    if rows and kind_of(rows) == "pairs":
        pairs, held, more, _ = read_compared(rows, recipe.data, recipe.run.seed, chat, row_to_preference, "pairs")
        train, test = ([one for pair in part for one in judgements_of(pair)] for part in (pairs, held))
    elif rows and kind_of(rows, judged=True) == "judgements":
        train, test, more, _ = read_compared(rows, recipe.data, recipe.run.seed, chat, row_to_judgement, "judgements")
    else:
        raise _other_kind(recipe, rows, "completions with a label")
    samples, cut = judgement_rows(train, chat, recipe.pairs.max_tokens)
    return Built(samples, len(test), [*notes, *more, *cut])


def _other_kind(recipe: DPORecipe, rows: Sequence[Row], expected: str) -> DataError:
    """The error for rows of another kind than an algorithm learns from, with the one that reads them, if any."""
    found = _algorithm(rows)
    try:
        parse_rows(rows, lambda row: BUILDERS[found][0](row, recipe.data), "drop")
        advice = f"Check it with --algo {found}."
    except DataError:  # nothing reads them
        advice = "Rename columns with posttrain data convert FILE --to FILE --rename OLD=NEW."
    columns = ", ".join(dict.fromkeys(name for row in rows for name in row.values))
    return DataError(f"{recipe.data.tasks} has no {expected}; its columns are {columns}. {advice}")


def _grpo(recipe: GRPORecipe, chat: ChatFormat) -> Built:
    sets, _, _ = env_tasks(recipe, chat)
    prompts: list[Sample] = []
    for task in sets.train:
        tokens = chat.prompt_tokens(task.messages)
        blank = np.zeros(len(tokens), np.float32)
        prompts.append(Sample(tokens, np.zeros(len(tokens), bool), blank, blank))
    return Built(prompts, len(sets.test), sets.notes)


def _task(row: Row, data: DataConfig) -> object:
    return seen_of(row_to_task(row, "", data.system, data.instruction, needs_answer=False))


BUILDERS: dict[str, tuple[Callable[[Row, DataConfig], object], Callable[[Any, ChatFormat], Built]]] = {
    "sft": (lambda row, data: row_to_conversation(row, data.system, data.instruction), _sft),
    "dpo": (lambda row, data: replace(row_to_preference(row, data.system, data.instruction), id=""), _dpo),
    "kto": (lambda row, data: replace(row_to_judgement(row, data.system, data.instruction), id=""), _kto),
    "grpo": (_task, _grpo),
}
"""How each algorithm parses a row, and builds its training rows from a recipe."""


def _spread(count: int, shown: int) -> list[int]:
    """Up to `shown` indices below `count`, evenly spaced."""
    return list(range(count)) if count <= shown else [i * count // shown for i in range(shown)]


def _spans(sample: Sample, tokenizer: Any) -> list[Span]:
    spans: list[Span] = []
    for trained, run in groupby(zip(sample.tokens.tolist(), sample.loss_mask.tolist(), strict=True), lambda t: t[1]):
        ids = [token for token, _ in run]
        spans.append(Span(bool(trained), tokenizer.decode(ids, skip_special_tokens=False), ids))
    return spans
