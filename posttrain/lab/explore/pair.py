"""Data that the reward hacking explorer sends: the setup, each step of a pair of runs, and a run's final numbers."""

from __future__ import annotations

import threading
from typing import TypedDict

import torch

from posttrain.lab.explore import goodhart
from posttrain.lab.explore.goodhart import WORDS, Optimisation, Step, World
from posttrain.types import Json

SAMPLES = 4  # answers shown per step
LAST = 10  # final steps that are averaged
_making = threading.Lock()


def prepare(seed: int) -> World:
    """The world of a seed, computed once even for concurrent requests."""
    with _making:
        return goodhart.make_world(seed)


class ShownAnswer(TypedDict):
    """An answer with its score, its true reward and the parts of that which are not 0."""

    text: str
    proxy: float
    true: float
    parts: dict[str, float]


class StepNumbers(TypedDict):
    """Means over a step's answers; `words` has each word's occurrences per answer."""

    proxy: float
    true: float
    kl: float
    agreement: float | None
    words: list[float]
    samples: list[ShownAnswer]


class Exploited(TypedDict):
    """A word's mean occurrences per answer at the start and now, its weight, and the score gained."""

    word: str
    before: float
    now: float
    weight: float
    gained: float


def about(world: World) -> Json:
    """Data that is fixed for a run: the question, the rule, the reward model and its initial accuracy."""
    rule = [
        [f"for each of the facts {', '.join(goodhart.FACTS)}", goodhart.FACT],
        [f"for each wrong fact: {', '.join(goodhart.WRONG)}", goodhart.FALSE],
        [f"for being polite exactly once: {', '.join(goodhart.POLITE)}", goodhart.COURTESY],
        ["for each repetition of a word", goodhart.REPEAT],
        [f"for each word past {goodhart.SHORT}", goodhart.EXTRA],
    ]
    return {
        "question": goodhart.QUESTION,
        "rule": rule,
        "words": list(WORDS),
        "weights": [round(weight, 4) for weight in world.weights.tolist()],
        "agreement": world.agreement,
        "parameters": sum(numbers.numel() for numbers in world.start),
        "pairs": goodhart.PAIRS,
        "answers": goodhart.ANSWERS,
        "longest": goodhart.LONGEST,
        "repeat": goodhart.REPEAT,
    }


def told(step: Step) -> StepNumbers:
    """The numbers of one step, and its first answers with the parts of their true rewards."""
    parts = goodhart.points(step.answers)
    samples: list[ShownAnswer] = [
        {
            "text": goodhart.written(step.answers[i]),
            "proxy": round(float(step.proxy[i]), 3),
            "true": float(step.true[i]),
            "parts": {name: float(values[i]) for name, values in parts.items() if values[i] != 0},
        }
        for i in range(SAMPLES)
    ]
    return {
        "proxy": round(float(step.proxy.mean()), 4),
        "true": round(float(step.true.mean()), 4),
        "kl": round(float(step.distance.mean()), 4),
        "agreement": goodhart.agreement(step.proxy, step.true),
        "words": [round(count, 3) for count in goodhart.counts(step.answers).mean(0).tolist()],
        "samples": samples,
    }


def exploited(start: StepNumbers, now: StepNumbers, weights: torch.Tensor) -> Exploited:
    """The word whose changed use has raised the reward model's score most since the start."""
    more = torch.tensor(now["words"]) - torch.tensor(start["words"])
    gained = more * weights
    best = int(gained.argmax())
    return {
        "word": WORDS[best],
        "before": start["words"][best],
        "now": now["words"][best],
        "weight": round(float(weights[best]), 4),
        "gained": round(float(gained[best]), 4),
    }


class Pair:
    """Two runs from the same start and seed, without and with the penalty."""

    def __init__(self, world: World, beta: float, seed: int) -> None:
        self.world = world
        self._runs = {"off": Optimisation(world, 0.0, seed), "on": Optimisation(world, beta, seed)}
        self._first: dict[str, StepNumbers] = {}
        self._best: dict[str, list[float]] = {}
        self._count = 0

    def step(self) -> Json:
        """The next step of both runs; `best` is [step, value] of the highest true reward so far."""
        news: Json = {"kind": "step", "step": self._count}
        for name, run in self._runs.items():
            now = told(run.step())
            first = self._first.setdefault(name, now)
            best = self._best.setdefault(name, [0, now["true"]])
            if now["true"] > best[1]:
                best[:] = [self._count, now["true"]]
            news[name] = {**now, "best": list(best), "exploited": exploited(first, now, self.world.weights)}
        self._count += 1
        return news


def ending(world: World, beta: float, seed: int, steps: int, stop: threading.Event) -> Json:
    """Final numbers of a run of `steps` updates: means over its last LAST steps. Ends early once `stop` is set."""
    run = Optimisation(world, beta, seed)
    last: list[Step] = []
    for _ in range(steps + 1):
        if stop.is_set():
            break
        last = [*last[1 - LAST :], run.step()]
    proxy, true, distance = (torch.cat([getattr(s, name) for s in last]) for name in ("proxy", "true", "distance"))
    figures = {"proxy": proxy, "true": true, "kl": distance}
    return {"kind": "point", "beta": beta, **{name: round(float(v.mean()), 4) for name, v in figures.items()}}
