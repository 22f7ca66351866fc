"""Reward models as verifiers: the reward is the score of one or more trained models.

Messages and completion are re-rendered in each reward model's own chat format, so its tokenizer may differ from the
policy's; that format also terminates the completion, even if it was truncated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from posttrain.config import ModelConfig, RewardConfig
from posttrain.data.chat import ChatFormat
from posttrain.data.steps import split_steps, step_ends, step_row
from posttrain.models.heads import about, load_scorer
from posttrain.models.load import Policy
from posttrain.objectives.reward import aggregate_steps, ensemble
from posttrain.rewards.verifiers import Verifier
from posttrain.train.forward import sample_scores, sample_step_scores
from posttrain.types import ConfigError, RolloutError, Sample, Task, Verdict

PREFIX = "model:"
KINDS = {"reward": 0.0, "outcome": 0.5, "step": 0.5}
"""Kind of head → score above which a completion passes if the task has no gold answer."""


@dataclass(frozen=True)
class Member:
    """One trained model: scores (N, heads) of completions, or probabilities (N, 1) for step and outcome models."""

    policy: Policy
    chat: ChatFormat
    micro_batch_tokens: int

    @property
    def kind(self) -> str:
        return about(self.policy)["kind"]

    def scores(self, pairs: Sequence[tuple[Task, str]]) -> np.ndarray:
        """(N, heads) float64, in the order given. A step model gives a completion without steps probability 0."""
        head = about(self.policy)
        if self.kind == "step":
            found = self._step_logits(pairs)
            return np.array([[joined_steps(torch.from_numpy(logits), head["aggregate"])] for logits, _ in found])
        rows = [self._row(task, text, head) for task, text in pairs]
        scores = sample_scores(self.policy, rows, self.micro_batch_tokens).astype(np.float64)
        return scores if self.kind == "reward" else 1 / (1 + np.exp(-scores))

    def tokens(self, pairs: Sequence[tuple[Task, str]]) -> int:
        """Number of tokens of these texts' rows."""
        return sum(len(self._row(task, text, about(self.policy)).tokens) for task, text in pairs)

    def step_probabilities(self, pairs: Sequence[tuple[Task, str]]) -> list[tuple[np.ndarray, int]]:
        """For each text the probability [S] that each of its steps is correct, and the number of tokens read.

        Texts may be unfinished. Only for a step model.
        """
        return [(1 / (1 + np.exp(-logits.astype(np.float64))), tokens) for logits, tokens in self._step_logits(pairs)]

    def _step_logits(self, pairs: Sequence[tuple[Task, str]]) -> list[tuple[np.ndarray, int]]:
        """For each text the logits [S] of its steps, and the number of tokens read."""
        head = about(self.policy)
        rows = [self._row(task, text, head) for task, text in pairs]
        scores = sample_step_scores(self.policy, rows, self.micro_batch_tokens)
        return [(found[row.loss_mask], len(row.tokens)) for found, row in zip(scores, rows, strict=True)]

    def _row(self, task: Task, text: str, head: dict[str, str]) -> Sample:
        ends: list[int] = []
        if self.kind == "step":
            ends = step_ends(split_steps(text, head["separator"]), head["separator"])
        row = step_row(self.chat, task.messages, text, ends)
        context = getattr(self.policy.config, "max_position_embeddings", None)
        if context and len(row.tokens) > context:
            raise RolloutError(
                f"task {task.id!r} and its completion are {len(row.tokens)} tokens for the reward model "
                f"{self.policy.source}, whose context is {context} tokens. Lower rollout.max_tokens.",
                boundary="reward",
            )
        return row


def joined_steps(logits: torch.Tensor, how: str) -> float:
    """One probability from the logits (S,) of a completion's steps; 0 for a completion without steps."""
    probabilities = torch.sigmoid(logits.double()).unsqueeze(0)
    mask = torch.ones_like(probabilities, dtype=torch.bool)
    return float(aggregate_steps(probabilities, mask, how)) if len(logits) else 0.0


