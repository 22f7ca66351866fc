"""From demonstrations, texts or conversations, to the rows that imitating them trains on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.data.chat import ChatFormat
from posttrain.types import DataError, Message, Sample


def demonstration_rows(
    found: Sequence[tuple[str, str | tuple[Message, ...]]], chat: ChatFormat, longest: int
) -> tuple[list[Sample], int]:
    """Samples of (where, text or messages) whose loss mask is what the assistant wrote (all of a text), and how many
    rows were cut at `longest` tokens.

    Raises DataError, naming the row, where nothing would be trained.
    """
    rows: list[Sample] = []
    cut = 0
    for where, shown in found:
        tokens, mask = chat.text_tokens(shown) if isinstance(shown, str) else chat.conversation_tokens(shown)
        if not mask[1:longest].any():
            raise DataError(f"{where}: no token of this row would be trained within the first {longest}.")
        cut += len(tokens) > longest
        blank = np.zeros(min(len(tokens), longest), np.float32)
        rows.append(Sample(tokens[:longest], mask[:longest], blank, blank))
    return rows, cut
