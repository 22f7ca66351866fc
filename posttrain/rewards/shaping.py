"""Length and repetition rewards."""

from __future__ import annotations

import math
import re

from posttrain.rewards.judging import number
from posttrain.types import RolloutError, Task, Verdict

# Single characters for scripts without spaces; long words are split, so that `aaaa…` counts as repetition.
_TOKEN = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\w{1,20}|[^\w\s]")


def cosine(share: float, short: float, long: float) -> float:
    """`long + ½ (short − long)(1 + cos(π · share))`: `short` at length 0, `long` at the limit, flat at both ends.

    `share` is the length divided by the limit, clamped to [0, 1]. Source: arXiv 2502.03373.
    """
    return long + 0.5 * (short - long) * (1 + math.cos(math.pi * min(1.0, max(0.0, share))))


def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """All n-grams of words and punctuation marks in a text, ignoring case; none if it is shorter than n."""
    words = _TOKEN.findall(text.casefold())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repeated_share(text: str, n: int) -> float:
    """The share of the text's n-grams that occurred before in it, `1 − distinct / all`; 0 with fewer than n words.

    The n-gram repetition penalty of arXiv 2502.03373 as one number for the whole text.
    """
    grams = n_grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repetition(task: Task, text: str) -> Verdict:
    """The share of the reply's n-grams that are new, thinking included: 1 without repetition; an empty reply scores 0.

    Columns: `n` 3 (words per n-gram) and `most` 0.2 (the maximum repeated share for a reply to pass).
    """
    n, most = number(task, "n", 3, "repetition"), number(task, "most", 0.2, "repetition")
    if n != int(n) or not 1 <= n <= 100:
        raise RolloutError(
            f"task {task.id!r} has n={n:g}, expected a whole number from 1 to 100 (words per n-gram).",
            boundary="reward",
        )
    share = repeated_share(text, int(n))
    nonempty = bool(text.strip())
    detail = f"{share:.0%} of the {int(n)}-grams are repeated"
    return Verdict(1 - share if nonempty else 0.0, nonempty and share <= most, detail)
