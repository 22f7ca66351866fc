"""Decoding of completions to text, whole or streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from posttrain.data.thoughts import shown_text
from posttrain.models.load import Policy
from posttrain.rollout.stopping import completion_text
from posttrain.types import Completion


def text_of(policy: Policy, completion: Completion) -> str:
    """A completion's text without its stop token or stop string."""
    return completion_text(partial(shown_text, policy.tokenizer), completion)


class Stream:
    """Streams text as its tokens arrive, holding back incomplete characters and beginnings of stop strings."""

    def __init__(self, policy: Policy, write: Callable[[str], None], stop: Sequence[str] = ()) -> None:
        self.policy = policy
        self.write = write
        self.stop = stop
        self.tokens: list[int] = []
        self.written = ""

    def add(self, request: int, index: int, token: int) -> None:
        """`OnToken` callback for one request with one completion: writes the text that the token adds."""
        if token in self.policy.stop_ids:
            return
        self.tokens.append(token)
        text = shown_text(self.policy.tokenizer, self.tokens)
        if not text.endswith("\ufffd"):
            self.finish(text[: len(text) - self._held_back(text)])

    def finish(self, text: str) -> None:
        """Writes the part of the text that was not written yet, if it continues what was."""
        if text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text

    def _held_back(self, text: str) -> int:
        """Length of the end of the text that is a stop string with anything after it, or could become one."""
        held = [len(text) - at for stop in self.stop if (at := text.find(stop)) >= 0]
        begun = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max([*held, *begun], default=0)
