"""The interface between algorithms and runs: `Setup` (inputs), `Job` (a prepared run) and `Loop` (the step protocol).

An algorithm's `run` drives a `Loop`, which handles everything that all algorithms share:

    saved = loop.restore(learner)                       # {} for a new run
    for step in loop.steps(total, evaluate, every):     # evaluates before step 0; stops early on a signal
        …sample…
        loop.sampled(tokens)                            # only where completions are sampled
        …update…
        loop.end(learner, values, state={…})            # stores, evaluates, reports, checkpoints
    return loop.summary(learner)

Each step is stored in one transaction, each checkpoint is put in place by one rename, and all randomness is a function
of seed and step, so a run that is killed at any time and resumed is bit-exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from posttrain.config import Recipe, RolloutConfig, RunConfig, TrainConfig
from posttrain.data.chat import ChatFormat
from posttrain.models.load import Policy
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import EpisodeRow, Event, Run
from posttrain.train.best import Best
from posttrain.train.forward import Forward, token_stats
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner, MakeLearner, make_learner
from posttrain.types import Json, JsonView, Task, TrainingDiverged

R = TypeVar("R", bound=Recipe, covariant=True)
Metrics = dict[str, float]
Summary = Json
Tensors = Mapping[str, Mapping[str, torch.Tensor]]

OnStep = Callable[[int, Metrics], None]
"""Called after each step with its number, metrics and timings."""
Evaluate = Callable[[int], tuple[Metrics, Sequence[EpisodeRow]]]
"""evaluate(step) → metrics `eval/…` of the weights after that step, and the evaluation episodes."""
Reward = Callable[..., Any]


class Workers(Protocol):
    """Makes what a run computes with: in this process, or in processes of their own (posttrain/cluster)."""

    def learner(
        self, policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float, forward: Forward
    ) -> Learner: ...
    def generator(self, policy: Policy, rollout: RolloutConfig) -> Any: ...
    def verifier(self, verify: Any) -> Any: ...


@dataclass(frozen=True)
class Setup(Generic[R]):
    """Inputs of every algorithm: the resolved recipe, its model, and tasks and reward passed from Python."""

    recipe: R
    policy: Policy
    chat: ChatFormat
    folder: Path  # of the run; does not exist yet for a new run
    given: list[Task] | None = None
    reward: Reward | None = None
    workers: Workers | None = None  # None: all in this process
    fingerprint: JsonView = field(default_factory=dict[str, Any])  # of machine, model and versions


@dataclass(frozen=True)
class Job:
    """A run that is ready to start: hash of its data, notes for the user, and the training function.

    `run` continues from the newest checkpoint, if any. It returns the summary, or None if a signal stopped it (the run
    is then saved and resumable). `policy` is exported when the run has finished.
    """

    policy: Policy
    data_hash: str
    notes: list[str]
    run: Callable[[Loop], Summary | None]


@dataclass
class Loop:
    """The step protocol of one run: restore, timing, metrics, events, episodes, evaluation, checkpoints, shutdown."""

    store: Run
    cfg: RunConfig
    on_step: OnStep
    interrupt: Interrupt
    step: int = 0  # completed steps
    total: int = 0
    ended: str = ""  # why the run ended before its last planned step, as a success
    make_learner: MakeLearner = make_learner  # in this process, or on the ranks of a cluster
    notes: list[str] = field(default_factory=list[str])  # of the cluster, stored with the next step
    extended: bool = False  # continues where it had ended early, so what ended it is counted anew
    best: Best = field(init=False)
    _every: int = 0
    _evaluate: Evaluate | None = None
    _ended_at: Json = field(default_factory=dict[str, Any])  # of the restored checkpoint
    _started: float = 0.0
    _rollout: dict[str, float] = field(default_factory=dict[str, float])
    _rollout_tokens: int | None = None

    def __post_init__(self) -> None:
        self.best = Best(self.cfg.keep_best)

    def learner(
        self,
        policy: Policy,
        cfg: TrainConfig,
        total_steps: int,
        temperature: float = 1.0,
        forward: Forward = token_stats,
    ) -> Learner:
        """A learner of the policy; see `make_learner` (train/learner.py)."""
        return self.make_learner(policy, cfg, total_steps, temperature, forward)

    def restore(self, learner: Learner, check: Callable[[JsonView], None] | None = None) -> Json:
        """Loads the newest checkpoint into the learner and returns the `state` and "tensors" passed to `end`.

        "tensors" does not include the learner's. `check` gets the state first and may raise. Empty if the run has no
        checkpoint.
        """
        saved = checkpoint.latest(self.store.folder)
        if saved is None:
            return {}
        tensors, state = checkpoint.load(saved)
        if check is not None:
            check(state)
        learner.load(tensors, state["learner"])
        self.step = state["step"]
        self.best.load(state.get("best", {}))
        self._ended_at = state.get("ended", {})
        if self._ended_at and self.store.header.get("extended_at") == self.step:
            self._ended_at, self.extended = {}, True
            self.best.allow_more()
        return {**state, "tensors": {name: group for name, group in tensors.items() if name not in ("model", "optim")}}

    def steps(self, total: int, evaluate: Evaluate, every: int = 0) -> Iterator[int]:
        """Yields the remaining steps, numbered from 0.

        `evaluate` is called before the first step, every `every` steps (0: only before and after the run) and after the
        last.
        """
        self.total, self._every, self._evaluate = total, every, evaluate
        if self._ended_at and self._ended_at["total"] >= total:
            self.total, self.ended = self.step, self._ended_at["why"]
        if self.step == 0:
            values, episodes = evaluate(0)
            self.best.check(values)
            self.store.write(0, values, {}, episodes)
            self.on_step(0, values)
        while self.step < self.total and not self.interrupt.requested:
            failpoint("step:start")
            self._started, self._rollout_tokens = time.monotonic(), None
            yield self.step

    def sampled(self, tokens: int, hidden: float | None = None) -> None:
        """Marks the end of sampling and scoring of `tokens` tokens; `hidden` seconds overlapped the previous step."""
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
        solved: str = "",
        state: JsonView | None = None,
        tensors: Tensors | None = None,
    ) -> None:
        """Ends a step after its update: evaluates if due, stores the step, reports it and saves a checkpoint if due.

        `episodes` have the number of the completed step. `tokens` counts the tokens of the training rows, for steps
        without sampling. `hopeless` is a reason to stop, raised as TrainingDiverged once the step is stored; `solved`
        is a reason to end the run here, as finished. `state` (JSON) and `tensors` are saved with the learner's.
        """
        planned = self.total
        self.step += 1
        failpoint("step:updated")
        times = self._times(tokens)
        rows, gained = list(episodes), False
        if solved and self.step < planned:
            self._end_here(solved)
        if self.is_evaluated(self.step):
            assert self._evaluate is not None
            measured, more = self._evaluate(self.step)
            values, rows = values | measured, [*rows, *more]
            gained = self.best.update(self.step, values)
            if self.best.exhausted(self.cfg.patience) and self.step < self.total:
                best = f"the best {self.best.metric}, {self.best.value:.4g}, is that of step {self.best.step}"
                since = self.best.since
                later = "1 evaluation has" if since == 1 else f"{since} evaluations have"
                self._end_here(f"{best}, and {later} not improved on it")
        if self.ended:
            events = [*events, Event("info", "ended", f"Ended after step {self.step} of {planned}: {self.ended}.")]
        failpoint("step:before-store")
        self.store.write(self.step, values, times, rows, events)
        while self.notes:  # not among the step's events, which are part of its digest
            self.store.note(self.step, Event("warning", "cluster", self.notes.pop(0)))
        failpoint("step:after-store")
        self.on_step(self.step, values | times)
        if hopeless:
            raise TrainingDiverged(f"step {self.step}: {hopeless}")
        due = self.step % self.cfg.checkpoint_every == 0 or self.step == self.total
        if due or (gained and self.best.metric) or self.interrupt.requested:
            self._save(learner, state or {}, tensors or {}, planned)

    def is_evaluated(self, step: int) -> bool:
        """Whether the weights after a step are evaluated."""
        return step == self.total or (self._every > 0 and step % self._every == 0)

    def is_exported(self, step: int) -> bool:
        """Whether the weights after a step may be those that the run exports."""
        return step == self.total or (bool(self.best.metric) and self.is_evaluated(step))

    def _end_here(self, why: str) -> None:
        """Makes the current step the last one."""
        self.ended, self.total = why, self.step

    def _save(self, learner: Learner, state: JsonView, tensors: Tensors, planned: int) -> None:
        failpoint("step:before-checkpoint")
        own, learned = learner.state()
        whole = {"step": self.step, **state, "learner": learned}
        if self.best.metric and self.best.step:
            whole["best"] = self.best.state()
        if self.ended:
            whole["ended"] = {"why": self.ended, "total": planned}
        kept = [self.best.step] if self.best.metric else []
        checkpoint.save(self.store.folder, self.step, own | dict(tensors), whole, self.cfg.keep, kept)
        failpoint("step:after-checkpoint")

    def summary(self, learner: Learner) -> Summary | None:
        """Metrics before and after training and a hash of the weights; None if a signal stopped the run.

        With `run.keep_best` the learner gets the weights of the best evaluation, and the metrics are those.
        """
        if self.step < self.total:
            return None
        found: Summary = {"steps": self.step, "before": self.store.at(0)}
        best = self.best.step if self.best.metric and self.best.step else self.step
        if self.best.metric and self.best.step:
            found["best"] = {"step": best, self.best.metric: self.best.value}
        if best != self.step:
            saved = next(path for step, path in checkpoint.folders(self.store.folder) if step == best)
            kept, state = checkpoint.load(saved)
            learner.load(kept, state["learner"])
        if self.ended:
            found["ended"] = f"{self.ended[0].upper()}{self.ended[1:]}."
        return {**found, "after": self.store.at(best), "weights": checkpoint.weights_digest(learner.weights())}

    def _times(self, tokens: int) -> dict[str, float]:
        seconds = time.monotonic() - self._started
        if self._rollout_tokens is None:
            return {"seconds": seconds, "tokens_per_second": tokens / seconds}
        return {"seconds": seconds, "tokens_per_second": self._rollout_tokens / seconds, **self._rollout}
