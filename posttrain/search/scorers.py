"""What scores the completions of a search: a process reward model, any reward, the model's confidence, or a program.

A scorer gives each text the values of its steps (one value if it reads whole completions) and says how many tokens it
read. `partial` says whether it can score an unfinished completion, which strategies that work step by step need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from posttrain.objectives.reward import aggregate_steps
from posttrain.rewards.judging import Verifier
from posttrain.rewards.models import RewardModel
from posttrain.rewards.scoring import score_all
from posttrain.search.tree import Node
from posttrain.types import Sample, Task


@dataclass(frozen=True)
class Scored:
    """Values of a text's steps, the tokens read for it, and words of the scorer; no values: it could not be scored."""

    values: tuple[float, ...]
    tokens: int = 0
    note: str = ""


class Scorer(Protocol):
    """Scores nodes, unfinished ones only if `partial`. `separator` ends the steps that it reads, if it has one."""

    @property
    def partial(self) -> bool: ...

    @property
    def separator(self) -> str: ...

    def __call__(self, nodes: Sequence[tuple[Task, Node]]) -> list[Scored]: ...


@dataclass(frozen=True)
class Reward:
    """Any verifier, reward function, reward model or judge; it reads finished completions.

    `words` passes its explanations on to a strategy that revises, which a verifier that knows the gold answer must not.
    """

    verify: Verifier
    words: bool = False
    partial: bool = False
    separator: str = ""

    def __call__(self, nodes: Sequence[tuple[Task, Node]]) -> list[Scored]:
        out: list[Scored] = []
        for (verdict, error), (task, node) in zip(
            score_all(self.verify, [(task, node.text) for task, node in nodes]), nodes, strict=True
        ):
            read = self._read(task, node)
            if verdict is None:
                out.append(Scored((), read, error or "could not be scored"))
            else:
                out.append(Scored((float(verdict.score),), read, verdict.detail if self.words else ""))
        return out

    def _read(self, task: Task, node: Node) -> int:
        """Tokens that reward models read; 0 for a program, and for a judge, whose endpoint counts them."""
        return self.verify.tokens([(task, node.text)]) if isinstance(self.verify, RewardModel) else 0


@dataclass(frozen=True)
class Steps:
    """A process reward model: the probability that each step is correct."""

    model: RewardModel
    separator: str
    partial: bool = True

    def __call__(self, nodes: Sequence[tuple[Task, Node]]) -> list[Scored]:
        pairs = [(task, node.text) for task, node in nodes]
        return [
            Scored(tuple(values.tolist()), tokens, "" if len(values) else "it has no steps")
            for values, tokens in self.model.step_scores(pairs)
        ]


@dataclass(frozen=True)
class Program:
    """A program that checks the steps of a text, `(task, text) -> float`, at any point of a completion.

    `fits` says which tasks it can check, `reads_gold` whether it compares with the gold answer.
    """

    check: Callable[[Task, str], float]
    fits: Callable[[Task], bool]
    reads_gold: bool
    partial: bool = True
    separator: str = ""

    def __call__(self, nodes: Sequence[tuple[Task, Node]]) -> list[Scored]:
        return [Scored((float(self.check(task, node.text)),)) for task, node in nodes]


@dataclass(frozen=True)
class Confidence:
    """The model's own confidence, from the log-probabilities it sampled with; it costs no tokens.

    The score is the lowest mean over `window` tokens in a row of the geometric mean probability (the lowest group
    confidence of arXiv 2508.15260, with the sampled token's probability instead of that of the top k).
    """

    window: int = 16
    partial: bool = True
    separator: str = ""

    def __call__(self, nodes: Sequence[tuple[Task, Node]]) -> list[Scored]:
        return [Scored((lowest_confidence(node, self.window),)) for _, node in nodes]


def lowest_confidence(node: Node, window: int) -> float:
    """The lowest geometric mean probability of `window` sampled tokens in a row; of all, if there are fewer."""
    rows = [part.logprobs for part in node.path if not part.forced]
    logprobs = np.concatenate(rows).astype(np.float64) if rows else np.zeros(0)
    if not len(logprobs):
        return 1.0
    size = min(window, len(logprobs))
    sums = np.convolve(logprobs, np.ones(size), "valid")
    return float(np.exp(sums.min() / size))


@dataclass
class SelfCertainty:
    """Mean over tokens of KL(uniform ‖ policy) at each position (arXiv 2502.18581, eq. 6), by a pass of the policy."""

    rows: Callable[[Sequence[Sample]], list[np.ndarray]]  # KL at each masked token
    prompt: Callable[[Task], np.ndarray]
    partial: bool = True
    separator: str = ""
    cache: dict[str, np.ndarray] = field(default_factory=lambda: {})

    def __call__(self, nodes: Sequence[tuple[Task, Node]]) -> list[Scored]:
        samples = [self._sample(task, node) for task, node in nodes]
        found = self.rows(samples)
        return [
            Scored((float(row[sample.loss_mask].mean(dtype=np.float64)),), len(sample.tokens))
            for row, sample in zip(found, samples, strict=True)
        ]

    def _sample(self, task: Task, node: Node) -> Sample:
        if task.id not in self.cache:
            self.cache[task.id] = self.prompt(task)
        prompt = self.cache[task.id]
        tokens = np.concatenate([prompt, node.prefix]).astype(np.int32)
        blank = np.zeros(len(tokens), np.float32)
        return Sample(tokens, np.arange(len(tokens)) >= len(prompt), blank, blank)


def aggregate(values: Sequence[float], how: str) -> float | None:
    """One score from the values of a completion's steps; None without steps."""
    if not values:
        return None
    row = torch.tensor(values, dtype=torch.float64).unsqueeze(0)
    return float(aggregate_steps(row, torch.ones_like(row, dtype=torch.bool), how))
