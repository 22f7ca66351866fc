"""Exports labels as preference data for `posttrain reward` and `posttrain dpo`, as JSON Lines.

A file's name ends in a digest of its content, so that a run's data setting identifies exactly the data it was trained
on, and later labels go into another file.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict, get_args

from posttrain.data.files import json_lines
from posttrain.lab.label.store import FOLDER, Label, MessageRow, Pair, Queue, prompt_rows
from posttrain.store.durable import publish_file
from posttrain.types import ConfigError, DataError

Who = Literal["each", "majority", "share"]
"""`each`: one row per label. `majority`: one row per pair with the majority's choice, a tie if there is no majority.
`share`: one row per pair, whose label is the share of annotators that prefer the answer, a tie counting half."""
Ties = Literal["keep", "drop"]
"""`keep` writes a tie as a row with label 0.5, which Bradley–Terry and DPO can train on; `drop` omits it."""


class ExportRow(TypedDict):
    """A row of an export; `label` is the probability that `chosen` is better."""

    id: str
    prompt: list[MessageRow]
    chosen: str
    rejected: str
    label: float
    annotator: str


def rows(pairs: Sequence[Pair], labels: Sequence[Label], who: str = "each", ties: str = "keep") -> list[ExportRow]:
    """The rows of an export, by pair and then by annotator. Raises ConfigError for an unknown option."""
    for name, value, known in (("who", who, get_args(Who)), ("ties", ties, get_args(Ties))):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
    said: dict[str, list[Label]] = {}
    for label in labels:
        said.setdefault(label.pair, []).append(label)
    found: list[ExportRow] = []
    for pair in pairs:
        own = sorted(said.get(pair.id, []), key=lambda label: label.annotator)
        if who == "each":
            found += [_row(pair, _worth(label.preferred), [label.annotator]) for label in own]
        elif own:
            worth = _worth(_most([x.preferred for x in own])) if who == "majority" else _mean(own)
            found.append(_row(pair, worth, [label.annotator for label in own]))
    return [row for row in found if ties == "keep" or row["label"] != 0.5]


def text_of(queue: Queue, who: str = "each", ties: str = "keep") -> str:
    """The file's text. Raises DataError if there is no label to write."""
    found = rows(queue.pairs(), queue.labels(), who, ties)
    if not found:
        raise DataError(f"queue {queue.name} has no labels to export yet. Label a pair, or keep ties.")
    return json_lines(found)


def write(queue: Queue, who: str = "each", ties: str = "keep") -> tuple[Path, int]:
    """Writes the file next to the database, atomically; returns (path, number of rows)."""
    text = text_of(queue, who, ties)
    path = queue.path.with_name(f"{queue.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl")
    publish_file(path, text)
    return path, text.count("\n")


def written(root: Path, queue: str) -> dict[str, Path]:
    """File name → path of a queue's exports."""
    mine = re.compile(rf"{re.escape(queue)}-[0-9a-f]{{8}}\.jsonl")
    return {path.name: path for path in sorted((root / FOLDER).glob("*.jsonl")) if mine.fullmatch(path.name)}


def _worth(preferred: str) -> float:
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[preferred]


def _most(said: Sequence[str]) -> str:
    """The most frequent choice; a tie if two choices are equally frequent."""
    ranked = Counter(said).most_common(2)
    return "tie" if len(ranked) > 1 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _mean(labels: Sequence[Label]) -> float:
    return sum(_worth(label.preferred) for label in labels) / len(labels)


def _row(pair: Pair, worth: float, annotators: Sequence[str]) -> ExportRow:
    """`worth` is the probability that a is better; the row's label is that of its `chosen`, so at least 1/2."""
    chosen, rejected = (pair.a, pair.b) if worth >= 0.5 else (pair.b, pair.a)
    return {
        "id": pair.id,
        "prompt": prompt_rows(pair.prompt),
        "chosen": chosen,
        "rejected": rejected,
        "label": max(worth, 1 - worth),
        "annotator": ", ".join(annotators),
    }
