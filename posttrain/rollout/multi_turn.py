"""Multi-turn rollouts: model replies and environment messages as token spans that are never tokenized again.

Trajectories advance independently. Each round samples a reply for every trajectory whose environment has responded,
while other environments step in background threads. A slow environment delays only its own trajectory, and one that
crashes or times out leaves only its own trajectory unscored. A reply is a function of the weights, the history and the
trajectory's seed, independent of the round it was sampled in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from posttrain import rng
from posttrain.config import EnvConfig
from posttrain.data.messages import without_prefill
from posttrain.envs.env import Env, EnvFactory, Turn
from posttrain.envs.timeouts import Calls
from posttrain.rollout.generator import Generator, Request
from posttrain.rollout.stopping import completion_text
from posttrain.types import Completion, Episode, Message, PosttrainError, SamplingParams, Span, Task

POLL_SECONDS = 0.2  # between two calls of `check` while environments step
LINGER_SECONDS = 0.02  # a round waits this long for more trajectories once one is ready


@dataclass(frozen=True)
class MultiTurn:
    """Rolls out trajectories in environments with any generator."""

    make_env: EnvFactory
    encode: Callable[[Task], np.ndarray]  # prompt token ids
    follow: Callable[[Sequence[Message]], np.ndarray]  # ids of messages after a finished reply (ChatFormat)
    decode: Callable[[np.ndarray], str]
    limits: EnvConfig
    context: int  # the model's context window, in tokens
    opening: Callable[[Sequence[Message]], str] = lambda messages: ""  # the part of the reply that is in the prompt

    def run(
        self,
        generator: Generator,
        params: SamplingParams,
        trajectories: Sequence[Trajectory],
        check: Callable[[], None],
    ) -> list[Episode]:
        """Runs all trajectories to their end; returns one episode each, in order."""
        calls: Calls[int] = Calls(self.limits.workers, self.limits.timeout)
        start = time.monotonic()
        for i, trajectory in enumerate(trajectories):
            calls.submit(i, partial(self._open, trajectory), trajectory.close)
        while calls.pending:
            check()
            ready: list[int] = []
            for i, result in calls.finished(POLL_SECONDS, LINGER_SECONDS):
                self._receive(trajectories[i], result, params.max_tokens)
                if not trajectories[i].over:
                    ready.append(i)
            if ready:
                self._round(generator, params, trajectories, ready, calls, check)
        seconds = (time.monotonic() - start) / max(1, len(trajectories))
        return [replace(trajectory.episode(), seconds=seconds) for trajectory in trajectories]

    def _round(
        self,
        generator: Generator,
        params: SamplingParams,
        trajectories: Sequence[Trajectory],
        ready: Sequence[int],
        calls: Calls[int],
        check: Callable[[], None],
    ) -> None:
        """Samples a reply for each trajectory in `ready` and steps its environment as soon as the reply ends.

        Identical contexts are prefilled once.
        """
        together: dict[bytes, list[int]] = {}
        for i in ready:
            together.setdefault(trajectories[i].context.tobytes(), []).append(i)
        members = list(together.values())
        requests = [Request(trajectories[m[0]].context, tuple(trajectories[i].turn_seed for i in m)) for m in members]

        def on_done(request: int, index: int, completion: Completion) -> None:
            check()
            i = members[request][index]
            reply = trajectories[i].opening + completion_text(self.decode, completion)
            last = trajectories[i].reply(completion, reply, self.limits.max_turns)
            calls.submit(i, partial(self._step, trajectories[i], reply, last), trajectories[i].close)

        generator.generate(requests, params, on_done=on_done)

    def _open(self, trajectory: Trajectory) -> tuple[Message, ...]:
        trajectory.env = self.make_env(trajectory.task, trajectory.seed)
        return tuple(getattr(trajectory.env, "opening", trajectory.task.messages))

    def _step(self, trajectory: Trajectory, reply: str, last: bool) -> Turn:
        assert trajectory.env is not None
        try:
            turn: Any = trajectory.env.step(reply)
        except BaseException:
            trajectory.close()
            raise
        if last or not isinstance(turn, Turn) or turn.over:
            trajectory.close()
        return turn

    def _receive(self, trajectory: Trajectory, result: Any, max_tokens: int) -> None:
        """Adds the environment's response, or the error it raised, to its trajectory."""
        if isinstance(result, BaseException):
            if not isinstance(result, Exception):  # KeyboardInterrupt and similar do not come from the environment
                raise result
            trajectory.failed(_why(result))
            return
        try:
            if not trajectory.spans:
                trajectory.begin(result, self.encode(replace(trajectory.task, messages=result)))
                trajectory.opening, trajectory.opened = self.opening(result), self.opening(without_prefill(result))
            elif not isinstance(result, Turn):
                trajectory.failed(f"the environment returned {type(result).__name__}, expected a Turn.")
            else:
                trajectory.receive(result, self.encode, self.follow)
                trajectory.opening = trajectory.opened
        except Exception as error:  # the template or tokenizer rejects the environment's message
            trajectory.failed(_why(error))
        if not trajectory.over and len(trajectory.context) + max_tokens > self.context:
            trajectory.over, trajectory.stop = True, "length"


