"""Collects scored groups of episodes and converts episodes to training samples."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import Literal

import numpy as np
import torch

from posttrain.config import SamplingRecipe
from posttrain.data.mixing import task_order
from posttrain.data.thoughts import has_thought
from posttrain.rewards.judging import BatchVerifier, Verifier
from posttrain.rewards.scoring import score_groups, score_safely
from posttrain.rewards.workers import WorkerPool
from posttrain.rollout.generator import Generator, Request, completion_seed
from posttrain.rollout.multi_turn import MultiTurn, Trajectory
from posttrain.rollout.stopping import completion_text
from posttrain.store.run import EpisodeRow
from posttrain.types import (
    Completion,
    Episode,
    RolloutError,
    Sample,
    SamplingParams,
    Span,
    Stat,
    Task,
    Verdict,
    add_stats,
)

Judged = tuple[str, Verdict | None, str | None]  # completion text, and its verdict or the error
NO_TOKENS = np.zeros(0, np.int32)
POLL_SECONDS = 0.2  # between two calls of `Collector.check` while the last completions are scored


def never_cancelled() -> None:
    """The default `Collector.check`, which never cancels."""


def no_opening(task: Task) -> str:
    """The default `Collector.opening`: prompts end where the assistant's text begins."""
    return ""


@dataclass(frozen=True)
class Collector:
    """Samples and scores completions: generator, encoding, verifier and sampling parameters."""

    generator: Generator
    encode: Callable[[Task], np.ndarray]  # prompt token ids
    decode: Callable[[np.ndarray], str]  # text of completion token ids
    verify: Verifier
    params: SamplingParams
    seed: int
    workers: int = 0  # threads that score completions during sampling; 0 scores them afterwards
    check: Callable[[], None] = never_cancelled  # called periodically; raises to cancel
    multi_turn: MultiTurn | None = None  # rolls out in an environment instead of sampling one completion
    opening: Callable[[Task], str] = no_opening  # the part of the assistant's text that the prompt has already

    def groups(self, tasks: Sequence[Task], group_size: int, step: int, purpose: str = "train") -> list[list[Episode]]:
        """Samples `group_size` episodes per task. Unscored episodes have reward None and an error message.

        With `workers`, a completion is scored as soon as it ends, unless the verifier scores in batches.
        """
        seen: Counter[str] = Counter()
        seeds: list[tuple[int, ...]] = []
        for task in tasks:
            first = seen[task.id] * group_size  # a repeated task gets new completions
            numbers = range(first, first + group_size)
            seeds.append(tuple(completion_seed(self.seed, purpose, step, task.id, i) for i in numbers))
            seen[task.id] += 1
        if self.multi_turn is not None:
            return self._multi_turn(self.multi_turn, tasks, seeds)
        prompts = [self.encode(task) for task in tasks]
        requests = [Request(prompt, task_seeds) for prompt, task_seeds in zip(prompts, seeds, strict=True)]
        start = time.monotonic()
        with WorkerPool(0 if isinstance(self.verify, BatchVerifier) else self.workers) as threads:
            futures: dict[tuple[int, int], Future[Judged]] = {}

            def on_done(g: int, i: int, completion: Completion) -> None:
                self.check()
                if threads.count:
                    futures[g, i] = threads.submit(partial(self._judge, tasks[g], completion))

            completions = self.generator.generate(requests, self.params, on_done=on_done)
            seconds = (time.monotonic() - start) / max(1, len(tasks) * group_size)
            while wait(futures.values(), timeout=POLL_SECONDS).not_done:
                self.check()
        judged = self._judge_rest(tasks, completions, {at: future.result() for at, future in futures.items()})
        out: list[list[Episode]] = []
        for g, (task, prompt, group) in enumerate(zip(tasks, prompts, completions, strict=True)):
            episodes: list[Episode] = []
            for i, c in enumerate(group):
                text, verdict, error = judged[g, i]
                spans = (Span("prompt", prompt), Span("model", c.tokens, c.logprobs, c.version))
                scored = (verdict.score, verdict.passed, verdict.parts) if verdict else (None, False, {})
                episodes.append(Episode(task.id, g, i, spans, text, *scored, c.stop, error, seconds))
            out.append(episodes)
        return out

    def _multi_turn(
        self, rollout: MultiTurn, tasks: Sequence[Task], seeds: Sequence[tuple[int, ...]]
    ) -> list[list[Episode]]:
        pairs = enumerate(zip(tasks, seeds, strict=True))
        started = [Trajectory(task, g, i, seed) for g, (task, task_seeds) in pairs for i, seed in enumerate(task_seeds)]
        episodes = iter(rollout.run(self.generator, self.params, started, self.check))
        return [list(islice(episodes, len(task_seeds))) for task_seeds in seeds]

    def text(self, task: Task, completion: Completion, begun: np.ndarray = NO_TOKENS) -> str:
        """The assistant's whole text, as verifiers read it: what the prompt opened, tokens that were `begun`, and the
        completion without its stop token or stop string."""
        written = completion_text(lambda tokens: self.decode(np.concatenate([begun, tokens])), completion)
        return self.opening(task) + written

    def _judge(self, task: Task, completion: Completion) -> Judged:
        text = self.text(task, completion)
        return (text, *score_safely(self.verify, task, text))

    def _judge_rest(
        self,
        tasks: Sequence[Task],
        completions: Sequence[Sequence[Completion]],
        judged: dict[tuple[int, int], Judged],
    ) -> dict[tuple[int, int], Judged]:
        """Scores the completions without a verdict in this thread, which some rewards need; returns all verdicts."""
        texts = {
            (g, i): judged[g, i][0] if (g, i) in judged else self.text(tasks[g], c)
            for g, group in enumerate(completions)
            for i, c in enumerate(group)
            if (g, i) not in judged or judged[g, i][1] is None
        }
        groups = [
            [(tasks[g], text) for (_, _), text in run] for g, run in groupby(texts.items(), lambda one: one[0][0])
        ]
        verdicts = score_groups(self.verify, groups)
        return judged | {at: (text, *verdict) for (at, text), verdict in zip(texts.items(), verdicts, strict=True)}


