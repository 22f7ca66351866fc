"""Held-out evaluation: accuracy, pass@k and maj@k, each with a 95 % interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from posttrain import rng
from posttrain.config import EvalConfig
from posttrain.data.answers import final_answer
from posttrain.data.thoughts import has_thought
from posttrain.evaluation.intervals import Estimate, wilson
from posttrain.rollout.collector import Collector, by_source, episode_rows, part_stats
from posttrain.store.run import EpisodeRow
from posttrain.types import Episode, Json, Task

RESAMPLES = 2000


@dataclass(frozen=True)
class Report:
    """Result of evaluating `tasks` tasks with `samples` completions each. Tasks are the random unit of intervals."""

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
    parts: dict[str, float] = field(default_factory=lambda: {})  # mean of each part of the verdicts
    sources: dict[str, Report] = field(default_factory=lambda: {})  # of each source of a mixture
    notes: list[str] = field(default_factory=lambda: [])  # on tasks that were left out
    generated: Estimate | None = None  # tokens per task of a search, sampled by the model
    scored: Estimate | None = None  # and read by its scorer

    def metrics(self) -> dict[str, float]:
        """Flat `eval/…` metrics for the run store."""
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
        if self.generated and self.scored:
            out |= {"eval/search_generated": self.generated.value, "eval/search_scored": self.scored.value}
        for name, part in self.sources.items():
            out |= {f"eval/accuracy/{name}": part.accuracy.value, f"eval/reward/{name}": part.reward}
        return out | {f"eval/part/{name}": mean for name, mean in self.parts.items()}

    def as_dict(self) -> Json:
        """A JSON-serialisable dict; tokens only of a search."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of per-task values with a 95 % percentile bootstrap interval over tasks (2,000 seeded resamples).

    If all values are 0 or all are 1, every resample is the same and the interval would have zero width; then the
    interval is Wilson's for that many yes/no results.
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
    """Bootstrap indices (RESAMPLES, count); cached because one report uses the same ones many times."""
    return (rng.uniforms(rng.key("bootstrap", seed), RESAMPLES * count) * count).astype(int).reshape(RESAMPLES, count)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased pass@k, given `correct` of n completions (Chen et al., arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ n and 0 ≤ correct ≤ n; got k={k}, n={n}, correct={correct}.")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[str], passed: Sequence[bool]) -> bool:
    """Whether the most common answer is right; ties go to the answer that came first."""
    top = Counter(answers).most_common(1)[0][0]  # insertion order breaks ties
    return passed[answers.index(top)]


def evaluate(
    collector: Collector, tasks: Sequence[Task], samples: int, step: int, purpose: str = "eval"
) -> tuple[Report, list[list[Episode]]]:
    """Samples `samples` completions for each task and summarises them."""
    groups = collector.groups(tasks, samples, step, purpose)
    sources = {name: summarise(part, samples) for name, part in by_source(groups, tasks).items()}
    return replace(summarise(groups, samples), sources=sources), groups


@dataclass(frozen=True)
class Evaluator:
    """Evaluation on a fixed held-out set, with the same tasks and seeds on every call."""

    collector: Collector
    tasks: Sequence[Task]
    cfg: EvalConfig

    def __call__(self, step: int, weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], list[EpisodeRow]]:
        """`eval/…` metrics of these weights, and the episodes, stamped with `step`."""
        self.collector.generator.load(weights, version=step)
        collector = replace(self.collector, params=replace(self.collector.params, temperature=self.cfg.temperature))
        report, groups = evaluate(collector, self.tasks, self.cfg.samples, 0)
        return report.metrics(), episode_rows("eval", step, groups, self.tasks)


def summarise(groups: Sequence[Sequence[Episode]], samples: int, vote: Callable[[str], str] = final_answer) -> Report:
    """Report over one or more episodes. Tasks with an unscored completion are left out of pass@k and maj@k.

    `vote` maps a completion to what counts as its answer in maj@k.
    """
    episodes = [e for group in groups for e in group]
    rewards = [e.reward for e in episodes if e.reward is not None]
    scored = [e for e in episodes if e.reward is not None]
    whole = [g for g in groups if all(e.reward is not None for e in g)]
    sizes = [k for k in (1, 2, 4, 8, 16, 32, 64) if 1 < k <= samples]
    answers = [([vote(e.text).strip() for e in g], [e.passed for e in g]) for g in whole]
    return Report(
        accuracy=wilson(sum(e.passed for e in scored), len(scored))
        if samples == 1
        else bootstrap([float(np.mean([e.passed for e in g])) for g in whole]),
        reward=float(np.mean(rewards)) if rewards else math.nan,
        think_share=float(np.mean([has_thought(e.text) for e in episodes])),
        length=float(np.mean([e.length for e in episodes])),
        truncated=float(np.mean([e.stop == "length" for e in episodes])),
        unscored=len(episodes) - len(scored),
        tasks=len(groups),
        samples=samples,
        pass_at={k: bootstrap([pass_at_k(samples, sum(p), k) for _, p in answers]) for k in sizes},
        maj_at={k: bootstrap([float(majority(a[:k], p[:k])) for a, p in answers]) for k in sizes},
        parts={name: stat.value for name, stat in part_stats(episodes).items()},
    )
