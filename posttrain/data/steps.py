"""Splits completions into steps and finds the token at which each step ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.data.chat import ChatFormat
from posttrain.data.messages import answer_message, without_prefill
from posttrain.types import DataError, Message, Sample


def split_steps(text: str, separator: str) -> list[str]:
    """Splits a completion into steps; joining them with the separator restores it. A blank text has no steps.

    Two separators with nothing in between do not make an empty step: both belong to the step before them, or, at the
    very start, to the step after them.
    """
    steps: list[str] = []
    for part in text.split(separator):
        if steps and not (part.strip() and steps[-1].strip()):
            steps[-1] += separator + part
        else:
            steps.append(part)
    return steps if text.strip() else []


def step_ends(steps: Sequence[str], separator: str) -> list[int]:
    """Character position in the joined text at which each step ends, before trailing white space and separators."""
    ends: list[int] = []
    start = 0
    for step in steps:
        stripped = step
        while stripped != (shorter := stripped.removesuffix(separator).rstrip()):
            stripped = shorter
        ends.append(start + len(stripped))
        start += len(step) + len(separator)
    return ends


def step_row(
    chat: ChatFormat, prompt: Sequence[Message], text: str, ends: Sequence[int], labels: Sequence[float] | None = None
) -> Sample:
    """A sample whose loss mask is True at the last token of each step; `ends` are the steps' character positions.

    `returns` [L] holds the steps' labels at those tokens. The sample ends with the end-of-turn token. Raises DataError
    if two labelled steps end in the same token.
    """
    tokens, begun, _ = chat.answer_marks([*without_prefill(prompt), answer_message(text)], ends)
    mask, blank = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
    mask[begun - 1] = True
    targets = blank.copy()
    if labels is not None:
        if mask.sum() < len(ends):
            raise DataError(f"two steps of {text[:40]!r} end in the same token. Use a longer step separator.")
        targets[begun - 1] = labels
    return Sample(tokens, mask, blank, blank, returns=targets)