@dataclass
class Trajectory:
    """One trajectory in progress."""

    task: Task
    group: int
    index: int
    seed: int
    env: Env | None = None
    history: list[Message] = field(default_factory=lambda: [])
    spans: list[Span] = field(default_factory=lambda: [])
    cuts: list[int] = field(default_factory=lambda: [])
    rewards: list[float] = field(default_factory=lambda: [])
    text: str = ""
    opening: str = ""  # what the prompt has of the next reply already
    opened: str = ""  # what every prompt has of it: a thought that the template opens
    last: Turn | None = None
    over: bool = False
    ends: bool = False  # the episode ends after the environment's next response
    stop: Any = "stop"
    error: str | None = None

    @property
    def context(self) -> np.ndarray:
        """What the model reads before its next reply: the tokens since the last edit of the history."""
        return np.concatenate([span.tokens for span in self.spans[self.cuts[-1] if self.cuts else 0 :]])

    @property
    def turns(self) -> int:
        """Number of replies so far."""
        return sum(span.by == "model" for span in self.spans)

    @property
    def turn_seed(self) -> int:
        """The seed of the next reply; the first uses the trajectory's seed, as in single-turn tasks."""
        return rng.key(self.seed, "turn", self.turns) if self.turns else self.seed

    def begin(self, messages: Sequence[Message], tokens: np.ndarray) -> None:
        self.history, self.spans = [*without_prefill(messages)], [Span("prompt", tokens)]

    def reply(self, completion: Completion, text: str, max_turns: int) -> bool:
        """Adds the model's reply; returns whether the episode ends after the environment's next step."""
        self.spans.append(Span("model", completion.tokens, completion.logprobs, completion.version))
        self.history.append(Message("assistant", text))
        self.text += text
        self.stop = completion.stop
        self.ends = completion.stop == "length" or self.turns >= max_turns
        return self.ends

    def receive(
        self,
        turn: Turn,
        encode: Callable[[Task], np.ndarray],
        follow: Callable[[Sequence[Message]], np.ndarray],
    ) -> None:
        self.rewards.append(float(turn.reward))
        self.last = turn
        self.over = self.ends or turn.over
        if self.over:
            return
        self.text += "".join(f"\n[{m.role}] {m.content}\n" for m in turn.messages)
        if turn.history is None:
            self.spans.append(Span("env", follow(turn.messages)))
            self.history += turn.messages
            return
        self.history = [*turn.history, *turn.messages]
        self.cuts.append(len(self.spans))
        self.spans.append(Span("prompt", encode(replace(self.task, messages=tuple(self.history)))))

    def failed(self, why: str) -> None:
        """Ends the trajectory as unscored."""
        self.error, self.over = f"task {self.task.id!r}: {why}", True

    def close(self) -> None:
        """Closes the environment."""
        close = getattr(self.env, "close", None)
        if close is not None:
            close()

    def episode(self) -> Episode:
        """The trajectory as an episode; its reward is the sum over its turns."""
        scored = self.error is None and self.last is not None
        last = self.last or Turn()
        return Episode(
            self.task.id,
            self.group,
            self.index,
            tuple(self.spans) or (Span("prompt", np.zeros(1, np.int32)),),
            self.text,
            sum(self.rewards) if scored else None,
            scored and last.passed,
            last.parts if scored else {},
            self.stop,
            None
            if scored
            else self.error or f"task {self.task.id!r}: its prompt leaves no room in the context for a reply.",
            turn_rewards=tuple(self.rewards),
            cuts=tuple(self.cuts),
        )


def _why(error: Exception) -> str:
    if isinstance(error, PosttrainError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"the environment timed out: {error}."
    return f"the environment raised {type(error).__name__}: {error}"
