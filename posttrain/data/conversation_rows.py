"""Converts conversations and texts into training samples with loss masks for supervised fine-tuning."""

from __future__ import annotations

from collections import Counter
from typing import Protocol, runtime_checkable

import numpy as np

from posttrain.data.chat import ChatFormat, Row
from posttrain.data.conversations import Conversation, Source
from posttrain.data.messages import is_trained
from posttrain.data.shown import require_tools_shown, unread_fields, unread_notes
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
    """Samples for a source's rows; notes on rows truncated, dropped or split by turn are added to `notes`.

    Raises DataError naming a row in which no token would be trained. Otherwise a batch could have all its labels
    masked and report a loss of 0.
    """
    samples: list[Sample] = []
    lengths: list[int] = []
    split = turns = 0
    unread: Counter[str] = Counter()
    for where, row in source.rows:
        try:
            parts = trained_rows(row, chat, cfg.train_on)
            unread.update(unread_fields(row, chat) if not isinstance(row, str) else ())
        except (DataError, TemplateError) as error:
            raise type(error)(f"{where}: {error}") from None
        split, turns = split + (len(parts) > 1), turns + len(parts) * (len(parts) > 1)
        for tokens, mask in parts:
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
    if split:
        notes.append(
            f"{source.name}: {split} of {len(source.rows)} {kind}conversations became {turns} rows, one for each "
            "assistant turn, because the chat template rewrites earlier turns."
        )
    notes += unread_notes(source.name, unread, kind)
    return samples


def trained_rows(row: Conversation, chat: ChatFormat, train_on: str) -> list[Row]:
    """Ids [L] int32 of a conversation or text and masks [L] of the tokens that `train_on` selects, never the first one.

    `assistant` selects all assistant turns, `completion` the last one, and `all` everything; for a text, all three
    select everything. An assistant turn with `weight: 0` is never trained. It is one row, or one for each turn if the
    chat template rewrites earlier turns.
    """
    if isinstance(row, str):
        return [chat.text_tokens(row)]
    turns = [k for k, message in enumerate(row) if is_trained(message)]
    rows = chat.rows(row, turns[-1:] if train_on == "completion" else None)
    require_tools_shown(row, chat)
    return _everything(row, rows, chat) if train_on == "all" else rows


def trained_tokens(row: Conversation, chat: ChatFormat, train_on: str) -> Row:
    """The only row of `trained_rows`. Raises TemplateError if there are several."""
    rows = trained_rows(row, chat, train_on)
    if len(rows) > 1:
        raise TemplateError("the chat template rewrites earlier turns, so each turn needs a row of its own.")
    return rows[0]


def _everything(messages: tuple[Message, ...], rows: list[Row], chat: ChatFormat) -> list[Row]:
    """The rows with masks on all tokens but the first, and but those that an earlier row trains, or whose assistant
    turn has `weight: 0`."""
    ignored = [k for k, m in enumerate(messages) if m.role == "assistant" and not is_trained(m)]
    if ignored and len(rows) > 1:
        raise TemplateError(
            'the row has turns with weight 0, which train_on = "all" cannot leave out, because the chat template '
            'rewrites earlier turns. Use train_on = "assistant".'
        )
    out: list[Row] = []
    before = np.zeros(0, np.int32)
    for tokens, _ in rows:
        shared = min(len(before), len(tokens))
        differs = np.flatnonzero(before[:shared] != tokens[:shared])
        start = int(differs[0]) if len(differs) else shared
        out.append((tokens, np.arange(len(tokens)) >= max(1, start)))
        before = tokens
    for k in ignored:
        (_, reply) = chat.rows(messages, [k])[0]
        out[0][1][np.flatnonzero(reply)] = False
    return out
