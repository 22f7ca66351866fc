"""Converts conversations and texts into training samples with loss masks for supervised fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from posttrain.data.chat import ChatFormat
from posttrain.data.conversations import Conversation, Source
from posttrain.types import DataError, Message, Sample, TemplateError


@runtime_checkable
class RowSettings(Protocol):
    """The settings that determine which tokens of a row are trained (config/sft.py)."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def overlong(self) -> str: ...
    @property
    def train_on(self) -> str: ...


def training_rows(source: Source, chat: ChatFormat, cfg: RowSettings, notes: list[str], kind: str = "") -> list[Sample]:
    """Samples for a source's rows; notes on rows truncated or dropped at `max_tokens` are added to `notes`.

    Raises DataError naming a row in which no token would be trained. Otherwise a batch could have all its labels
    masked and report a loss of 0.
    """
    samples: list[Sample] = []
    lengths: list[int] = []
    for where, row in source.rows:
        try:
            tokens, mask = trained_tokens(row, chat, cfg.train_on)
        except (DataError, TemplateError) as error:
            raise type(error)(f"{where}: {error}") from None
        lengths.append(len(tokens))
        if len(tokens) > cfg.max_tokens and cfg.overlong == "drop":
            continue
        if not mask[1 : cfg.max_tokens].any():
            late = f"none of the first {cfg.max_tokens} tokens would be trained. Raise algo.max_tokens, or set "
            why = late + 'algo.overlong = "drop"' if mask[1:].any() else "no token of this row would be trained"
            raise DataError(f"{where}: {why}.")
        tokens, mask = tokens[: cfg.max_tokens], mask[: cfg.max_tokens]
        blank = np.zeros(len(tokens), np.float32)
        samples.append(Sample(tokens, mask, blank, blank + 1))
    if over := sum(length > cfg.max_tokens for length in lengths):
        lost, done = sum(lengths) - sum(len(s.tokens) for s in samples), "cut" if cfg.overlong == "cut" else "dropped"
        notes.append(
            f"{source.name}: {over} of {len(lengths)} {kind}rows were over algo.max_tokens={cfg.max_tokens} "
            f"and {done}, losing {lost} of {sum(lengths)} tokens."
        )
    return samples


def trained_tokens(row: Conversation, chat: ChatFormat, train_on: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids [L] int32 of a row and a mask [L] of the tokens that `train_on` selects, never the first token.

    `assistant` selects all assistant turns, `completion` the last one, and `all` everything; for a text, all three
    select everything.
    """
    if isinstance(row, str):
        return chat.text_tokens(row)
    tokens, mask = chat.conversation_tokens(row)
    require_tools_shown(row, tokens, chat)
    if train_on == "all":
        return tokens, np.arange(len(tokens)) > 0
    turns = [i for i, message in enumerate(row) if message.role == "assistant"]
    if train_on == "completion" and len(turns) > 1:
        # The conversation up to the last turn but one is a prefix of the whole, so its mask marks the earlier turns.
        _, earlier = chat.conversation_tokens(row[: turns[-2] + 1])
        mask[np.flatnonzero(earlier)] = False
    return tokens, mask


def require_tools_shown(row: tuple[Message, ...], tokens: np.ndarray, chat: ChatFormat) -> None:
    """Raises TemplateError if the chat template omits which tools were called, or what they returned."""
    uncalled = tuple(replace(m, tool_calls=()) for m in row)
    answered = tuple(replace(m, content=m.content + ".") if m.role == "tool" else m for m in row)
    for other, what in ((uncalled, "the assistant's tool_calls"), (answered, "what a tool returned")):
        if other == row:
            continue
        try:
            same = np.array_equal(chat.conversation_tokens(other)[0], tokens)
        except TemplateError:
            continue  # the template rejects the changed messages, so it reads them
        if same:
            raise TemplateError(
                f"the chat template does not support tools: it omits {what}, so the model would be trained without "
                "them. Use a tokenizer whose template renders tool turns, or write them as text."
            )
