"""Converts demonstrations (texts or conversations) into training samples for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.data.chat import ChatFormat
from posttrain.types import DataError, Message, Sample


def demonstration_rows(
    found: Sequence[tuple[str, str | tuple[Message, ...]]], chat: ChatFormat, longest: int
) -> tuple[list[Sample], int]:
    """Samples of (where, text or messages), and the number of rows truncated at `longest` tokens.

    The loss mask covers the assistant's tokens, or all tokens of a text. Raises DataError naming a row in which no
    token would be trained.
    """
    rows: list[Sample] = []
    cut = 0
    for where, shown in found:
        for tokens, mask in [chat.text_tokens(shown)] if isinstance(shown, str) else chat.rows(shown):
            if not mask[1:longest].any():
                raise DataError(f"{where}: no token would be trained within the first {longest} tokens of this row.")
            cut += len(tokens) > longest
            blank = np.zeros(min(len(tokens), longest), np.float32)
            rows.append(Sample(tokens[:longest], mask[:longest], blank, blank))
    return rows, cut
