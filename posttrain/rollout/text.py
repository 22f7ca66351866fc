"""Decoding of completions to text, whole or streamed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from posttrain.models.load import Policy
from posttrain.types import Completion


def text_of(policy: Policy, completion: Completion) -> str:
    """A completion's text without its stop token."""
    tokens = completion.tokens[:-1] if completion.stop == "stop" else completion.tokens
    return policy.tokenizer.decode(tokens, skip_special_tokens=True)


class Stream:
    """Streams text as its tokens arrive, holding back incomplete characters."""

    def __init__(self, policy: Policy, write: Callable[[str], None]) -> None:
        self.policy = policy
        self.write = write
        self.tokens: list[int] = []
        self.written = ""

    def add(self, request: int, index: int, token: int) -> None:
        """`OnToken` callback for one request with one completion: writes the text that the token adds."""
        if token in self.policy.stop_ids:
            return
        self.tokens.append(token)
        text = self.policy.tokenizer.decode(np.array(self.tokens), skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text