class RewardModel:
    """A verifier whose score is an ensemble of the reward models, over every head of every member.

    `parts` contain each head's score (`head_0`, …), their standard deviation (`uncertainty`, for two or more heads)
    and, if the task has a gold answer, whether `judge` passes the completion (`gold`). That also decides `passed`, so
    accuracy keeps its meaning while the model provides the reward. Without a gold answer, a score above `KINDS` passes.
    """

    def __init__(
        self,
        members: Sequence[Member],
        how: str = "mean",
        coef: float = 1.0,
        judge: Callable[[Task], Verifier] | None = None,
    ) -> None:
        kinds = {member.kind for member in members}
        if len(kinds) != 1:
            raise ConfigError(
                f"an ensemble needs reward models of the same kind; these are {', '.join(sorted(kinds))}."
            )
        (self.kind,) = kinds
        self.members, self.how, self.coef, self.judge = members, how, coef, judge

    def __call__(self, task: Task, text: str) -> Verdict:
        """The verdict on one completion; `score_all` is faster for many."""
        return self.score_all([(task, text)])[0]

    def scores(self, pairs: Sequence[tuple[Task, str]]) -> np.ndarray:
        """One score (N,) per completion."""
        return self._ensemble(self._heads(pairs))

    def score_all(self, pairs: Sequence[tuple[Task, str]]) -> list[Verdict]:
        """Verdicts in the order given. Raises RolloutError if a score is not finite or a row exceeds the context."""
        if not pairs:
            return []
        heads = self._heads(pairs)
        out: list[Verdict] = []
        for (task, text), row, score in zip(pairs, heads, self._ensemble(heads).tolist(), strict=True):
            if not math.isfinite(score):
                raise RolloutError(
                    f"the reward model's score for task {task.id!r} is {score}, expected a finite number.",
                    boundary="reward",
                )
            parts = {f"head_{k}": float(value) for k, value in enumerate(row)}
            if len(row) > 1:
                parts["uncertainty"] = float(row.std())
            passed = score > KINDS[self.kind]
            if self.judge is not None and task.answer not in (None, ""):
                passed = self.judge(task)(task, text).passed
                parts["gold"] = float(passed)
            out.append(Verdict(score, passed, "", parts))
        return out

    def tokens(self, pairs: Sequence[tuple[Task, str]]) -> int:
        """Number of tokens that all members read to score these texts, prompts included."""
        return sum(member.tokens(pairs) for member in self.members)

    def step_scores(self, pairs: Sequence[tuple[Task, str]]) -> list[tuple[np.ndarray, int]]:
        """For each text its steps' mean probabilities [S] over the members, and the tokens that all of them read."""
        found = [member.step_probabilities(pairs) for member in self.members]
        return [
            (np.mean([probabilities for probabilities, _ in one], axis=0), sum(tokens for _, tokens in one))
            for one in zip(*found, strict=True)
        ]

    def _heads(self, pairs: Sequence[tuple[Task, str]]) -> np.ndarray:
        return np.concatenate([member.scores(pairs) for member in self.members], axis=1)

    def _ensemble(self, heads: np.ndarray) -> np.ndarray:
        return ensemble(torch.from_numpy(heads.T), self.how, self.coef).numpy()


def load_reward_model(
    spec: str,
    cfg: RewardConfig,
    device: torch.device | str = "cpu",
    judge: Callable[[Task], Verifier] | None = None,
    micro_batch_tokens: int = 8192,
) -> RewardModel:
    """Loads the verifier `model:FOLDER`, or `model:A+B` for an ensemble of runs.

    A folder is a finished `posttrain reward` or `posttrain prm` run, or the model folder in it. Raises ConfigError for
    anything else.
    """
    members = [_member(folder, device, micro_batch_tokens) for folder in model_folders(spec)]
    return RewardModel(members, cfg.ensemble, cfg.uncertainty_coef, judge)


def model_folders(spec: str) -> list[Path]:
    """The folders with the weights of `model:A+B`. Raises ConfigError for a missing folder."""
    return [_model_folder(name) for name in spec.removeprefix(PREFIX).split("+")]


def _model_folder(name: str) -> Path:
    folder = Path(name)
    if not name or not folder.is_dir():
        raise ConfigError(f"reward model folder {name!r} does not exist. Write model:FOLDER, or model:A+B for several.")
    if (folder / "run.json").is_file():
        if not (folder / "model").is_dir():
            raise ConfigError(
                f"run {name} has no model yet because it has not finished. Continue it with `posttrain resume`."
            )
        folder = folder / "model"
    return folder


def _member(folder: Path, device: torch.device | str, micro_batch_tokens: int) -> Member:
    policy = load_scorer(ModelConfig(path=str(folder)), device)
    head = about(policy)
    if head.get("kind") not in KINDS:
        raise ConfigError(
            f"the scalar head of {folder} was not trained to score completions (a critic's head predicts returns). "
            "Give a `posttrain reward` or `posttrain prm` run."
        )
    policy.model.requires_grad_(False)
    day = date.fromisoformat(head["day"]) if "day" in head else None
    chat = ChatFormat(policy.tokenizer, cast(Any, head["format"]), json.loads(head.get("template_kwargs", "{}")), day)
    return Member(policy, chat, micro_batch_tokens)
