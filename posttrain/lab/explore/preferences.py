"""The preference explorer: a reward model that trains anew at every comparison, and what it has learned by then.

What was said of the seed's pairs, in their order, is one text of 1 (left), 2 (right) and 0 (tie) that lives in the
page's address. Every answer is a function of it: nothing is kept here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.evaluation.intervals import Z95, Estimate, wilson
from posttrain.lab.explore.people import FEATURES, PEOPLE, lengths, order, pairs, prefers, says, unseen
from posttrain.lab.folders import Place
from posttrain.lab.routing import get
from posttrain.types import ConfigError

AT_ONCE = 30
"""Labels that somebody else gives at a time."""
SHOWN = 6
"""Unseen pairs that the page shows."""


def routes(place: Place) -> list[BaseRoute]:
    """What the explorer adds to the lab."""
    return [
        get("/api/explore/preferences", lambda request: learned(**_asked(request))),
        get("/api/explore/preferences/pairs", lambda request: to_label(_asked(request)["seed"])),
        get("/api/explore/preferences/say", lambda request: {"labels": say(**_asked(request))}),
    ]


def to_label(seed: int) -> list[dict[str, Any]]:
    """The pairs in the order they are labelled. Opening the page also loads what trains, before the first key."""
    from posttrain.lab.explore import reward_model

    reward_model.fit(seed, "1")
    found = pairs()
    return [{"prompt": found[i].prompt, "left": found[i].answers[0], "right": found[i].answers[1]} for i in order(seed)]


def say(seed: int, labels: str, who: str) -> str:
    """The labels with up to `AT_ONCE` more, which one of `PEOPLE` gives."""
    rest = order(seed)[len(labels) : len(labels) + AT_ONCE]
    return labels + "".join(str(says(who, seed, number)) for number in rest)


def learned(seed: int, labels: str, who: str = "") -> dict[str, Any]:
    """What the model learned from the labels, and how well it foretells them and somebody of known taste.

    `before` is the agreement of each label with what the model, trained on those before it, foretold. `held_out` is
    that of the unseen pairs with what `who` prefers there, and `curve` how it grew from label to label.
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
    """How often the model had foretold the next label, ties and pairs that it scored alike left out."""
    from posttrain.lab.explore.reward_model import fit, scores

    right = told = 0
    for n, said in enumerate(labels):
        left, other = scores(fit(seed, labels[:n])[0], [order(seed)[n]])[0]
        if said != "0" and left != other:
            told += 1
            right += (left > other) == (said == "1")
    return wilson(int(right), told)


def agreement(weights: np.ndarray, who: str) -> Estimate:
    """How often the higher-scored answer of an unseen pair is the one that somebody prefers, where they prefer one."""
    from posttrain.lab.explore.reward_model import scores

    wanted = [prefers(who, pairs()[number]) for number in unseen()]
    got = scores(weights, unseen())
    told = [
        (score[0] > score[1], want == 1, score[0] != score[1]) for score, want in zip(got, wanted, strict=True) if want
    ]
    return wilson(sum(bool(left == first and apart) for left, first, apart in told), len(told))


def longer_won(seed: int, labels: str) -> Estimate:
    """How often the longer answer was preferred, ties and answers of equal length left out."""
    size = lengths()[list(order(seed)[: len(labels)])]
    told = [
        (one > other, said == "1")
        for (one, other), said in zip(size, labels, strict=True)
        if said != "0" and one != other
    ]
    return wilson(sum(bool(longer == left) for longer, left in told), len(told))


def correlation(one: np.ndarray, other: np.ndarray) -> dict[str, float] | None:
    """Pearson's r of N > 3 values with Fisher's 95 % interval; None where one does not vary."""
    if one.std() == 0 or other.std() == 0:
        return None
    r = float(np.clip(np.corrcoef(one, other)[0, 1], -1, 1))
    centre, half = math.atanh(np.clip(r, -0.999999, 0.999999)), Z95 / math.sqrt(len(one) - 3)
    return {"value": r, "low": math.tanh(centre - half), "high": math.tanh(centre + half), "n": len(one)}


def _shown(number: int, score: Sequence[float], who: str) -> dict[str, Any]:
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


def _asked(request: Request) -> dict[str, Any]:
    """seed, labels and who of an address. Raises ConfigError for what they cannot be."""
    given = request.query_params
    seed, labels, who = given.get("seed", "0"), given.get("labels", ""), given.get("who", "")
    if not (seed.isascii() and seed.isdigit() and len(seed) < 10):
        raise ConfigError(f"seed={seed!r}, expected a whole number from 0 on.")
    most = len(pairs()) - len(unseen())
    if set(labels) - set("120") or len(labels) > most:
        raise ConfigError(f"labels={labels[:40]!r}, expected at most {most} of 1, 2 and 0.")
    if who and who not in PEOPLE:
        raise ConfigError(f"who={who!r} is nobody here; choose one of {', '.join(PEOPLE)}.")
    return {"seed": int(seed), "labels": labels, "who": who}
