"""Core data types shared by all modules, and the six error classes.

Shapes: P tasks, G completions per task, L tokens in one episode, B rows, T padded length.
Index t refers to token t: `logp[t]` is the log-probability of token t given tokens < t, so t = 0 is never trained.
"""

# User input is checked at run time even where the annotation rules a type out.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant", "tool"]
StopReason = Literal["stop", "length"]
Author = Literal["prompt", "model", "env"]
Json = dict[str, Any]  # a JSON object
JsonView = Mapping[str, Any]  # a read-only JSON object


class PosttrainError(Exception):
    """Base class of the six errors. Messages say what failed, the value seen, what was expected and what to do."""

    exit_code = 1


class ConfigError(PosttrainError, ValueError):
    """An invalid recipe, flag or argument."""

    exit_code = 2


class DataError(PosttrainError, ValueError):
    """An unreadable or invalid row, file or dataset; the message starts with `file:line` where available."""

    exit_code = 3


class TemplateError(PosttrainError, ValueError):
    """A chat template or tokenizer that would corrupt the model's input."""

    exit_code = 4


class RolloutError(PosttrainError, RuntimeError):
    """A failure outside the policy during a rollout; `boundary` names the component."""

    exit_code = 5

    def __init__(self, message: str, boundary: str = "rollout") -> None:
        super().__init__(message)
        self.boundary = boundary


class TrainingDiverged(PosttrainError, RuntimeError):
    """Non-finite updates, or a run that no longer has a learning signal."""

    exit_code = 6


class ResumeError(PosttrainError, RuntimeError):
    """A run folder that cannot be resumed: locked, damaged, or not created by this run."""

    exit_code = 7


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `fields` are its other fields (posttrain/data/messages.py)."""

    role: Role
    content: str
    tool_calls: tuple[JsonView, ...] = ()
    fields: JsonView = field(default_factory=lambda: {}, hash=False, repr=False)

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant", "tool"):
            raise DataError(f"role {self.role!r} is not one of system, user, assistant, tool.")
        if not isinstance(self.content, str) and (kind := type(self.content).__name__.replace("NoneType", "null")):
            raise DataError(f"the content of the {self.role} message is {kind}, expected text.")


@dataclass(frozen=True)
class Task:
    """One task: a prompt and its gold answer. `meta` is passed to the reward."""

    id: str
    env: str
    messages: tuple[Message, ...]
    answer: Any
    meta: JsonView = field(default_factory=lambda: {})
    source: str = field(default="", compare=False)  # the part of a mixture, by which metrics are reported
    columns: JsonView = field(default_factory=lambda: {}, compare=False)  # of the row: its prompt and answer, unchanged

    def __post_init__(self) -> None:
        if not self.messages or not any(m.role == "user" for m in self.messages):
            raise DataError(f"task {self.id!r} has no user message, so there is nothing to answer.")

    @property
    def prompt(self) -> str:
        """The content of the last user message."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")


