"""What an algorithm starts from (`Setup`), what it hands back (`Job`), and the step protocol (`Loop`).

An algorithm's `run` drives a `Loop`, which owns everything that is the same for all of them:

    saved = loop.restore(learner)                       # {} in a new run
    for step in loop.steps(total, evaluate, every):     # evaluates before step 0; ends after the last, or on a signal
        …sample…
        loop.sampled(tokens)                            # where completions are sampled
        …update…
        loop.end(learner, values, state={…})            # stores, evaluates, reports, checkpoints
    return loop.summary(learner)

A step is stored in one transaction, a checkpoint appears by one rename, and everything random is a function of the
seed and the step, so a run killed at any moment and resumed is bit-exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from posttrain.config import Recipe, RunConfig
from posttrain.data.chat import ChatFormat
from posttrain.models.load import Policy
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import EpisodeRow, Event, Run
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner
from posttrain.types import Task, TrainingDiverged

R = TypeVar("R", bound=Recipe, covariant=True)
Metrics = dict[str, float]
Summary = dict[str, Any]
Tensors = Mapping[str, Mapping[str, torch.Tensor]]

OnStep = Callable[[int, Metrics], None]
"""Called after each step with its number and every metric and timing."""
Evaluate = Callable[[int], tuple[Metrics, Sequence[EpisodeRow]]]
"""evaluate(step) → metrics `eval/…` of the weights after that step, and the episodes behind them."""
Reward = Callable[..., Any]


@dataclass(frozen=True)
class Setup(Generic[R]):
    """What every algorithm starts from: the resolved recipe, the model it names, and what was given from Python."""

    recipe: R
    policy: Policy
    chat: ChatFormat
    folder: Path  # of the run; does not exist yet when the run is new
    given: list[Task] | None = None
    reward: Reward | None = None


@dataclass(frozen=True)
class Job:
    """A run that is ready to start: a hash of its data, notes for the user, and the call that trains.

    `run` continues from the newest checkpoint if there is one. It returns the summary, or None when a signal stopped
    it (then it is saved and resumable). `policy` is exported when it has finished.
    """

    policy: Policy
    data_hash: str
    notes: list[str]
    run: Callable[[Loop], Summary | None]


@dataclass
class Loop:
    """The step protocol of one run: restore, clock, metrics, events, episodes, evaluation, checkpoint, stop."""

    store: Run
    cfg: RunConfig
    on_step: OnStep
    interrupt: Interrupt
    step: int = 0  # completed steps
    total: int = 0
    _every: int = 0
    _evaluate: Evaluate | None = None
    _started: float = 0.0
    _rollout: dict[str, float] = field(default_factory=dict[str, float])
    _rollout_tokens: int | None = None

    def restore(self, learner: Learner, check: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
        """Loads the newest checkpoint into the learner; the state that `end` was given, tensors beside it.

        The learner's own tensors are left out of "tensors". `check` sees the state first and may raise. Empty where the
        run has no checkpoint.
        """
        saved = checkpoint.latest(self.store.folder)
        if saved is None:
            return {}
        tensors, state = checkpoint.load(saved)
        if check is not None:
            check(state)
        learner.load(tensors, state["learner"])
        self.step = state["step"]
        return {**state, "tensors": {name: group for name, group in tensors.items() if name not in ("model", "optim")}}

    def steps(self, total: int, evaluate: Evaluate, every: int = 0) -> Iterator[int]:
        """The steps that are left, each as the number of those completed before it.

        `evaluate` is called before the first step, every `every` steps (0: not in between) and after the last.
        """
        self.total, self._every, self._evaluate = total, every, evaluate
        if self.step == 0:
            values, episodes = evaluate(0)
            self.store.write(0, values, {}, episodes)
            self.on_step(0, values)
        while self.step < total and not self.interrupt.requested:
            failpoint("step:start")
            self._started, self._rollout_tokens = time.monotonic(), None
            yield self.step

    def sampled(self, tokens: int, hidden: float | None = None) -> None:
        """Marks the end of sampling and scoring: `tokens` sampled, `hidden` seconds of it before the step began."""
        rollout = time.monotonic() - self._started + (hidden or 0.0)
        self._rollout = {"seconds_rollout": rollout, "rollout_tokens_per_second": tokens / rollout}
        self._rollout |= {} if hidden is None else {"seconds_hidden": hidden}
        self._rollout_tokens = tokens
        failpoint("step:rollouts-done")

    def end(
        self,
        learner: Learner,
        values: Metrics,
        episodes: Sequence[EpisodeRow] = (),
        tokens: int = 0,
        events: Sequence[Event] = (),
        hopeless: str = "",
        state: Mapping[str, Any] | None = None,
        tensors: Tensors | None = None,
    ) -> None:
        """Ends a step whose update has been applied: evaluates if it is time, stores, reports, checkpoints.

        `episodes` are stamped with the number of the completed step. `tokens` are those of the rows, where nothing was
        sampled. `hopeless` is a reason to stop, raised as TrainingDiverged once the step is stored. `state` (JSON) and
        `tensors` are saved beside the learner's.
        """
        self.step += 1
        failpoint("step:updated")
        times = self._times(tokens)
        rows = list(episodes)
        if self.step == self.total or (self._every and self.step % self._every == 0):
            assert self._evaluate is not None
            measured, more = self._evaluate(self.step)
            values, rows = values | measured, [*rows, *more]
        failpoint("step:before-store")
        self.store.write(self.step, values, times, rows, events)
        failpoint("step:after-store")
        self.on_step(self.step, values | times)
        if hopeless:
            raise TrainingDiverged(f"step {self.step}: {hopeless}")
        if self.step % self.cfg.checkpoint_every == 0 or self.step == self.total or self.interrupt.requested:
            failpoint("step:before-checkpoint")
            own, learned = learner.state()
            whole = {"step": self.step, **(state or {}), "learner": learned}
            checkpoint.save(self.store.folder, self.step, own | dict(tensors or {}), whole, self.cfg.keep)
            failpoint("step:after-checkpoint")

    def summary(self, learner: Learner) -> Summary | None:
        """Metrics before and after, and a hash of the weights; None where a signal stopped the run before its end."""
        if self.step < self.total:
            return None
        digest = checkpoint.weights_digest(learner.weights())
        return {"steps": self.step, "before": self.store.at(0), "after": self.store.at(self.step), "weights": digest}

    def _times(self, tokens: int) -> dict[str, float]:
        seconds = time.monotonic() - self._started
        if self._rollout_tokens is None:
            return {"seconds": seconds, "tokens_per_second": tokens / seconds}
        return {"seconds": seconds, "tokens_per_second": self._rollout_tokens / seconds, **self._rollout}
