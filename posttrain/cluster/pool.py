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
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain.cluster.actors import RUN_ENDED, Actor, WorkerDied, message
from posttrain.cluster.messages import Buffer
from posttrain.cluster.sampler import Done, OtherWeights
from posttrain.rollout.generator import OnDone, OnToken, Request, ended
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


@dataclass(eq=False)
class Member:
    """A sampler and what it is doing."""

    actor: Actor
    holds: tuple[str, int] = ("", -1)  # digest and version of the weights it was sent
    units: list[Unit] = field(default_factory=list[Unit])
    heard: float = 0.0  # when it last answered
    refused: str = ""  # why its answers were


@dataclass(frozen=True)
class Event:
    """A completion of a sampler (`done`), or the end of its call (`done` is None)."""

    member: Member
    units: list[Unit]  # of the call
    done: Done | None = None
    error: BaseException | None = None


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
        self.closed = False
        self._start, self._note = start, note
        self.members = [Member(start()) for _ in range(count)]

    def check_deadlines(self) -> None:
        """Ends samplers that have not answered in time; loading does not count."""
        for member in self.members:
            if not member.actor.made.done():
                member.heard = time.monotonic()
            if member.units and time.monotonic() - member.heard > self.timeout:
                member.actor.kill(f"it has not answered for {self.timeout:g} s")

    def replace(self, member: Member, died: WorkerDied, missing: int) -> None:
        """Starts another sampler in place of one that died; `missing` completions are asked again. Raises `died` once
        the crew is closed, and RolloutError after too many deaths."""
        if self.closed:
            raise died
        self.deaths += 1
        if self.deaths > self.max_restarts:
            raise RolloutError(
                f"{died}. {self.deaths} samplers in a row died without an answer (cluster.max_restarts="
                f"{self.max_restarts}). Check their memory, then resume.",
                boundary="generator",
            )
        self._note(f"{died}. {missing} completions are sampled again by another sampler.")
        self.members[self.members.index(member)] = Member(self._start())

    def close(self, reason: str = RUN_ENDED) -> None:
        """Ends all samplers; none is started afterwards."""
        self.closed = True
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
        asked: set[Member] = set()  # whose call has not ended
        while missing or asked:
            self._deal(waiting, params, events, asked)
            self.crew.check_deadlines()
            try:
                event = events.get(timeout=POLL)
            except queue.Empty:
                continue
            if event.done is not None:
                if not self._accepted(event.member, event.done):
                    continue
                number, index, completion = event.done
                if out[number][index] is None:
                    out[number][index], missing = completion, missing - 1
                    ended(number, index, completion, on_token, on_done)
                continue
            asked.discard(event.member)
            rest = [one for unit in event.units for one in _rest(unit, out[unit.number])]
            error = event.error
            if error is None and rest:  # its answers were refused, or it has left some out
                reason = event.member.refused or "it has not answered all that it was asked"
                event.member.actor.kill(reason)
                error = WorkerDied(event.member.actor.name, reason)
            if isinstance(error, WorkerDied):
                self.crew.replace(event.member, error, len(rest))
                waiting.extendleft(reversed(rest))
            elif error is not None:
                raise error
        return [[completion for completion in row if completion is not None] for row in out]

    def _deal(
        self,
        waiting: deque[Unit],
        params: SamplingParams,
        events: queue.SimpleQueue[Event],
        asked: set[Member],
    ) -> None:
        """Gives idle samplers their share of the waiting units, at most what they can sample at once."""
        for member in self.crew.members:
            if member in asked or member.units or not waiting:  # a member may have units of a call that was abandoned
                continue
            rest = sum(len(unit.request.seeds) for unit in waiting)
            share = min(self.crew.slots, -(-rest // len(self.crew.members)))
            taken = 0
            while waiting and taken < share:
                member.units.append(unit := waiting.popleft())
                taken += len(unit.request.seeds)
            asked.add(member)
            self._ask(member, params, events)

    def _ask(self, member: Member, params: SamplingParams, events: queue.SimpleQueue[Event]) -> None:
        """Sends a sampler its units, and before them the weights if it has others."""
        wanted, units = (self._digest, self.version), list(member.units)
        if member.holds != wanted:
            load = self._message
            if member.holds[0] == self._digest:
                load = message("load", None, self.version, self._digest)
            member.holds = wanted
            member.actor.send(load).add_done_callback(lambda done: self._loaded(member, wanted[0], done))
        member.heard = time.monotonic()

        def on_part(done: Done) -> None:
            member.heard = time.monotonic()
            at, index, completion = done
            events.put(Event(member, units, (units[at].number, units[at].first + index, completion)))

        def answered(done: Future[Any]) -> None:
            member.units = []  # also where nobody waits for it any more, after an exception in `on_done`
            error = done.exception()
            if isinstance(error, OtherWeights):
                member.actor.kill(str(error))
                error = WorkerDied(member.actor.name, str(error))
            events.put(Event(member, units, error=error))

        asked = message("generate", [unit.request for unit in units], params, self.version, self._digest)
        member.actor.send(asked, on_part).add_done_callback(answered)

    def _loaded(self, member: Member, digest: str, done: Future[Any]) -> None:
        """Checks that a sampler has the weights it was sent; ends one that has others."""
        if done.exception() is None and done.result() != digest:
            member.actor.kill("the weights that it loaded are not those that it was sent")

    def _accepted(self, member: Member, done: Done) -> bool:
        """Whether a completion is of the version that was asked for; ends a sampler that answers for another."""
        found = done[2].version
        if found != self.version:
            member.refused = f"it answered with version {found} of the weights, expected {self.version}"
            member.actor.kill(member.refused)
            return False
        self.crew.deaths = 0
        return True


def _units(number: int, request: Request) -> list[Unit]:
    """A request in units of at most UNIT completions."""
    starts = range(0, len(request.seeds), UNIT)
    parts = [range(first, min(first + UNIT, len(request.seeds))) for first in starts]
    return [Unit(number, part.start, request.part(part)) for part in parts]


def _rest(unit: Unit, answers: Sequence[Completion | None]) -> list[Unit]:
    """The completions of a unit that its request lacks, as units of one each."""
    return [
        Unit(unit.number, unit.first + index, unit.request.part([index]))
        for index in range(len(unit.request.seeds))
        if answers[unit.first + index] is None
    ]
