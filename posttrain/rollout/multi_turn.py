"""Episodes of several turns: the model's replies and a world's, as spans of tokens that are never encoded again.

Attempts go on independently. Each round samples a reply for every attempt whose world has answered; worlds answer in
threads of their own, while others' replies are still being written. So a slow world delays its own attempt, and one
that crashes, or takes too long, leaves its own attempt unscored. What is sampled is a function of weights, history
and the attempt's seed, whatever the rounds were.
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
from posttrain.envs.env import Env, Turn, World
from posttrain.envs.timeouts import Calls
from posttrain.rollout.generator import Generator, Request
from posttrain.types import Completion, Episode, Message, PosttrainError, SamplingParams, Span, Task

LOOK_UP = 0.2  # seconds between two calls of `check` while worlds are thinking
LINGER = 0.02  # seconds that a round waits for others once one attempt is ready


@dataclass(frozen=True)
class Player:
    """Everything that plays an episode, but the model."""

    env: Env
    encode: Callable[[Task], np.ndarray]  # prompt token ids
    follow: Callable[[Sequence[Message]], np.ndarray]  # ids of messages after a finished reply (ChatFormat)
    decode: Callable[[np.ndarray], str]
    limits: EnvConfig
    context: int  # most tokens the model reads and writes in one stretch

    def play(
        self, generator: Generator, params: SamplingParams, attempts: Sequence[Attempt], check: Callable[[], None]
    ) -> list[Episode]:
        """One episode for each attempt, in their order."""
        calls: Calls[int] = Calls(self.limits.workers, self.limits.timeout)
        start = time.monotonic()
        for i, attempt in enumerate(attempts):
            calls.submit(i, partial(self._open, attempt), attempt.close)
        while calls.pending:
            check()
            ready: list[int] = []
            for i, result in calls.finished(LOOK_UP, LINGER):
                self._hear(attempts[i], result, params.max_tokens)
                if not attempts[i].over:
                    ready.append(i)
            if ready:
                self._round(generator, params, attempts, ready, calls, check)
        seconds = (time.monotonic() - start) / max(1, len(attempts))
        return [replace(attempt.episode(), seconds=seconds) for attempt in attempts]

    def _round(
        self,
        generator: Generator,
        params: SamplingParams,
        attempts: Sequence[Attempt],
        ready: Sequence[int],
        calls: Calls[int],
        check: Callable[[], None],
    ) -> None:
        """A reply for each of `ready`, and a call of its world the moment it ends; equal prompts are computed once."""
        together: dict[bytes, list[int]] = {}
        for i in ready:
            together.setdefault(attempts[i].context.tobytes(), []).append(i)
        members = list(together.values())
        requests = [Request(attempts[m[0]].context, tuple(attempts[i].turn_seed for i in m)) for m in members]

        def ended(request: int, index: int, completion: Completion) -> None:
            check()
            i = members[request][index]
            reply = self.decode(completion.tokens[:-1] if completion.stop == "stop" else completion.tokens)
            last = attempts[i].reply(completion, reply, self.limits.max_turns)
            calls.submit(i, partial(self._step, attempts[i], reply, last), attempts[i].close)

        generator.generate(requests, params, on_done=ended)

    def _open(self, attempt: Attempt) -> tuple[Message, ...]:
        attempt.world = self.env(attempt.task, attempt.seed)
        return tuple(getattr(attempt.world, "opening", attempt.task.messages))

    def _step(self, attempt: Attempt, reply: str, last: bool) -> Turn:
        assert attempt.world is not None
        try:
            turn: Any = attempt.world.step(reply)
        except BaseException:
            attempt.close()
            raise
        if last or not isinstance(turn, Turn) or turn.over:
            attempt.close()
        return turn

    def _hear(self, attempt: Attempt, result: Any, max_tokens: int) -> None:
        """Takes what the attempt's world said, or why it said nothing."""
        if isinstance(result, BaseException):
            if not isinstance(result, Exception):  # KeyboardInterrupt and its like are not the world's
                raise result
            attempt.failed(_why(result))
            return
        try:
            if not attempt.spans:
                attempt.begin(result, self.encode(replace(attempt.task, messages=result)))
            elif not isinstance(result, Turn):
                attempt.failed(f"the environment answered with {type(result).__name__}, expected a Turn.")
            else:
                attempt.hear(result, self.encode, self.follow)
        except Exception as error:  # the template, or the tokenizer, refuses what the world said
            attempt.failed(_why(error))
        if not attempt.over and len(attempt.context) + max_tokens > self.context:
            attempt.over, attempt.stop = True, "length"


@dataclass
class Attempt:
    """One attempt while it is being played."""

    task: Task
    group: int
    index: int
    seed: int
    world: World | None = None
    history: list[Message] = field(default_factory=lambda: [])
    spans: list[Span] = field(default_factory=lambda: [])
    cuts: list[int] = field(default_factory=lambda: [])
    rewards: list[float] = field(default_factory=lambda: [])
    text: str = ""
    last: Turn | None = None
    over: bool = False
    ends: bool = False  # with the world's next answer, whatever it is
    stop: Any = "stop"
    error: str | None = None

    @property
    def context(self) -> np.ndarray:
        """What the model reads before its next reply: the tokens of the current stretch."""
        return np.concatenate([span.tokens for span in self.spans[self.cuts[-1] if self.cuts else 0 :]])

    @property
    def turns(self) -> int:
        """Replies so far."""
        return sum(span.by == "model" for span in self.spans)

    @property
    def turn_seed(self) -> int:
        """The seed of the next reply; the first has the attempt's own, as in single-turn tasks."""
        return rng.key(self.seed, "turn", self.turns) if self.turns else self.seed

    def begin(self, messages: Sequence[Message], tokens: np.ndarray) -> None:
        self.history, self.spans = list(messages), [Span("prompt", tokens)]

    def reply(self, completion: Completion, text: str, max_turns: int) -> bool:
        """Takes the model's reply; returns whether the episode ends after the world has heard it."""
        self.spans.append(Span("model", completion.tokens, completion.logprobs, completion.version))
        self.history.append(Message("assistant", text))
        self.text += text
        self.stop = completion.stop
        self.ends = completion.stop == "length" or self.turns >= max_turns
        return self.ends

    def hear(
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
        """The attempt cannot be scored. One that never began still has a prompt, of which nothing is trained."""
        self.error, self.over = f"task {self.task.id!r}: {why}", True

    def close(self) -> None:
        """Lets the world release what it holds."""
        close = getattr(self.world, "close", None)
        if close is not None:
            close()

    def episode(self) -> Episode:
        """The attempt as an episode; its reward is the sum of its turns'."""
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
            None if scored else self.error or f"task {self.task.id!r}: its prompt leaves no room for a reply.",
            turn_rewards=tuple(self.rewards),
            cuts=tuple(self.cuts),
        )


def _why(error: Exception) -> str:
    if isinstance(error, PosttrainError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"the environment was given up: {error}."
    return f"the environment raised {type(error).__name__}: {error}"
