"""Preference explorer: a reward model that is retrained after every comparison, and what it has learned.

The labels of the seed's pairs, in order, are one string of 1 (left), 2 (right) and 0 (tie) in the page's URL. Every
response is a function of it; the server keeps no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.evaluation.intervals import Z95, Estimate, wilson
from posttrain.lab.explore.people import FEATURES, PEOPLE, lengths, order, pairs, prefers, says, unseen
from posttrain.lab.folders import Place
from posttrain.lab.routing import get
from posttrain.types import ConfigError, Json

AT_ONCE = 30
"""Labels that a simulated person gives at a time."""
SHOWN = 6
"""Number of unseen pairs shown on the page."""


def routes(place: Place) -> list[BaseRoute]:
    """The routes of the preference explorer."""
    return [
        get("/api/explore/preferences", lambda request: learned(**_asked(request))),
        get("/api/explore/preferences/pairs", lambda request: to_label(_asked(request)["seed"])),
        get("/api/explore/preferences/say", lambda request: {"labels": say(**_asked(request))}),
    ]


def to_label(seed: int) -> list[dict[str, str]]:
    """The pairs in labelling order. Also imports torch, so that the first key press is fast."""
    from posttrain.lab.explore import reward_model

    reward_model.fit(seed, "1")
    found = pairs()
    return [{"prompt": found[i].prompt, "left": found[i].answers[0], "right": found[i].answers[1]} for i in order(seed)]


def say(seed: int, labels: str, who: str) -> str:
    """The labels, extended by up to `AT_ONCE` labels from one of `PEOPLE`."""
    rest = order(seed)[len(labels) : len(labels) + AT_ONCE]
    return labels + "".join(str(says(who, seed, number)) for number in rest)


def learned(seed: int, labels: str, who: str = "") -> Json:
    """What the model learned from the labels, and how well it predicts them and a simulated person.

    `before` is how often the model, trained on the earlier labels, predicted each label. `held_out` is the agreement
    with the preferences of `who` on unseen pairs, and `curve` its growth from label to label.
    """
    from posttrain.lab.explore.reward_model import fit, scores

    weights, loss, seconds = fit(seed, labels)
    rest = scores(weights, unseen())
    shown = [_shown(number, score, who) for number, score in zip(unseen(), rest, strict=True)][:SHOWN]
    return {
        "labels": len(labels),
        "loss": loss if labels else None,
        "milliseconds": 1000 * seconds,
        "weights": [
            {"name": n, "about": about, "weight": float(w)} for (n, about), w in zip(FEATURES, weights, strict=True)
        ],
        "before": _share(foretold(seed, labels)),
        "held_out": _share(agreement(weights, who)) if who else None,
        "curve": [float(agreement(fit(seed, labels[:n])[0], who).value) for n in range(1, len(labels) + 1)]
        if who
        else [],
        "said": _share(longer_won(seed, labels)),
        "correlation": correlation(rest.ravel(), lengths()[list(unseen())].ravel()) if labels else None,
        "unseen": shown,
        "count": len(unseen()),
    }


def foretold(seed: int, labels: str) -> Estimate:
    """How often the model predicted the next label, without ties and pairs with equal scores."""
    from posttrain.lab.explore.reward_model import fit, scores

    right = told = 0
    for n, said in enumerate(labels):
        left, other = scores(fit(seed, labels[:n])[0], [order(seed)[n]])[0]
        if said != "0" and left != other:
            told += 1
            right += (left > other) == (said == "1")
    return wilson(int(right), told)


def agreement(weights: np.ndarray, who: str) -> Estimate:
    """How often the higher-scored answer of an unseen pair is the one that `who` prefers, without indifferent pairs."""
    from posttrain.lab.explore.reward_model import scores

    wanted = [prefers(who, pairs()[number]) for number in unseen()]
    got = scores(weights, unseen())
    told = [
        (score[0] > score[1], want == 1, score[0] != score[1]) for score, want in zip(got, wanted, strict=True) if want
    ]
    return wilson(sum(bool(left == first and apart) for left, first, apart in told), len(told))


def longer_won(seed: int, labels: str) -> Estimate:
    """How often the longer answer was preferred, without ties and answers of equal length."""
    size = lengths()[list(order(seed)[: len(labels)])]
    told = [
        (one > other, said == "1")
        for (one, other), said in zip(size, labels, strict=True)
        if said != "0" and one != other
    ]
    return wilson(sum(bool(longer == left) for longer, left in told), len(told))


def correlation(one: np.ndarray, other: np.ndarray) -> dict[str, float] | None:
    """Pearson's r of N > 3 values with Fisher's 95 % interval; None if either is constant."""
    if one.std() == 0 or other.std() == 0:
        return None
    r = float(np.clip(np.corrcoef(one, other)[0, 1], -1, 1))
    centre, half = math.atanh(np.clip(r, -0.999999, 0.999999)), Z95 / math.sqrt(len(one) - 3)
    return {"value": r, "low": math.tanh(centre - half), "high": math.tanh(centre + half), "n": len(one)}


def _shown(number: int, score: Sequence[float], who: str) -> Json:
    pair = pairs()[number]
    gap = max(-700.0, min(700.0, float(score[0] - score[1])))
    return {
        "prompt": pair.prompt,
        "answers": pair.answers,
        "scores": [float(x) for x in score],
        "probability": 1 / (1 + math.exp(-gap)),
        "wanted": prefers(who, pair) if who else None,
    }


def _share(estimate: Estimate) -> dict[str, float | int | None]:
    value = estimate.value if estimate.n else None
    return {"value": value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


class Asked(TypedDict):
    """The parameters in the URL."""

    seed: int
    labels: str
    who: str


def _asked(request: Request) -> Asked:
    """Parses the URL. Raises ConfigError for invalid values."""
    given = request.query_params
    seed, labels, who = given.get("seed", "0"), given.get("labels", ""), given.get("who", "")
    if not (seed.isascii() and seed.isdigit() and len(seed) < 10):
        raise ConfigError(f"seed={seed!r}, expected a whole number of at least 0.")
    most = len(pairs()) - len(unseen())
    if set(labels) - set("120") or len(labels) > most:
        raise ConfigError(f"labels={labels[:40]!r}, expected at most {most} characters, each 1, 2 or 0.")
    if who and who not in PEOPLE:
        raise ConfigError(f"who={who!r} is unknown; choose one of {', '.join(PEOPLE)}.")
    return {"seed": int(seed), "labels": labels, "who": who}
