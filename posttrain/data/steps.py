"""Answers cut into steps, and the token at which each step ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.data.chat import ChatFormat
from posttrain.types import DataError, Message, Sample


def step_spans(text: str, separator: str) -> list[tuple[int, int]]:
    """Start and end of each step of an answer, in characters, without the white space around it; blanks are none."""
    spans: list[tuple[int, int]] = []
    start = 0
    for part in text.split(separator):
        if said := part.strip():
            first = start + part.index(said)
            spans.append((first, first + len(said)))
        start += len(part) + len(separator)
    return spans


def join_steps(steps: Sequence[str], separator: str) -> tuple[str, list[int]]:
    """Steps as one answer, and where each ends in it; the inverse of `step_spans` but for white space."""
    text = separator.join(steps)
    lengths = [len(separator) * (i > 0) + len(step) for i, step in enumerate(steps)]
    trailing = [len(step) - len(step.rstrip()) for step in steps]
    return text, [int(end) - gap for end, gap in zip(np.cumsum(lengths), trailing, strict=True)]


def step_row(
    chat: ChatFormat, prompt: Sequence[Message], text: str, ends: Sequence[int], labels: Sequence[float] | None = None
) -> Sample:
    """A conversation whose loss mask is True at the last token of each step that ends at one of `ends`.

    `returns` [L] holds the steps' labels there. The row goes up to its end-of-turn token. Raises DataError where two
    steps that are to have labels end in one token.
    """
    tokens, begun, _ = chat.answer_marks([*prompt, Message("assistant", text)], ends)
    mask, blank = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
    mask[begun - 1] = True
    targets = blank.copy()
    if labels is not None:
        if mask.sum() < len(ends):
            raise DataError(f"two steps of {text[:40]!r} end in the same token; use a longer separator of steps.")
        targets[begun - 1] = labels
    return Sample(tokens, mask, blank, blank, returns=targets)
