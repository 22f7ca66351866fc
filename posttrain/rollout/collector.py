"""From tasks to scored groups of episodes, and from episodes to training samples."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import torch

from posttrain.rewards.functions import score_all, score_safely
from posttrain.rollout.generator import Generator, Request, attempt_seed
from posttrain.rollout.multi_turn import Attempt, Player
from posttrain.rollout.prefetch import Threads
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

Verifier = Callable[[Task, str], Verdict]
Judged = tuple[str, Verdict | None, str | None]  # an answer's text, and its verdict or why there is none
LOOK_UP = 0.2  # seconds between two calls of `Collector.check` while the last answers are judged


def wanted() -> None:
    """Nobody abandons what is being collected."""


@dataclass(frozen=True)
class Collector:
    """Everything that turns a task into scored attempts, but the tasks."""

    generator: Generator
    encode: Callable[[Task], np.ndarray]  # prompt token ids
    decode: Callable[[np.ndarray], str]  # completion token ids, stop token left out
    verify: Verifier
    params: SamplingParams
    seed: int
    workers: int = 0  # threads that judge answers while others are being written; 0 judges all of them afterwards
    check: Callable[[], None] = wanted  # called now and then; ends the collection by raising
    player: Player | None = None  # plays episodes of several turns in place of asking once

    def groups(self, tasks: Sequence[Task], attempts: int, step: int, purpose: str = "train") -> list[list[Episode]]:
        """`attempts` episodes for each task. An attempt that cannot be scored has reward None and says why.

        With `workers` an answer is judged the moment it ends, unless the verifier wants all of them together.
        """
        seen: Counter[str] = Counter()
        seeds: list[tuple[int, ...]] = []
        for task in tasks:
            first = seen[task.id] * attempts  # a task that is asked twice is answered anew
            numbers = range(first, first + attempts)
            seeds.append(tuple(attempt_seed(self.seed, purpose, step, task.id, i) for i in numbers))
            seen[task.id] += 1
        if self.player is not None:
            return self._play(self.player, tasks, seeds)
        prompts = [self.encode(task) for task in tasks]
        requests = [Request(prompt, own) for prompt, own in zip(prompts, seeds, strict=True)]
        start = time.monotonic()
        with Threads(0 if hasattr(self.verify, "score_all") else self.workers) as threads:
            futures: dict[tuple[int, int], Future[Judged]] = {}

            def ended(g: int, i: int, completion: Completion) -> None:
                self.check()
                if threads.count:
                    futures[g, i] = threads.submit(partial(self._judge, tasks[g], completion))

            completions = self.generator.generate(requests, self.params, on_done=ended)
            seconds = (time.monotonic() - start) / max(1, len(tasks) * attempts)
            while wait(futures.values(), timeout=LOOK_UP).not_done:
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

    def _play(self, player: Player, tasks: Sequence[Task], seeds: Sequence[tuple[int, ...]]) -> list[list[Episode]]:
        pairs = enumerate(zip(tasks, seeds, strict=True))
        attempts = [Attempt(task, g, i, seed) for g, (task, own) in pairs for i, seed in enumerate(own)]
        episodes = iter(player.play(self.generator, self.params, attempts, self.check))
        return [list(islice(episodes, len(own))) for own in seeds]

    def _text(self, completion: Completion) -> str:
        return self.decode(completion.tokens[:-1] if completion.stop == "stop" else completion.tokens)

    def _judge(self, task: Task, completion: Completion) -> Judged:
        text = self._text(completion)
        return (text, *score_safely(self.verify, task, text))

    def _judge_rest(
        self,
        tasks: Sequence[Task],
        completions: Sequence[Sequence[Completion]],
        judged: dict[tuple[int, int], Judged],
    ) -> dict[tuple[int, int], Judged]:
        """`judged` with the answers that are not in it, or have no verdict: a reward may need the caller's thread."""
        texts = {
            (g, i): judged[g, i][0] if (g, i) in judged else self._text(c)
            for g, group in enumerate(completions)
            for i, c in enumerate(group)
            if (g, i) not in judged or judged[g, i][1] is None
        }
        verdicts = score_all(self.verify, [(tasks[g], text) for (g, _), text in texts.items()])
        return judged | {at: (text, *verdict) for (at, text), verdict in zip(texts.items(), verdicts, strict=True)}


def check_failures(groups: Sequence[Sequence[Episode]], limit: float) -> None:
    """Raises RolloutError when more than `limit` of the attempts, and more than one, could not be scored."""
    episodes = [e for group in groups for e in group]
    failed = [e for e in episodes if e.reward is None]
    if len(failed) > max(1, limit * len(episodes)):
        raise RolloutError(
            f"{len(failed)} of {len(episodes)} attempts could not be scored (allowed: {limit:.0%}); the first: "
            f"{failed[0].error} Fix the reward; the run resumes from its last checkpoint.",
            boundary="reward",
        )


def rewards_tensor(groups: Sequence[Sequence[Episode]]) -> torch.Tensor:
    """(P, G) float32; NaN where an attempt could not be scored."""
    return torch.tensor([[np.nan if e.reward is None else e.reward for e in group] for group in groups])