@dataclass(frozen=True)
class Preference:
    """A preference pair: two completions of one prompt.

    `label` is the probability that `chosen` is better: 1 is certain, 0.5 a tie. `margin` is how much better it is.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    label: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise DataError(f"preference {self.id!r} has no prompt.")
        for name in ("chosen", "rejected"):
            if not getattr(self, name).strip():
                raise DataError(f"preference {self.id!r}: the {name} answer is empty. Remove the row.")
        if self.chosen == self.rejected:
            raise DataError(f"preference {self.id!r}: chosen and rejected are the same text, so it teaches nothing.")
        if not 0 <= self.label <= 1:
            raise DataError(f"preference {self.id!r}: label={self.label} is not a probability.")
        if not math.isfinite(self.margin):
            raise DataError(f"preference {self.id!r}: margin={self.margin} is not a finite number.")


@dataclass(frozen=True)
class Judgement:
    """Unpaired feedback: one completion and whether it is desirable (thumbs up or down)."""

    id: str
    prompt: tuple[Message, ...]
    answer: str
    desirable: bool

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer.strip():
            raise DataError(f"judgement {self.id!r} has no prompt or an empty answer. Remove the row.")


@dataclass(frozen=True)
class Solution:
    """A solution split into steps, each with the probability that it leads to a correct result (1 good, 0 wrong)."""

    id: str
    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    labels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.steps or not all(step.strip() for step in self.steps):
            raise DataError(f"solution {self.id!r} has no prompt, no steps or an empty step. Remove the row.")
        if len(self.steps) != len(self.labels):
            raise DataError(f"solution {self.id!r} has {len(self.steps)} steps but {len(self.labels)} labels.")
        if not all(0 <= label <= 1 for label in self.labels):
            raise DataError(f"solution {self.id!r}: labels {self.labels} are not all in [0, 1].")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. `top_k = 0` and `top_p = 1` disable truncation; `temperature = 0` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()  # strings at which a completion ends, besides the policy's stop tokens

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature={self.temperature} is not a finite number ≥ 0. Use 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1].")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} is negative; 0 keeps every token.")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} leaves no room for a completion. Use 1 or more.")


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    `tokens` [K] includes the stop token when `stop == "stop"`. `logprobs` [K] are log-probabilities under the full
    softmax at the sampling temperature (which a learner can reproduce); `kept_logmass` [K] is the log of the
    probability mass kept by top-k/top-p, so a token was drawn with log-probability `logprobs - kept_logmass`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    kept_logmass: np.ndarray
    stop: StopReason
    version: int = 0
    stop_string: str = ""  # the stop string that the last token completes, if one ended the completion

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.logprobs) == len(self.kept_logmass) >= 1:
            raise RolloutError(
                f"completion has {len(self.tokens)} tokens, {len(self.logprobs)} log-probabilities and "
                f"{len(self.kept_logmass)} kept_logmass values; the numbers must be equal and at least 1.",
                boundary="generator",
            )


@dataclass(frozen=True)
class Span:
    """Consecutive tokens by one author. `logprobs` [n] are set if and only if the model generated the tokens."""

    by: Author
    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    version: int = 0

    def __post_init__(self) -> None:
        if (self.logprobs is not None) != (self.by == "model"):
            raise RolloutError(f"a span by {self.by!r} must {'' if self.by == 'model' else 'not '}have logprobs.")
        if self.logprobs is not None and len(self.logprobs) != len(self.tokens):
            raise RolloutError(f"span has {len(self.tokens)} tokens but {len(self.logprobs)} log-probabilities.")


@dataclass(frozen=True)
class Verdict:
    """The result of a verifier. A wrong completion gets a score; one that cannot be scored raises an exception."""

    score: float
    passed: bool
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=lambda: {})

    def __post_init__(self) -> None:
        if isinstance(self.score, bool) or not isinstance(self.score, int | float) or not math.isfinite(self.score):
            raise RolloutError(f"verdict score is {self.score!r}, expected a finite number.", boundary="reward")


@dataclass(frozen=True)
class Episode:
    """One rollout of a task. `reward is None` means it could not be scored (see `error`), not that it was wrong.

    In a multi-turn episode each model span is one turn, and `turn_rewards` has one reward per turn. `cuts` are the
    indices of spans at which an edited history restarts: the model's context from there does not include earlier spans.
    """

    task_id: str
    group: int
    index: int
    spans: tuple[Span, ...]
    text: str
    reward: float | None
    passed: bool = False
    parts: Mapping[str, float] = field(default_factory=lambda: {})
    stop: StopReason = "stop"
    error: str | None = None
    seconds: float = 0.0
    turn_rewards: tuple[float, ...] = ()
    cuts: tuple[int, ...] = ()

    @property
    def turns(self) -> int:
        """Number of model replies."""
        return sum(s.by == "model" for s in self.spans)

    @property
    def segments(self) -> tuple[tuple[Span, ...], ...]:
        """The spans, split at `cuts`: within a segment, each token has all earlier ones as context."""
        ends = [0, *self.cuts, len(self.spans)]
        return tuple(self.spans[a:b] for a, b in pairwise(ends))

    @property
    def tokens(self) -> np.ndarray:
        """All token ids [L], prompt included, segments concatenated."""
        return np.concatenate([s.tokens for s in self.spans])

    @property
    def loss_mask(self) -> np.ndarray:
        """True [L] where the model generated the token."""
        return np.concatenate([np.full(len(s.tokens), s.by == "model") for s in self.spans])

    @property
    def behaviour_logp(self) -> np.ndarray:
        """The sampler's log-probabilities [L], 0 for other tokens."""
        parts = [s.logprobs if s.logprobs is not None else np.zeros(len(s.tokens), np.float32) for s in self.spans]
        return np.concatenate(parts).astype(np.float32)

    @property
    def length(self) -> int:
        """Number of tokens generated by the model."""
        return sum(len(s.tokens) for s in self.spans if s.by == "model")


