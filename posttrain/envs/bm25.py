"""In-memory BM25 search over local files, passage by passage.

Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009.
"""

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
"""BM25's term frequency saturation and length normalisation."""
PASSAGE = 120
"""Target passage length in words; a passage ends with the line that reaches it."""
SUFFIXES = (".txt", ".md", ".rst", ".csv", ".py", ".html")
"""Suffixes of the files that are read from a folder."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Passage:
    """A passage of a document; `source` is the document's file name or title."""

    source: str
    text: str


class Index:
    """Inverted index from words to passages."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = list(passages)
        counts = [Counter(words(p.text)) for p in passages]
        self._lengths = [count.total() for count in counts]
        self._mean_length = sum(self._lengths) / max(1, len(counts))
        self._postings: dict[str, list[tuple[int, int]]] = {}  # word → (passage, occurrences)
        for i, count in enumerate(counts):
            for word, occurrences in count.items():
                self._postings.setdefault(word, []).append((i, occurrences))

    def scores(self, query: str) -> dict[int, float]:
        """BM25 score of each passage that contains a word of the query."""
        scores: dict[int, float] = {}
        for word in dict.fromkeys(words(query)):
            postings = self._postings.get(word, [])
            idf = math.log(1 + (len(self.passages) - len(postings) + 0.5) / (len(postings) + 0.5))
            for i, times in postings:
                weight = times * (K1 + 1) / (times + K1 * (1 - B + B * self._lengths[i] / self._mean_length))
                scores[i] = scores.get(i, 0.0) + idf * weight
        return scores

    def search(self, query: str, count: int) -> list[Passage]:
        """The `count` best passages, best first; ties keep the order of the documents."""
        scores = self.scores(query)
        return [self.passages[i] for i in sorted(scores, key=lambda i: (-scores[i], i))[:count]]


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def read_passages(path: Path) -> list[Passage]:
    """Passages of a folder's text files, or of a JSONL file whose rows have a column `text` and optionally `title`.

    Raises ConfigError if there is nothing to search and DataError for a row without text.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        documents = [(str(f.relative_to(path)), f.read_text(encoding="utf-8", errors="replace")) for f in files]
    elif path.is_file():
        documents = [_document(row.where, row.values) for row in read_rows(str(path))]
    else:
        raise ConfigError(f"no file or folder {path} to search. Give a folder or a JSONL file of documents.")
    passages = [Passage(name, text) for name, whole in documents for text in cut(whole)]
    if not passages:
        raise ConfigError(f"{path} contains no text to search. Files ending in {', '.join(SUFFIXES)} are read.")
    return passages


def cut(text: str) -> Iterator[str]:
    """Splits a text into passages of whole lines, of `PASSAGE` words or slightly more; only longer lines are split."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines():
        pieces = line.split()
        for start in range(0, len(pieces), PASSAGE):
            part = pieces[start : start + PASSAGE]
            lines.append(" ".join(part))
            size += len(part)
            if size >= PASSAGE:
                yield "\n".join(lines)
                lines, size = [], 0
    if lines:
        yield "\n".join(lines)


def _document(where: str, values: object) -> tuple[str, str]:
    text = values.get("text") if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: there is no column `text`. Put each document's text there.")
    title = values.get("title") if isinstance(values, dict) else None
    return (title if isinstance(title, str) else where.rpartition("/")[2]), text
