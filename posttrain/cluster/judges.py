"""Judges: workers that score completions with the run's verifier, each with sandboxes of its own."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import TimeoutError as TooLate
from contextlib import suppress
from typing import Any

from posttrain.cluster.actors import RUN_ENDED, Actor, WorkerDied, call
from posttrain.config import Sampling
from posttrain.rewards import code
from posttrain.rewards.judging import Verifier
from posttrain.rewards.scoring import CannotScore, name_of, score_safely
from posttrain.rollout.tasks import make_verifier
from posttrain.types import ConfigError, RolloutError, Task, Verdict

TRIES = 3  # deaths of a judge over one completion, after which it is unscored


class Judge:
    """The worker's side: makes the recipe's verifier and scores completions with it."""

    def __init__(self, recipe: Sampling, reward: Callable[..., Any] | None) -> None:
        with suppress(ConfigError):  # the run has checked it where it executes code
            code.use(recipe.reward.sandbox, recipe.reward.accept_arbitrary_code)
        self.verify, _ = make_verifier(recipe, reward)

    def score(self, task: Task, text: str) -> tuple[Verdict | None, str | None]:
        """See `score_safely`."""
        return score_safely(self.verify, task, text)


class Judges:
    """The driver's side: a verifier whose calls, from any thread, go to free judges."""

    def __init__(
        self,
        start: Callable[[], Actor],
        count: int,
        verify: Verifier,
        timeout: float,
        note: Callable[[str], None],
    ) -> None:
        self.__name__ = name_of(verify)
        self.count, self._start, self._timeout, self._note = count, start, timeout, note
        self._free: queue.SimpleQueue[Actor] = queue.SimpleQueue()
        self.closed = False
        self.actors = [start() for _ in range(count)]
        for actor in self.actors:
            self._free.put(actor)

    def __call__(self, task: Task, text: str) -> Verdict:
        """Scores a completion. Raises RolloutError if it cannot be scored, and CannotScore if none can be."""
        for attempt in range(1, TRIES + 1):
            actor = self._free.get()
            try:
                verdict, error = call(actor, "score", task, text).result(self._timeout)
            except (WorkerDied, TooLate) as died:
                actor.kill(f"it did not score a completion of task {task.id!r} within {self._timeout:g} s")
                reason = str(died) or f"{actor.name} did not score a completion within {self._timeout:g} s"
                if self.closed:
                    raise
                last = attempt == TRIES
                if last and not _is_made(actor):
                    raise CannotScore(f"{reason}. {TRIES} judges ended before they had made {self.__name__}.") from None
                then = "is unscored" if last else f"is scored again (try {attempt + 1} of {TRIES})"
                self._note(f"{reason}. Task {task.id!r} {then}.")
                actor = self._replaced(actor)
                continue
            except Exception as error:
                if _is_made(actor):
                    raise
                raise CannotScore(f"{actor.name} cannot make the reward {self.__name__}: {error}") from error
            finally:
                self._free.put(actor)
            if verdict is None:
                raise RolloutError(error or "no verdict", boundary="reward")
            return verdict
        raise RolloutError(
            f"{TRIES} judges died or were stopped while they scored task {task.id!r} with {self.__name__}.",
            boundary="reward",
        )

    def _replaced(self, actor: Actor) -> Actor:
        new = self._start()
        self.actors[self.actors.index(actor)] = new
        return new

    def close(self, reason: str = RUN_ENDED) -> None:
        """Ends all judges; none is started afterwards."""
        self.closed = True
        for actor in self.actors:
            actor.kill(reason)


def _is_made(actor: Actor) -> bool:
    """Whether a judge has its verifier."""
    return actor.made.done() and actor.made.exception() is None
