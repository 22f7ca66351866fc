"""Prompt lengths in tokens, without tokenizing text that is certainly too long."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.data.chat import ChatFormat
from posttrain.types import Message

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