def check_failures(groups: Sequence[Sequence[Episode]], limit: float) -> None:
    """Raises RolloutError if more than one episode and more than the share `limit` of them are unscored."""
    episodes = [e for group in groups for e in group]
    failed = [e for e in episodes if e.reward is None]
    if len(failed) > max(1, limit * len(episodes)):
        raise RolloutError(
            f"{len(failed)} of {len(episodes)} completions could not be scored (allowed: {limit:.0%}). First error: "
            f"{failed[0].error} Fix the reward; the run resumes from its last checkpoint.",
            boundary="reward",
        )


def rewards_tensor(groups: Sequence[Sequence[Episode]]) -> torch.Tensor:
    """Rewards (P, G) float32; NaN where unscored."""
    return torch.tensor([[np.nan if e.reward is None else e.reward for e in group] for group in groups])


def to_sample(episode: Episode, advantage: float) -> Sample:
    """The training row of an episode whose history was never edited. Unscored episodes have an empty loss mask."""
    (sample,) = to_samples(episode, advantage)
    return sample


def to_samples(episode: Episode, advantage: float) -> list[Sample]:
    """The training rows of an episode: one per segment between edits of its history."""
    samples: list[Sample] = []
    for spans in episode.segments:
        part = replace(episode, spans=spans, cuts=())
        mask = part.loss_mask & (episode.reward is not None)
        advantages = np.where(mask, np.float32(advantage), np.float32(0))
        samples.append(Sample(part.tokens, mask, np.where(mask, part.behaviour_logp, 0).astype(np.float32), advantages))
    return samples


def turns_of(episode: Episode) -> list[np.ndarray]:
    """For each row of `to_samples`, the turn [L] of each token; 0 for tokens not generated by the model."""
    turn, out = -1, []
    for spans in episode.segments:
        row: list[np.ndarray] = []
        for span in spans:
            turn += span.by == "model"
            row.append(np.full(len(span.tokens), turn if span.by == "model" else 0))
        out.append(np.concatenate(row))
    return out


def turn_returns(groups: Sequence[Sequence[Episode]]) -> torch.Tensor:
    """Return (P, G, K) float32 of each episode from turn k on; NaN after its last turn and where unscored."""
    turns = max(1, max((len(e.turn_rewards) for group in groups for e in group), default=1))
    out = torch.full((len(groups), max(map(len, groups)), turns), torch.nan)
    for g, group in enumerate(groups):
        for i, e in enumerate(group):
            if e.reward is not None:
                rewards = torch.tensor(e.turn_rewards or (e.reward,))
                out[g, i, : len(rewards)] = rewards.flip(0).cumsum(0).flip(0)
    return out


