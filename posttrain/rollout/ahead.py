"""Sampling k steps ahead of training, with weights that do not depend on the speed of either.

The answers of step s + k are begun when those of step s are complete, with the weights of that moment. One thread
samples the pending steps in order. So a step's completions are a function of weights k updates old, of the pass rates
known k steps before, and of where the step before it ended in the data; all three are in the checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from posttrain.rollout.curriculum import Curriculum
from posttrain.rollout.dynamic_sampling import SampledGroups
from posttrain.rollout.generator import Generator
from posttrain.rollout.prefetch import Prefetcher
from posttrain.types import Json, JsonView

Weights = Mapping[str, torch.Tensor]
Sample = Callable[[Curriculum, int, int], SampledGroups]
"""sample(curriculum, cursor, step): the groups of a step whose tasks begin at position `cursor` of the data."""


@dataclass(frozen=True)
class Pending:
    """A step that is begun: the weights it is sampled with, and the curriculum's state at that moment."""

    step: int
    version: int
    weights: Weights
    known: Json


class Ahead:
    """The pending steps of a run that samples `depth` steps ahead, oldest first.

    `curriculum` and `cursor` belong to the thread: what was drawn follows from the step before, in order, while pass
    rates are those of the moment at which a step was begun.
    """

    def __init__(
        self, depth: int, thread: Prefetcher[SampledGroups], generator: Generator, sample: Sample, total: int
    ) -> None:
        """Steps from `total` on are begun, for a run that is continued later, but not sampled."""
        self.depth, self.thread, self.generator, self.sample, self.total = depth, thread, generator, sample, total
        self.pending: deque[Pending] = deque()
        self._curriculum: Curriculum | None = None
        self._cursor = 0

    @property
    def started(self) -> bool:
        """Whether the next step's completions are being sampled, or are ready."""
        return self.thread.started

    def take(self) -> tuple[SampledGroups, float]:
        """Waits for the oldest pending step; returns its groups and the seconds that ran in the background."""
        found = self.thread.take()
        self.pending.popleft()
        return found

    def begin(self, step: int, weights: Weights, curriculum: Curriculum, cursor: int) -> None:
        """Begins what follows once the completions of `step` are complete: step + depth, and at first all up to it.

        `curriculum` has learned the step, and `cursor` is where it ended in the data.
        """
        first = self.pending[-1].step + 1 if self.pending else step + 1
        later = range(first, step + self.depth + 1)
        if self.depth == 1:  # the sampler has nothing to do at this moment, so its own copy is the snapshot
            self.generator.load(weights, step)
            weights = self.generator.weights()
        else:
            weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        for number in later:
            self._add(Pending(number, step, weights, curriculum.state()), curriculum, cursor)

    def _add(self, begun: Pending, curriculum: Curriculum, cursor: int) -> None:
        if self._curriculum is None:
            self._curriculum, self._cursor = curriculum.copy(), cursor
        self.pending.append(begun)
        if begun.step < self.total:
            self.thread.start(partial(self._sampled, begun, self._curriculum))

    def _sampled(self, begun: Pending, curriculum: Curriculum) -> SampledGroups:
        """Runs in the thread: the groups of one pending step."""
        if self.depth > 1:
            self.generator.load(begun.weights, begun.version)
        curriculum.take_rates(begun.known)
        found = self.sample(curriculum, self._cursor, begun.step)
        self._cursor += len(found.groups)
        curriculum.count(found.groups)
        return found

    def state(self) -> tuple[dict[str, Weights], Json]:
        """(tensors, JSON) for `load`: each version of the weights once, the oldest named `sampler`."""
        versions = list(dict.fromkeys(begun.version for begun in self.pending))
        weights = {begun.version: begun.weights for begun in self.pending}
        tensors = {_group(place): weights[version] for place, version in enumerate(versions)}
        steps = [{"version": begun.version, "curriculum": begun.known} for begun in self.pending]
        return tensors, {"sampler": versions[0], "ahead": steps}

    def load(self, saved: JsonView, step: int, curriculum: Curriculum, cursor: int) -> None:
        """Begins the pending steps of a checkpoint again, the first of which is `step`."""
        tensors = saved["tensors"]
        if "sampler" not in tensors:
            return
        # a checkpoint of a version that knew one step ahead only: the sampler's weights, and the curriculum of the run
        steps = saved.get("ahead") or [{"version": saved["sampler"], "curriculum": saved.get("curriculum", {})}]
        versions = list(dict.fromkeys(begun["version"] for begun in steps))
        weights = {version: tensors[_group(place)] for place, version in enumerate(versions)}
        if self.depth == 1:
            self.generator.load(weights[versions[0]], versions[0])
            weights = {versions[0]: self.generator.weights()}
        for number, begun in enumerate(steps, step):
            version = begun["version"]
            self._add(Pending(number, version, weights[version], begun["curriculum"]), curriculum, cursor)


def _group(place: int) -> str:
    return f"sampler-{place + 1}" if place else "sampler"
