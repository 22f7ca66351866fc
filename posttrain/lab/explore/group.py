"""A group of answers to one problem, and their advantages.

The bundled model writes the answers; training's own verifier grades them and training's own estimators compare them.
An answer depends only on the problem, the seed and its index, so a larger group starts with the same answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypedDict

import numpy as np
import torch

from posttrain.data.chat import ChatFormat
from posttrain.lab import checkpoints
from posttrain.lab.explore.problems import task_of
from posttrain.lab.folders import Place
from posttrain.lab.tokens import pieces
from posttrain.models.load import Policy
from posttrain.objectives.advantages import flat_groups, group_relative, leave_one_out, max_rl
from posttrain.rewards.auto import verifier_for
from posttrain.rewards.scoring import score_safely
from posttrain.rewards.skills import CLOSE, OPEN
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.generator import Request, completion_seed
from posttrain.rollout.text import text_of
from posttrain.types import Completion, RolloutError, SamplingParams, Task, Verdict

PARAMS = SamplingParams(temperature=1.0, max_tokens=96)
SLOTS = 32
COMPARE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "grpo": lambda rewards: group_relative(rewards, "sample"),
    "dr-grpo": lambda rewards: group_relative(rewards, "none"),
    "rloo": leave_one_out,
    "maxrl": max_rl,
}
"""Variant → function from rewards (1, G) to advantages (1, G)."""


class AnswerPage(TypedDict):
    """An answer for the page: its thought and final text, its reward, and the verifier's reason."""

    thought: str
    said: str
    reward: float
    passed: bool
    why: str
    length: int
    cut: bool
    tokens: list[str]


class GroupPage(TypedDict):
    """A group for the page."""

    question: str
    wanted: Any
    right: int
    answers: list[AnswerPage]


class Comparison(TypedDict):
    """The advantages of a group's rewards, step by step: an answer's is (reward − baseline) / divisor.

    `others` are the watched answer's advantages with the same reward if all other rewards were 0, and if all were 1.
    """

    flat: bool
    mean: float
    std: float
    divisor: float
    baselines: list[float]
    differences: list[float]
    advantages: list[float]
    others: list[float]


@dataclass(frozen=True)
class Answer:
    """One graded answer of a group."""

    completion: Completion
    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Group:
    """G answers to one task, and the prompt tokens [n] they continue."""

    task: Task
    prompt: np.ndarray
    answers: tuple[Answer, ...]

    @property
    def right(self) -> int:
        """Number of answers that pass the verifier."""
        return sum(answer.verdict.passed for answer in self.answers)


class Writer:
    """The bundled model as used by the explorer. `lock` is held while it samples or a copy of it is trained."""

    def __init__(self, place: Place) -> None:
        self.policy: Policy = checkpoints.open_model(place, checkpoints.SHIPPED).policy
        self.lock = threading.Lock()

    @cached_property
    def _engine(self) -> EmbeddedGenerator:
        return EmbeddedGenerator(self.policy, SLOTS)

    @lru_cache(maxsize=128)  # noqa: B019 - there is a single writer, which lives as long as the lab
    def group(self, problem: str, seed: int, size: int, purpose: str = "group") -> Group:
        """Samples `size` answers to a problem at temperature 1; equal arguments always give the same group."""
        task = task_of(problem)
        prompt = ChatFormat(self.policy.tokenizer).prompt_tokens(task.messages)
        with self.lock:
            return write(self._engine, task, prompt, seed, size, purpose)


@lru_cache(maxsize=1)
def open_writer(place: Place) -> Writer:
    """This lab's writer; the first call takes seconds."""
    return Writer(place)


def write(
    engine: EmbeddedGenerator, task: Task, prompt: np.ndarray, seed: int, size: int, purpose: str = "group"
) -> Group:
    """Samples and grades `size` answers with an engine's weights."""
    seeds = tuple(completion_seed(seed, purpose, 0, task.id, i) for i in range(size))
    (completions,) = engine.generate([Request(prompt, seeds)], PARAMS)
    answers: list[Answer] = []
    for completion in completions:
        text = text_of(engine.policy, completion)
        verdict, error = score_safely(verifier_for(task), task, text)
        if verdict is None:
            raise RolloutError(f"grading an answer to {task.prompt!r} failed: {error}", boundary="reward")
        answers.append(Answer(completion, text, verdict))
    return Group(task, prompt, tuple(answers))


def describe(group: Group) -> GroupPage:
    """A group for the page."""
    return {
        "question": group.task.prompt,
        "wanted": group.task.answer,
        "right": group.right,
        "answers": [_describe(answer) for answer in group.answers],
    }


def _describe(answer: Answer) -> AnswerPage:
    thought, closed, said = answer.text.rpartition(CLOSE)
    verdict, completion = answer.verdict, answer.completion
    return {
        "thought": thought.removeprefix(OPEN) if closed else "",
        "said": said.strip(),
        "reward": verdict.score,
        "passed": verdict.passed,
        "why": verdict.detail,
        "length": len(completion.tokens),
        "cut": completion.stop == "length",
        "tokens": pieces(checkpoints.FOLDER / "tokenizer.json", completion.tokens),
    }


def compare(rewards: Sequence[float], how: str, watched: int) -> Comparison:
    """The advantages of one group's rewards, and those of the watched answer in other groups."""
    row = torch.tensor([rewards], dtype=torch.float64)
    advantages = COMPARE[how](row)
    difference = leave_one_out(row) if how == "rloo" else group_relative(row, "none")
    return {
        "flat": bool(flat_groups(row)),
        "mean": float(row.mean()),
        "std": float(row.std(correction=1)),
        "divisor": {"grpo": float(row.std(correction=1)), "maxrl": float(row.mean())}.get(how, 1.0),
        "baselines": (row - difference)[0].tolist(),
        "differences": difference[0].tolist(),
        "advantages": advantages[0].tolist(),
        "others": [_beside(row, how, watched, companions) for companions in (0.0, 1.0)],
    }


def _beside(row: torch.Tensor, how: str, watched: int, companions: float) -> float:
    group = torch.full_like(row, companions)
    group[0, watched] = row[0, watched]
    return float(COMPARE[how](group)[0, watched])
