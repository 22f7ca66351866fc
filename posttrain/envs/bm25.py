"""Search over local files: passages of documents, ranked by BM25 (Robertson and Zaragoza, "The Probabilistic Relevance
Framework", 2009), all of it in memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.data.files import read_rows
from posttrain.types import ConfigError, DataError

K1, B = 1.2, 0.75
"""How soon a word's repetitions stop counting, and how much of a passage's length is held against it."""
PASSAGE = 120
"""Words after which a passage ends with its line."""
SUFFIXES = (".txt", ".md", ".rst", ".csv", ".py", ".html")
"""Files of a folder that are read."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Passage:
    """A stretch of a document; `source` is the document's file or title."""

    source: str
    text: str


class Index:
    """Passages by the words they hold."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = list(passages)
        counts = [Counter(words(p.text)) for p in passages]
        self._lengths = [count.total() for count in counts]
        self._mean = sum(self._lengths) / max(1, len(counts))
        self._holders: dict[str, list[tuple[int, int]]] = {}  # word → (passage, how often)
        for i, count in enumerate(counts):
            for word, times in count.items():
                self._holders.setdefault(word, []).append((i, times))

    def scores(self, query: str) -> dict[int, float]:
        """The score of each passage that holds a word of the query."""
        found: dict[int, float] = {}
        for word in dict.fromkeys(words(query)):
            holders = self._holders.get(word, [])
            rarity = math.log(1 + (len(self.passages) - len(holders) + 0.5) / (len(holders) + 0.5))
            for i, times in holders:
                weight = times * (K1 + 1) / (times + K1 * (1 - B + B * self._lengths[i] / self._mean))
                found[i] = found.get(i, 0.0) + rarity * weight
        return found

    def search(self, query: str, count: int) -> list[Passage]:
        """The `count` best passages, best first; equal ones in their own order."""
        found = self.scores(query)
        return [self.passages[i] for i in sorted(found, key=lambda i: (-found[i], i))[:count]]


def words(text: str) -> list[str]:
    """The words of a text in small letters."""
    return _WORD.findall(text.lower())


def read_passages(path: Path) -> list[Passage]:
    """The passages of a folder's text files, or of rows with a column `text` (and perhaps `title`) in a JSONL file.

    Raises ConfigError where there is nothing to search, and DataError for a row without text.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        documents = [(str(f.relative_to(path)), f.read_text(encoding="utf-8", errors="replace")) for f in files]
    elif path.is_file():
        documents = [_document(row.where, row.values) for row in read_rows(str(path))]
    else:
        raise ConfigError(f"there is nothing to search at {path}. Give a folder or a JSONL file of documents.")
    found = [Passage(name, text) for name, whole in documents for text in cut(whole)]
    if not found:
        raise ConfigError(f"{path} holds no text to search; files that end in {', '.join(SUFFIXES)} are read.")
    return found


def cut(text: str) -> Iterator[str]:
    """A text in passages: whole lines, up to `PASSAGE` words or a little more; only a longer line is broken."""
    held: list[str] = []
    size = 0
    for line in text.splitlines():
        pieces = line.split()
        for start in range(0, len(pieces), PASSAGE):
            part = pieces[start : start + PASSAGE]
            held.append(" ".join(part))
            size += len(part)
            if size >= PASSAGE:
                yield "\n".join(held)
                held, size = [], 0
    if held:
        yield "\n".join(held)


def _document(where: str, values: object) -> tuple[str, str]:
    text = values.get("text") if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: no column `text` to search. Give each document's text there.")
    title = values.get("title") if isinstance(values, dict) else None
    return (title if isinstance(title, str) else where.rpartition("/")[2]), text
