"""Sources of pairs to label: files of pairs, and stored completions of runs, in the folder that the lab shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, TypedDict

from posttrain import rng
from posttrain.data.files import Row, read_rows, writable
from posttrain.data.preferences import row_to_preference
from posttrain.data.sources import first_column
from posttrain.lab.folders import Place
from posttrain.lab.label import store
from posttrain.store.database import connect
from posttrain.types import ConfigError, DataError, JsonView, Message, PosttrainError, Preference, ResumeError

TWO = (("chosen", "rejected"), ("a", "b"), ("first", "second"), ("response_a", "response_b"))
"""Columns with two answers, tried in this order."""
SEVERAL = ("responses", "answers", "completions")
"""Columns with a list of answers, every two of which make a pair."""
VERDICTS = ("label", "tie", "margin", "score_chosen", "score_rejected")
"""Columns with existing labels, which are dropped so that they do not influence a new annotator."""
MOST = 2000
"""Maximum pairs per queue; for a run, those of the latest steps."""
MOST_FILES = 200


@dataclass(frozen=True)
class Found:
    """The pairs of a source, the number of rows without a pair, and the reason for the first of them."""

    pairs: list[Preference]
    left_out: int = 0
    reason: str = ""


class Started(TypedDict):
    """A source's queue, the number of pairs in it, the number of rows without a pair, and the reason for the first."""

    queue: str
    pairs: int
    left_out: int
    reason: str


def list_sources(place: Place) -> list[dict[str, str]]:
    """Every file of pairs and every run that stores completions: `source`, `kind` and the name of its queue."""
    files = [("file", name) for name, path in files_of(place).items() if _holds_pairs(path)]
    runs = [("run", name) for name, path in place.runs().items() if _stores_groups(path)]
    return [
        {"source": f"{kind}:{name}", "kind": kind, "name": name, "queue": _queue(name)}
        for kind, name in [*files, *runs]
    ]


def files_of(place: Place) -> dict[str, Path]:
    """Relative path → file, for at most `MOST_FILES` files in the folder, its runs and its pipelines' stages."""
    found: dict[str, Path] = {}
    for depth in ("*.jsonl", "*/*.jsonl", "*/*/*.jsonl"):
        for path in sorted(place.root.glob(depth)):
            name = path.relative_to(place.root).as_posix()
            if not name.startswith((f"{store.FOLDER}/", ".")) and len(found) < MOST_FILES:
                found[name] = path
    return found


def start(place: Place, source: str) -> Started:
    """Creates the queue of a source if it does not exist yet.

    Raises ResumeError for an unknown source, DataError for one without any pair.
    """
    kind, _, name = source.partition(":")
    if kind == "file" and name in (files := files_of(place)):
        found = pairs_of_file(files[name])
    elif kind == "run":
        found = pairs_of_run(place.run(name), name)
    else:
        raise ResumeError(f"{place.root} contains nothing named {source!r} to label.")
    if not found.pairs:
        raise DataError(f"{name} contains no pair of different answers to the same prompt. {found.reason}")
    queue = _queue(name)
    store.create(place.root, queue, source, found.pairs)
    return {"queue": queue, "pairs": len(found.pairs), "left_out": found.left_out, "reason": found.reason}


def pairs_of_file(path: Path) -> Found:
    """At most `MOST` pairs of a file, in file order; rows without a pair are counted."""
    pairs: list[Preference] = []
    left_out, reason = 0, ""
    for row in read_rows(str(path)):
        try:
            pairs += pairs_of_row(row)
        except DataError as error:
            left_out, reason = left_out + 1, reason or str(error)
        if len(pairs) >= MOST:
            break
    return Found(pairs[:MOST], left_out, reason)


def pairs_of_row(row: Row) -> list[Preference]:
    """The pairs of one row, ignoring which answer is `chosen`. Raises DataError if there are none."""
    values = {name: value for name, value in row.values.items() if name not in VERDICTS}
    for names in TWO:
        if all(values.get(name) is not None for name in names):
            return [_preference(row, values, *(values[name] for name in names))]
    column = first_column(values, SEVERAL)
    if column is None or not isinstance(values[column], list):
        raise DataError(
            f"{row.where}: expected columns with two answers ({', '.join('+'.join(two) for two in TWO)}) "
            f"or one with a list ({', '.join(SEVERAL)})."
        )
    answers = list(dict.fromkeys(text for text in values[column] if isinstance(text, str) and text.strip()))
    if len(answers) < 2:
        raise DataError(f"{row.where}: {column!r} has {len(answers)} different answers, but a pair needs two.")
    return [_preference(row, values, *two, f"/{n}") for n, two in enumerate(combinations(answers, 2))]


def pairs_of_run(folder: Path, name: str) -> Found:
    """One pair of different stored completions per task and step of a run, latest steps first, at most `MOST`."""
    pairs: list[Preference] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    same = 0
    for (kind, step, group), prompt, texts in _groups(folder):
        if len(texts) < 2:
            same += 1
            continue
        first, second = (texts[int(i)] for i in rng.permutation(len(texts), "label", name, kind, step, group)[:2])
        if (prompt, frozenset((first, second))) not in seen:
            seen.add((prompt, frozenset((first, second))))
            pairs.append(Preference(f"{name}/{kind}/{step}/{group}", (Message("user", prompt),), first, second))
        if len(pairs) == MOST:
            break
    return Found(pairs, same, f"{same} tasks have fewer than two different completions." if same else "")


def _groups(folder: Path) -> Iterator[tuple[tuple[str, int, int], str, list[str]]]:
    """((kind, step, group), prompt, different completions) of stored episodes, training episodes first."""
    database = connect(folder, "ro")
    try:
        rows = database.execute(
            "SELECT kind, step, grp, prompt, text FROM episodes ORDER BY kind = 'eval', step DESC, grp, idx"
        )
        for key, group in groupby(rows, key=lambda row: row[:3]):
            answers = list(group)
            texts = dict.fromkeys(text for *_, text in answers if writable(text))
            yield key, answers[0][3], list(texts) if answers[0][3].strip() else []
    finally:
        database.close()


def _preference(row: Row, values: JsonView, one: Any, other: Any, suffix: str = "") -> Preference:
    pair = row_to_preference(Row(row.where, {**values, "chosen": one, "rejected": other}))
    return Preference(pair.id + suffix, pair.prompt, pair.chosen, pair.rejected)


def _holds_pairs(path: Path) -> bool:
    """Whether the first row holds a pair; checking only one row keeps long lists fast."""
    try:
        return bool(pairs_of_row(read_rows(str(path), 1)[0]))
    except DataError:
        return False


def _stores_groups(path: Path) -> bool:
    try:
        database = connect(path, "ro")
    except (PosttrainError, OSError):
        return False
    try:
        return database.execute("SELECT 1 FROM episodes WHERE idx > 0 LIMIT 1").fetchone() is not None
    finally:
        database.close()


def _queue(name: str) -> str:
    """A queue's name: the name of its source, in characters that fit into a URL and a file name."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name.removesuffix(".jsonl")).strip(".-")
    if not plain:
        raise ConfigError(f"cannot name a queue after {name!r}, which has no letters or digits. Rename it.")
    return plain[:80]
