"""Finds the thought in a completion: the tags around it, the text after it, and decoding that keeps the tags."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_TAGS = r"think|thinking|thought|thoughts|reasoning|reason|seed:think"
TAG = re.compile(rf"</?(?:{_TAGS})>|\[/?THINK\]", re.IGNORECASE)
"""A tag around a thought, as chat templates and models write it."""
OPENED = re.compile(rf"(?:<(?:{_TAGS})>|\[THINK\])(?:(?!</(?:{_TAGS})>|\[/THINK\]).)*\Z", re.DOTALL | re.IGNORECASE)
"""A thought at the end of a text that is not closed."""
_BEGINS = re.compile(rf"\s*(<(?:{_TAGS})>|\[THINK\])", re.IGNORECASE)


def tags_of(text: str) -> tuple[str, str]:
    """The opening and closing tag of the thoughts in a text: those of the thought that it begins with, or `<think>`."""
    begun = _BEGINS.match(text)
    opening = begun.group(1) if begun else "<think>"
    return opening, f"{opening[0]}/{opening[1:]}"


def has_thought(text: str) -> bool:
    """Whether a text has a thought, finished or not."""
    return tags_of(text)[0] in text


@lru_cache(maxsize=8)
def hidden_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens that a completion's text leaves out: all but tags of a thought, which some tokenizers mark
    as special."""
    return {t: i for t, (i, special) in _added(tokenizer).items() if special and not TAG.fullmatch(t)}


def shown_text(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Decodes generated ids without special tokens, but with the tags of a thought, which verifiers look for."""
    ids = [int(t) for t in tokens]
    if not _has_special_tags(tokenizer):
        return tokenizer.decode(ids, skip_special_tokens=True)
    hidden = {*hidden_tokens(tokenizer).values()}
    return tokenizer.decode([t for t in ids if t not in hidden], skip_special_tokens=False)


@lru_cache(maxsize=8)
def _has_special_tags(tokenizer: Any) -> bool:
    return any(special and TAG.fullmatch(text) for text, (_, special) in _added(tokenizer).items())


def _added(tokenizer: Any) -> dict[str, tuple[int, bool]]:
    """Text of each added token → its id, and whether it is special."""
    backend = getattr(tokenizer, "get_added_tokens_decoder", None)  # of the tokenizers library, else transformers'
    decoder: dict[int, Any] = backend() if backend else tokenizer.added_tokens_decoder
    return {t.content: (i, t.special) for i, t in decoder.items()}
