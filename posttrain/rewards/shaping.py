"""Rewards for a reply's form alone: how long it is, and how often it repeats itself."""

from __future__ import annotations

import math
import re

from posttrain.rewards.judging import number
from posttrain.types import RolloutError, Task, Verdict

# Single characters where a script writes no spaces; long words in pieces, so that `aaaa…` repeats itself.
_TOKEN = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\w{1,20}|[^\w\s]")


def cosine(share: float, short: float, long: float) -> float:
    """`long + ½ (short − long)(1 + cos(π · share))`: `short` at length 0, `long` at the limit, level at both ends.

    `share` is the length over its limit, in [0, 1]. Source: arXiv 2502.03373.
    """
    return long + 0.5 * (short - long) * (1 + math.cos(math.pi * min(1.0, max(0.0, share))))


def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of n words and signs of a text, whatever their case; none where it has fewer."""
    words = _TOKEN.findall(text.casefold())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repeated_share(text: str, n: int) -> float:
    """Of the text's n-grams of words and signs, the share that stood in it before; 0 with fewer than n words.

    `1 − distinct / all`, the n-gram repetition penalty of arXiv 2502.03373 as one number for the whole text.
    """
    grams = n_grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repetition(task: Task, text: str) -> Verdict:
    """The share of the reply's n-grams that are new, thoughts included: 1 where nothing is repeated; "" scores 0.

    Columns: `n` 3 (words in an n-gram) and `most` 0.2 (the repeated share up to which a reply passes).
    """
    n, most = number(task, "n", 3, "repetition"), number(task, "most", 0.2, "repetition")
    if n != int(n) or not 1 <= n <= 100:
        raise RolloutError(f"task {task.id!r} has n={n:g}; n-grams are of 1 to 100 words.", boundary="reward")
    share = repeated_share(text, int(n))
    said = bool(text.strip())
    return Verdict(
        1 - share if said else 0.0, said and share <= most, f"{share:.0%} of the {int(n)}-grams stood before"
    )
