"""Answers cut into steps, and the token at which each step ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.data.chat import ChatFormat
from posttrain.types import DataError, Message, Sample


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of an answer; joined by the separator they are the answer again. A blank answer has none.

    Two separators with nothing between them part no step: both belong to the step before them, or at the very start
    to the one after.
    """
    steps: list[str] = []
    for part in text.split(separator):
        if steps and not (part.strip() and steps[-1].strip()):
            steps[-1] += separator + part
        else:
            steps.append(part)
    return steps if text.strip() else []


def step_ends(steps: Sequence[str], separator: str) -> list[int]:
    """Where the words of each step end, in characters of the joined answer; white space and separators come after."""
    ends: list[int] = []
    start = 0
    for step in steps:
        said = step
        while said != (shorter := said.removesuffix(separator).rstrip()):
            said = shorter
        ends.append(start + len(said))
        start += len(step) + len(separator)
    return ends


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