@dataclass(frozen=True)
class Sample:
    """One training row [L]. Token weights are computed later, over the whole optimizer batch."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    behaviour_logp: np.ndarray
    advantages: np.ndarray
    old_logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None
    old_values: np.ndarray | None = None
    returns: np.ndarray | None = None  # targets of a value or step head
    label: float = 1.0  # pairs: probability that this row is better; judgements: 1 desirable, 0 not
    margin: float = 0.0

    def __post_init__(self) -> None:
        for name in ("loss_mask", "behaviour_logp", "advantages", "old_logp", "ref_logp", "old_values", "returns"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.tokens):
                raise DataError(f"sample.{name} has {len(value)} entries for {len(self.tokens)} tokens.")
        if len(self.loss_mask) and self.loss_mask[0]:
            raise DataError("sample.loss_mask[0] is set, but the first token has no context to predict it from.")


@dataclass(frozen=True)
class Batch:
    """Padded rows for one forward pass. `weights > 0` is the loss mask; weighted losses are summed, never averaged."""

    tokens: torch.Tensor  # (B, T) int64
    real: torch.Tensor  # (B, T) bool, False on right padding
    weights: torch.Tensor  # (B, T) float32
    behaviour_logp: torch.Tensor  # (B, T) float32
    advantages: torch.Tensor  # (B, T) float32
    old_logp: torch.Tensor | None = None  # (B, T) float32
    ref_logp: torch.Tensor | None = None  # (B, T) float32
    old_values: torch.Tensor | None = None  # (B, T) float32
    returns: torch.Tensor | None = None  # (B, T) float32
    labels: torch.Tensor | None = None  # (B,) float32
    margins: torch.Tensor | None = None  # (B,) float32
    shared: tuple[tuple[int, int], ...] = ()  # runs of (rows, length of their shared prefix); empty: no sharing
    rows: tuple[int, ...] = ()  # indices of these rows in the optimizer batch

    @property
    def mask(self) -> torch.Tensor:
        """(B, T) bool: trained tokens."""
        return self.weights > 0

    @property
    def row_weights(self) -> torch.Tensor:
        """(B,) float32: row weights for sequence-level losses; 0 for rows without trained tokens."""
        return self.weights.amax(1)


@dataclass(frozen=True)
class Stat:
    """A metric that can be accumulated exactly (no means of means). `kind` is mean, sum, max or min."""

    total: float
    count: float = 1.0
    kind: Literal["mean", "sum", "max", "min"] = "mean"

    @classmethod
    def over(cls, values: torch.Tensor, mask: torch.Tensor | None = None) -> Stat:
        """The mean of a tensor, or of its entries in a mask of the same shape; masked-out entries are ignored."""
        if mask is None:
            return cls(values.sum().item(), values.numel())
        return cls(values.where(mask, 0).sum().item(), int(mask.sum()))

    def __add__(self, other: Stat) -> Stat:
        if self.kind != other.kind:
            raise ValueError(f"cannot add a {self.kind} to a {other.kind}.")
        if self.kind in ("max", "min"):
            extreme = np.maximum if self.kind == "max" else np.minimum  # both keep NaN, unlike Python's
            return Stat(float(extreme(self.total, other.total)), self.count + other.count, self.kind)
        return Stat(self.total + other.total, self.count + other.count, self.kind)

    @property
    def value(self) -> float:
        """The aggregated value; NaN for a mean over nothing."""
        if self.kind != "mean":
            return self.total
        return self.total / self.count if self.count else math.nan


def add_stats(rows: Sequence[Mapping[str, Stat]]) -> dict[str, Stat]:
    """Adds stats key by key."""
    out: dict[str, Stat] = {}
    for row in rows:
        for name, stat in row.items():
            out[name] = out[name] + stat if name in out else stat
    return out


def stat_values(rows: Sequence[Mapping[str, Stat]]) -> dict[str, float]:
    """Adds stats key by key and returns their values: the metrics of a step."""
    return {name: stat.value for name, stat in add_stats(rows).items()}
