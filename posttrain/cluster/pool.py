"""A pool of samplers behind the `Generator` protocol.

Requests are cut into units of completions of one prompt. A completion is a function of weights, prompt, seed and
sampling parameters, so which sampler answers a unit plays no part. A sampler that dies, or does not answer in time, is
replaced, and what it had not answered is asked again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from posttrain.cluster.actors import RUN_ENDED, Actor, WorkerDied, message
from posttrain.cluster.messages import Buffer
from posttrain.cluster.sampler import Done
from posttrain.rollout.generator import OnDone, OnToken, Request
from posttrain.store.checkpoint import weights_digest
from posttrain.types import Completion, RolloutError, SamplingParams

UNIT = 8  # completions of one prompt that stay together, so that the prompt is computed once
POLL = 0.2  # seconds between two looks at the deadlines


@dataclass(frozen=True)
class Unit:
    """Completions `first`, `first` + 1, … of request `number`."""

    number: int
    first: int
    request: Request


@dataclass
class Member:
    """A sampler and what it is doing."""

    actor: Actor
    holds: tuple[str, int] = ("", -1)  # digest and version of the weights it was sent
    units: list[Unit] = field(default_factory=list[Unit])
    missing: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])  # (request, index) not answered yet
    heard: float = 0.0  # when it last answered
    answered: int = 0


Event = tuple[Member, str, Any]


class Crew:
    """The samplers of a run. `start` starts one; `note` gets a sentence on each death."""

    def __init__(
        self,
        start: Callable[[], Actor],
        count: int,
        slots: int,
        timeout: float,
        max_restarts: int,
        note: Callable[[str], None],
    ) -> None:
        self.slots, self.timeout, self.max_restarts = slots, timeout, max_restarts
        self.lock = threading.Lock()  # one `generate` at a time
        self.deaths = 0  # in a row, without an answer
        self._start, self._note = start, note
        self.members = [Member(start()) for _ in range(count)]

    def check_deadlines(self) -> None:
        """Ends samplers that have not answered in time; loading does not count."""
        for member in self.members:
            if not member.actor.made.done():
                member.heard = time.monotonic()
            if member.units and time.monotonic() - member.heard > self.timeout:
                member.actor.kill(f"it has not answered for {self.timeout:g} s")

    def replace(self, member: Member, died: WorkerDied) -> list[Unit]:
        """Starts another sampler in place of one that died; returns units of what it had not answered."""
        self.deaths += 1
        if self.deaths > self.max_restarts:
            raise RolloutError(
                f"{died}. {self.deaths} samplers in a row died without an answer (cluster.max_restarts="
                f"{self.max_restarts}). Check their memory, then resume.",
                boundary="generator",
            )
        self._note(f"{died}. {len(member.missing)} completions are sampled again by another sampler.")
        self.members[self.members.index(member)] = Member(self._start())
        return [part for unit in member.units for part in _rest(unit, member.missing)]

    def close(self, reason: str = RUN_ENDED) -> None:
        """Ends all samplers."""
        for member in self.members:
            member.actor.kill(reason)


class Pool:
    """`Generator` on a crew of samplers, with weights of its own: pools of several versions may share a crew."""

    def __init__(self, crew: Crew, weights: Mapping[str, torch.Tensor]) -> None:
        self.version, self.crew = 0, crew
        self._weights: dict[str, torch.Tensor] = {}
        self._digest = ""
        self._message: list[Buffer] = []
        self.load(weights, 0)

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """See `Generator.load`; samplers get the weights before their next unit."""
        digest = weights_digest(weights)
        if digest != self._digest:
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        if (digest, version) != (self._digest, self.version) or not self._message:
            self._digest, self.version = digest, version
            self._message = message("load", self._weights, version, digest)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Generator.weights`."""
        return dict(self._weights)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """See `Generator.generate`; `on_token` is called for a whole completion when it has ended."""
        with self.crew.lock:
            return self._generate(requests, params, on_token, on_done)

    def _generate(
        self, requests: Sequence[Request], params: SamplingParams, on_token: OnToken | None, on_done: OnDone | None
    ) -> list[list[Completion]]:
        waiting = deque(unit for number, request in enumerate(requests) for unit in _units(number, request))
        out: list[list[Completion | None]] = [[None] * len(request.seeds) for request in requests]
        missing = sum(len(request.seeds) for request in requests)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        asked = 0  # calls that have not ended
        while missing or asked:
            asked += self._deal(waiting, params, events)
            try:
                member, kind, value = events.get(timeout=POLL)
            except queue.Empty:
                self.crew.check_deadlines()
                continue
            if kind == "part":
                number, index, completion = self._accepted(member, value)
                if out[number][index] is None:
                    out[number][index], missing = completion, missing - 1
                    if on_token:
                        for token in completion.tokens.tolist():
                            on_token(number, index, token)
                    if on_done:
                        on_done(number, index, completion)
                continue
            asked -= 1
            if isinstance(value, WorkerDied):
                waiting.extendleft(reversed(self.crew.replace(member, value)))
            elif value is not None:
                raise value
        return [[completion for completion in row if completion is not None] for row in out]

    def _deal(self, waiting: deque[Unit], params: SamplingParams, events: queue.SimpleQueue[Event]) -> int:
        """Gives idle samplers their share of the waiting units, at most what they can sample at once; returns how many
        were asked."""
        asked = 0
        for member in self.crew.members:
            if member.units or not waiting:
                continue
            rest = sum(len(unit.request.seeds) for unit in waiting)
            share = min(self.crew.slots, -(-rest // len(self.crew.members)))
            taken = 0
            while waiting and taken < share:
                member.units.append(unit := waiting.popleft())
                taken += len(unit.request.seeds)
            self._ask(member, params, events)
            asked += 1
        return asked

    def _ask(self, member: Member, params: SamplingParams, events: queue.SimpleQueue[Event]) -> None:
        """Sends a sampler its units, and before them the weights if it has others."""
        wanted, units = (self._digest, self.version), list(member.units)
        if member.holds != wanted:
            load = self._message
            if member.holds[0] == self._digest:
                load = message("load", None, self.version, self._digest)
            member.holds = wanted
            member.actor.send(load).add_done_callback(lambda done: self._loaded(member, wanted[0], done))
        member.missing = {(u.number, u.first + i) for u in units for i in range(len(u.request.seeds))}
        member.heard = time.monotonic()

        def on_part(done: Done) -> None:
            member.heard = time.monotonic()
            at, index, completion = done
            events.put((member, "part", (units[at].number, units[at].first + index, completion)))

        def ended(done: Future[Any]) -> None:
            error = done.exception()
            if not isinstance(error, WorkerDied):
                member.units = []  # also where nobody waits for it any more, after an exception in `on_done`
            events.put((member, "ended", error))

        asked = message("generate", [unit.request for unit in units], params, self.version, self._digest)
        member.actor.send(asked, on_part).add_done_callback(ended)

    def _loaded(self, member: Member, digest: str, done: Future[Any]) -> None:
        """Checks that a sampler has the weights it was sent; ends one that has others."""
        if done.exception() is None and done.result() != digest:
            member.actor.kill("the weights that it loaded are not those that it was sent")

    def _accepted(self, member: Member, done: Done) -> Done:
        """A completion, if it is of the version that was asked for."""
        number, index, completion = done
        if completion.version != self.version:
            raise RolloutError(
                f"{member.actor.name} answered with version {completion.version} of the weights, expected "
                f"{self.version}. Its answer was refused.",
                boundary="generator",
            )
        member.missing.discard((number, index))
        member.answered, self.crew.deaths = member.answered + 1, 0
        return done


def _units(number: int, request: Request) -> list[Unit]:
    """A request in units of at most UNIT completions."""
    starts = range(0, len(request.seeds), UNIT)
    parts = [range(first, min(first + UNIT, len(request.seeds))) for first in starts]
    return [Unit(number, part.start, _part(request, part)) for part in parts]


def _rest(unit: Unit, missing: set[tuple[int, int]]) -> list[Unit]:
    """The completions of a unit that are missing, as units of adjacent ones."""
    out: list[Unit] = []
    for index in range(len(unit.request.seeds)):
        if (unit.number, unit.first + index) in missing:
            out.append(Unit(unit.number, unit.first + index, _part(unit.request, range(index, index + 1))))
    return out


def _part(request: Request, indices: range) -> Request:
    """The request of some of its completions."""
    limits = tuple(request.limits[i] for i in indices) if request.limits else ()
    return replace(request, seeds=tuple(request.seeds[i] for i in indices), limits=limits)
