"""Held-out evaluation: accuracy, pass@k and maj@k, each with a 95 % interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.evaluation.intervals import Estimate, wilson
from posttrain.rollout.collector import Collector, episode_rows, part_stats
from posttrain.store.run import EpisodeRow
from posttrain.types import Episode, Task

RESAMPLES = 2000


@dataclass(frozen=True)
class Report:
    """One evaluation of `tasks` tasks with `samples` answers each. Intervals treat tasks as the random unit."""

    accuracy: Estimate
    reward: float
    think_share: float
    length: float
    truncated: float
    unscored: int
    tasks: int
    samples: int
    pass_at: dict[int, Estimate]
    maj_at: dict[int, Estimate]
    parts: dict[str, float] = field(default_factory=lambda: {})  # means of the verdicts' parts

    def metrics(self) -> dict[str, float]:
        """Flat numbers for the store, named `eval/…`."""
        out = {
            "eval/accuracy": self.accuracy.value,
            "eval/accuracy_low": self.accuracy.low,
            "eval/accuracy_high": self.accuracy.high,
            "eval/reward": self.reward,
            "eval/think_share": self.think_share,
            "eval/length": self.length,
            "eval/truncated": self.truncated,
            "eval/unscored": float(self.unscored),
        }
        for name, table in (("pass", self.pass_at), ("maj", self.maj_at)):
            out |= {f"eval/{name}_at_{k}": estimate.value for k, estimate in table.items()}
        return out | {f"eval/part/{name}": mean for name, mean in self.parts.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of per-task values with a percentile bootstrap over tasks (2,000 resamples, a function of the seed).

    Where every value is 0, or every value 1, all resamples are equal and would claim certainty; then the interval is
    Wilson's for as many yes/no results.
    """
    data = np.asarray(values, float)
    if len(data) == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    if (data == 0).all() or (data == 1).all():
        return wilson(int(data.sum()), len(data))
    means = data[_resamples(len(data), seed)].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), len(data))


@lru_cache(maxsize=4)
def _resamples(count: int, seed: int) -> np.ndarray:
    """(RESAMPLES, count) indices; kept, because one report asks for the same ones many times."""
    return (rng.uniforms(rng.key("bootstrap", seed), RESAMPLES * count) * count).astype(int).reshape(RESAMPLES, count)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k answers is right, given `correct` of n (Chen et al., arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ n and 0 ≤ correct ≤ n; got k={k}, n={n}, correct={correct}.")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[str], passed: Sequence[bool]) -> bool:
    """Whether the most common answer is right; a tie goes to the answer given first."""
    top = Counter(answers).most_common(1)[0][0]  # insertion order breaks ties
    return passed[answers.index(top)]


def evaluate(
    collector: Collector,
    tasks: Sequence[Task],
    samples: int,
    step: int,
    final_answer: Callable[[str], str],
    purpose: str = "eval",
) -> tuple[Report, list[list[Episode]]]:
    """Samples `samples` answers to each task and summarises them."""
    groups = collector.groups(tasks, samples, step, purpose)
    return summarise(groups, samples, final_answer), groups


@dataclass(frozen=True)
class Examiner:
    """A fixed held-out examination, the same tasks and random numbers each time it is called."""

    collector: Collector
    tasks: Sequence[Task]
    samples: int
    temperature: float
    final_answer: Callable[[str], str]

    def __call__(
        self, step: int, weights: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, float], list[EpisodeRow]]:
        """Metrics named `eval/…` of these weights (None: of those at the start) and the episodes, stamped `step`."""
        if weights is not None:
            self.collector.generator.load(weights, version=step)
        collector = replace(self.collector, params=replace(self.collector.params, temperature=self.temperature))
        report, groups = evaluate(collector, self.tasks, self.samples, 0, self.final_answer)
        return report.metrics(), episode_rows("eval", step, groups, self.tasks)


def summarise(groups: Sequence[Sequence[Episode]], samples: int, final_answer: Callable[[str], str]) -> Report:
    """The report of one or more episodes. Tasks with an unscored answer are left out of pass@k and maj@k."""
    episodes = [e for group in groups for e in group]
    rewards = [e.reward for e in episodes if e.reward is not None]
    scored = [e for e in episodes if e.reward is not None]
    whole = [g for g in groups if all(e.reward is not None for e in g)]
    sizes = [k for k in (1, 2, 4, 8, 16, 32, 64) if 1 < k <= samples]
    answers = [([final_answer(e.text).strip() for e in g], [e.passed for e in g]) for g in whole]
    return Report(
        accuracy=wilson(sum(e.passed for e in scored), len(scored))
        if samples == 1
        else bootstrap([float(np.mean([e.passed for e in g])) for g in whole]),
        reward=float(np.mean(rewards)) if rewards else math.nan,
        think_share=float(np.mean(["<think>" in e.text for e in episodes])),
        length=float(np.mean([e.length for e in episodes])),
        truncated=float(np.mean([e.stop == "length" for e in episodes])),
        unscored=len(episodes) - len(scored),
        tasks=len(groups),
        samples=samples,
        pass_at={k: bootstrap([pass_at_k(samples, sum(p), k) for _, p in answers]) for k in sizes},
        maj_at={k: bootstrap([float(majority(a[:k], p[:k])) for a, p in answers]) for k in sizes},
        parts={name: stat.value for name, stat in part_stats(episodes).items()},
    )