def with_logp(
    samples: Sequence[Sample], field: str, logprobs: Callable[[Sequence[Sample]], list[np.ndarray]]
) -> list[Sample]:
    """Fills in a per-token `field` (such as `old_logp` or `ref_logp`) with a no-grad pass."""
    return [replace(s, **{field: row}) for s, row in zip(samples, logprobs(samples), strict=True)]


def episode_stats(groups: Sequence[Sequence[Episode]], flat: int, tasks: Sequence[Task] = ()) -> dict[str, Stat]:
    """Metrics of a step's episodes; `flat` is the number of groups with equal rewards, `tasks` are the groups' tasks.

    Reward and accuracy are also given for each source of a mixture.
    """
    episodes = [e for group in groups for e in group]
    scored = [e for e in episodes if e.reward is not None]
    count = len(scored)
    stats = {
        "reward": Stat(sum(e.reward for e in scored if e.reward is not None), count),
        "accuracy": Stat(sum(e.passed for e in scored), count),
        "think_share": Stat(sum(has_thought(e.text) for e in episodes), len(episodes)),
        "length": Stat(sum(e.length for e in episodes), len(episodes)),
        "truncated": Stat(sum(e.stop == "length" for e in episodes), len(episodes)),
        "flat_groups": Stat(flat, len(groups)),
        "unscored": Stat(len(episodes) - count, 1, "sum"),
    }
    if any(e.turn_rewards for e in episodes):
        stats["turns"] = Stat(sum(e.turns for e in episodes), len(episodes))
    for name, part in by_source(groups, tasks).items():
        known = [(e.reward, e.passed) for group in part for e in group if e.reward is not None]
        stats[f"reward/{name}"] = Stat(sum(reward for reward, _ in known), len(known))
        stats[f"accuracy/{name}"] = Stat(sum(passed for _, passed in known), len(known))
    return stats | {f"part/{name}": stat for name, stat in part_stats(episodes).items()}


def by_source(groups: Sequence[Sequence[Episode]], tasks: Sequence[Task]) -> dict[str, list[Sequence[Episode]]]:
    """The groups of each source of a mixture; empty if no task has a source."""
    found: dict[str, list[Sequence[Episode]]] = {}
    for group, task in zip(groups, tasks, strict=False):
        if task.source:
            found.setdefault(task.source, []).append(group)
    return found


def part_stats(episodes: Sequence[Episode]) -> dict[str, Stat]:
    """Mean of each verdict part, over the scored episodes in which it is a finite number."""
    return add_stats(
        [
            {name: Stat(float(v)) for name, v in e.parts.items() if _is_finite(v)}
            for e in episodes
            if e.reward is not None
        ]
    )


def _is_finite(value: object) -> bool:
    """Checks a part's value, because user environments may return any type."""
    return isinstance(value, int | float) and math.isfinite(value)


def episode_rows(
    kind: Literal["train", "eval"],
    step: int,
    groups: Sequence[Sequence[Episode]],
    tasks: Sequence[Task],
    advantages: torch.Tensor | None = None,
) -> list[EpisodeRow]:
    """Converts groups to rows of the run store; advantages (P, G)."""
    return [
        EpisodeRow.of(kind, step, e, task.prompt, None if advantages is None else float(advantages[e.group, e.index]))
        for task, group in zip(tasks, groups, strict=True)
        for e in group
    ]


def sample_step(
    collector: Collector, tasks: Sequence[Task], recipe: SamplingRecipe, weights: Mapping[str, torch.Tensor], step: int
) -> tuple[list[Task], list[list[Episode]]]:
    """Samples one on-policy step: the next `algo.prompts` tasks in seeded order, with `algo.group_size` episodes each.

    Raises RolloutError if more than `reward.max_failure_rate` of the episodes could not be scored.
    """
    cfg = recipe.algo
    collector.generator.load(weights, version=step)
    draw = task_order(tasks, recipe.data, recipe.run.seed)
    chosen = [tasks[i] for i in draw(step * cfg.prompts, cfg.prompts)]
    groups = collector.groups(chosen, cfg.group_size, step)
    check_failures(groups, recipe.reward.max_failure_rate)
    return chosen, groups


def sampled_tokens(groups: Sequence[Sequence[Episode]]) -> int:
    """Number of tokens generated by the model."""
    return sum(e.length for group in groups for e in group)