def to_sample(episode: Episode, advantage: float) -> Sample:
    """The training row of an episode of one stretch. One that could not be scored trains nothing."""
    (sample,) = to_samples(episode, advantage)
    return sample


def to_samples(episode: Episode, advantage: float) -> list[Sample]:
    """The same for any episode: a row for each stretch in which tokens were read after all those before them."""
    samples: list[Sample] = []
    for spans in episode.segments:
        part = replace(episode, spans=spans, cuts=())
        mask = part.loss_mask & (episode.reward is not None)
        advantages = np.where(mask, np.float32(advantage), np.float32(0))
        samples.append(Sample(part.tokens, mask, np.where(mask, part.behaviour_logp, 0).astype(np.float32), advantages))
    return samples


def turns_of(episode: Episode) -> list[np.ndarray]:
    """For each row of `to_samples` the turn [L] that each of its tokens belongs to; 0 where the model did not write."""
    turn, out = -1, []
    for spans in episode.segments:
        row: list[np.ndarray] = []
        for span in spans:
            turn += span.by == "model"
            row.append(np.full(len(span.tokens), turn if span.by == "model" else 0))
        out.append(np.concatenate(row))
    return out


def turn_returns(groups: Sequence[Sequence[Episode]]) -> torch.Tensor:
    """(P, G, K) float32: what each attempt earned from its turn k on; NaN after its last turn and where unscored."""
    turns = max(1, max((len(e.turn_rewards) for group in groups for e in group), default=1))
    out = torch.full((len(groups), max(map(len, groups)), turns), torch.nan)
    for g, group in enumerate(groups):
        for i, e in enumerate(group):
            if e.reward is not None:
                earned = torch.tensor(e.turn_rewards or (e.reward,))
                out[g, i, : len(earned)] = earned.flip(0).cumsum(0).flip(0)
    return out


def with_logp(
    samples: Sequence[Sample], field: str, logprobs: Callable[[Sequence[Sample]], list[np.ndarray]]
) -> list[Sample]:
    """Samples with `field` (`old_logp` or `ref_logp`) filled in by a no-grad pass."""
    return [replace(s, **{field: row}) for s, row in zip(samples, logprobs(samples), strict=True)]


def episode_stats(groups: Sequence[Sequence[Episode]], flat: int) -> dict[str, Stat]:
    """What a step's episodes looked like; `flat` groups had equal rewards."""
    episodes = [e for group in groups for e in group]
    scored = [e for e in episodes if e.reward is not None]
    count = len(scored)
    stats = {
        "reward": Stat(sum(e.reward for e in scored if e.reward is not None), count),
        "accuracy": Stat(sum(e.passed for e in scored), count),
        "think_share": Stat(sum("<think>" in e.text for e in episodes), len(episodes)),
        "length": Stat(sum(e.length for e in episodes), len(episodes)),
        "truncated": Stat(sum(e.stop == "length" for e in episodes), len(episodes)),
        "flat_groups": Stat(flat, len(groups)),
        "unscored": Stat(len(episodes) - count, 1, "sum"),
    }
    if any(e.turn_rewards for e in episodes):
        stats["turns"] = Stat(sum(e.turns for e in episodes), len(episodes))
    return stats | {f"part/{name}": stat for name, stat in part_stats(episodes).items()}


def part_stats(episodes: Sequence[Episode]) -> dict[str, Stat]:
    """For each part of a verdict its mean over the scored episodes that have it as a finite number."""
    return add_stats(
        [
            {name: Stat(float(v)) for name, v in e.parts.items() if _is_finite(v)}
            for e in episodes
            if e.reward is not None
        ]
    )


def _is_finite(value: object) -> bool:
    """A world of the user's own may have put anything among its parts."""
    return isinstance(value, int | float) and math.isfinite(value)


def episode_rows(
    kind: Literal["train", "eval"],
    step: int,
    groups: Sequence[Sequence[Episode]],
    tasks: Sequence[Task],
    advantages: torch.Tensor | None = None,
) -> list[EpisodeRow]:
    """Groups as the store keeps them; advantages (P, G)."""
    return [
        EpisodeRow.of(kind, step, e, task.prompt, None if advantages is None else float(advantages[e.group, e.index]))
        for task, group in zip(tasks, groups, strict=True)
        for e in group
    ]


def timings(
    groups: Sequence[Sequence[Episode]], start: float, sampled: float, hidden: float | None = None
) -> dict[str, float]:
    """Seconds and tokens per second of a step that began at `start` and had its answers at `sampled`.

    `hidden` are the seconds that went into its answers before the step began.
    """
    now, tokens = time.monotonic(), sum(e.length for g in groups for e in g)
    rollout = sampled - start + (hidden or 0.0)
    return {
        "seconds": now - start,
        "seconds_rollout": rollout,
        "tokens_per_second": tokens / (now - start),
        "rollout_tokens_per_second": tokens / rollout,
    } | ({} if hidden is None else {"seconds_hidden": hidden})
