"""Stop strings: where a completion ends, and the text it then has.

A completion ends at the first token whose text completes a stop string. All its tokens are trained as they were
sampled, but its text, which verifiers and environments read, ends before the stop string. Whether a completion ends is
a function of its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from posttrain.types import Completion, ConfigError

Decode = Callable[[np.ndarray], str]
BROKEN = "\ufffd"  # the text of a character whose last bytes are missing
MARGIN = 8  # tokens decoded beyond those that can belong to a stop string, as the first ones may decode differently


def check_strings(strings: Sequence[str], special: Mapping[str, int], stop_ids: Sequence[int]) -> None:
    """Raises ConfigError for a stop string that no completion's text can contain, as it has a special token's text.

    `special` are the ids of the special tokens by their text. One that ends completions anyway is accepted by itself.
    """
    for string in strings:
        for token, number in special.items():
            if token in string and not (token == string and number in stop_ids):
                raise ConfigError(
                    f"rollout.stop={string!r} would never be found: {token!r} is a special token, which is not part of "
                    f"a completion's text. Set rollout.stop_token_ids = [{number}]."
                )


class StopStrings:
    """Finds the stop string that a completion's newest token completes."""

    def __init__(self, strings: Sequence[str], decode: Decode, silent: Sequence[int]) -> None:
        """`silent` are the ids of tokens that `decode` leaves out."""
        self.strings, self._decode, self._silent = tuple(strings), decode, np.array(silent, np.int64)
        self._window = max(len(string.encode()) for string in strings) + MARGIN  # a token has at least one byte

    def completed_by(self, tokens: np.ndarray) -> str:
        """The stop string that the last of the tokens [n] completes; empty if there is none."""
        if tokens[-1] in self._silent:
            return ""
        tail = tokens[~np.isin(tokens, self._silent)][-self._window :]
        text = self._decode(tail)
        if not any(string in text for string in self.strings):
            return ""
        before = self._decode(tail[:-1])
        found = [(first_new(text, before, string), -len(string), string) for string in self.strings]
        return min((one for one in found if one[0] >= 0), default=(0, 0, ""))[2]


def first_new(text: str, before: str, string: str) -> int:
    """Where `string` first occurs in a text other than entirely within its beginning `before`; −1 if nowhere."""
    return text.find(string, max(0, len(before.rstrip(BROKEN)) - len(string) + 1))


def completion_text(decode: Decode, completion: Completion) -> str:
    """The text of a completion, without the stop token or stop string that ended it and whatever follows that."""
    if completion.stop != "stop":
        return decode(completion.tokens)
    before = decode(completion.tokens[:-1])
    if not completion.stop_string:
        return before
    whole = decode(completion.tokens)
    at = first_new(whole, before, completion.stop_string)
    return whole if at < 0 else whole[:at]
