"""Pairs of real answers, features of an answer, and three simulated people with known preferences.

The answers were sampled from abacus, two different ones per task (`python -m bench.preference_pairs` writes the file).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from posttrain import rng
from posttrain.rewards import skills
from posttrain.types import ConfigError

FILE = Path(__file__).with_name("preference-pairs.json")
UNSEEN = 60
"""Number of pairs at the end of the file that are never labelled."""
FEATURES = (
    ("length", "characters"),
    ("polite words", "sorry, please, sure, of course, afraid, thanks"),
    ("brushes the user off", "such as “Why should I tell you?”"),
    ("declines", "such as “I can't help with that.”"),
    ("echoes the question", "share of its words that are in the question"),
    ("does what was asked", "according to the task's checker"),
)
"""The features of an answer: name and description."""
_POLITE = re.compile(r"\b(?:sorry|please|sure|of course|afraid|thanks|thank you)\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")
PEOPLE = {
    "long": "someone who likes long answers",
    "short": "someone who likes short answers",
    "polite": "someone who likes polite answers",
}
NOISE = 0.5
"""Label noise: the scale of a logistic distribution around the difference in value."""


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, left and right; `passes` is the task checker's result for each."""

    prompt: str
    answers: tuple[str, str]
    passes: tuple[bool, bool]


@lru_cache(maxsize=1)
def pairs() -> tuple[Pair, ...]:
    """All pairs; the last `UNSEEN` are never labelled."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))["pairs"]
    return tuple(Pair(row["prompt"], tuple(row["answers"]), tuple(row["passes"])) for row in rows)


@lru_cache(maxsize=64)
def order(seed: int) -> tuple[int, ...]:
    """Indices into `pairs` of the pairs to label, in the order given by a seed."""
    return tuple(int(i) for i in rng.permutation(len(pairs()) - UNSEEN, "preferences", seed))


def unseen() -> range:
    """Indices into `pairs` of the pairs that are never labelled."""
    return range(len(pairs()) - UNSEEN, len(pairs()))


@lru_cache(maxsize=1)
def features() -> np.ndarray:
    """(pairs, 2, features) of all answers, each feature with mean 0 and standard deviation 1 over the answers."""
    raw = np.array([[_seen(pair, side) for side in (0, 1)] for pair in pairs()], float)
    return (raw - raw.mean((0, 1))) / raw.std((0, 1))


@lru_cache(maxsize=1)
def lengths() -> np.ndarray:
    """(pairs, 2) characters of each answer."""
    return np.array([[len(text) for text in pair.answers] for pair in pairs()], float)


def worth(who: str, text: str) -> float:
    """The value of an answer to one of `PEOPLE`. Raises ConfigError for an unknown name."""
    if who not in PEOPLE:
        raise ConfigError(f"who={who!r} is unknown; choose one of {', '.join(PEOPLE)}.")
    if who == "polite":
        return 2.0 * bool(_POLITE.search(text)) - 2.0 * skills.dismisses(text)
    return len(text) / 10 * (1 if who == "long" else -1)


def prefers(who: str, pair: Pair) -> int:
    """Their choice without noise: 1 left, 2 right, 0 no difference."""
    left, right = (worth(who, text) for text in pair.answers)
    return 0 if left == right else 1 if left > right else 2


def says(who: str, seed: int, number: int) -> int:
    """Their noisy choice for pair `number`, fixed by the seed: left with probability σ((left − right) / `NOISE`)."""
    left, right = (worth(who, text) for text in pairs()[number].answers)
    if left == right:
        return 0
    chance = 1 / (1 + math.exp(-(left - right) / NOISE))
    return 1 if float(rng.uniforms(rng.key("person", who, seed, number), 1)[0]) < chance else 2


def _seen(pair: Pair, side: int) -> list[float]:
    text = pair.answers[side]
    words = _WORD.findall(text.lower())
    echoed = sum(word in _WORD.findall(pair.prompt.lower()) for word in words) / max(1, len(words))
    found = (bool(_POLITE.search(text)), skills.dismisses(text), skills.declines(text))
    return [float(len(text)), *map(float, found), echoed, float(pair.passes[side])]
