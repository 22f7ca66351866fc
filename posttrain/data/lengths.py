"""Prompt lengths in tokens, without tokenizing text that is certainly too long, and the limit on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from posttrain.config import DataConfig
from posttrain.data.chat import ChatFormat
from posttrain.types import DataError, Message


class _Named(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_Named)
"""An item with a prompt: a task, a pair or a judgement."""

COMPOSED = 4
"""Characters that a tokenizer's normalizer may combine into one, at most (Unicode's NFC combines up to four)."""


def prompt_lengths(prompts: Sequence[Sequence[Message]], chat: ChatFormat, limit: int) -> list[int]:
    """Tokens of each prompt, or, for a text that cannot fit in `limit` tokens, a lower bound above the limit.

    No token stands for more characters than the longest one has, so a text has at least its characters divided by that
    many tokens. A text whose bound is over the limit is not tokenized, which could take minutes.
    """
    longest = COMPOSED * chat.longest_token
    bounds = [sum(len(message.content) for message in prompt) // longest if longest else 0 for prompt in prompts]
    return [
        bound if bound > limit else len(chat.prompt_tokens(prompt))
        for prompt, bound in zip(prompts, bounds, strict=True)
    ]


def fitting(
    items: Sequence[Item],
    prompt: Callable[[Item], Sequence[Message]],
    kind: str,
    chat: ChatFormat,
    cfg: DataConfig,
    notes: list[str],
) -> list[tuple[Item, int]]:
    """The items whose prompt has at most `data.max_prompt_tokens` tokens, and its length.

    Raises DataError if there are longer ones and `data.overlong` is "refuse", or if no item is left; otherwise they are
    dropped and counted in `notes`. `kind` is what the items are for: training or evaluation.
    """
    limit = cfg.max_prompt_tokens
    lengths = list(zip(items, prompt_lengths([prompt(item) for item in items], chat, limit), strict=True))
    kept = [(item, n) for item, n in lengths if n <= limit]
    if len(kept) < len(items):
        longest, n = max(lengths, key=lambda pair: pair[1])
        count = len(items) - len(kept)
        if cfg.overlong == "refuse":
            raise DataError(
                f"{count} {kind} prompts are longer than data.max_prompt_tokens={limit} (longest: {n} tokens or more, "
                f'{longest.id}). Raise it, or set data.overlong = "drop".'
            )
        if not kept:
            raise DataError(f"no {kind} prompt fits data.max_prompt_tokens={limit}. Raise it.")
        notes.append(f"{count} {kind} prompts over {limit} tokens were dropped.")
    return kept
