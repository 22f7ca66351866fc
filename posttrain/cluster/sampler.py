"""A sampler: a worker with a generator of its own."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence

import torch

from posttrain.config import RolloutConfig
from posttrain.models.load import Policy
from posttrain.rewards.workers import WorkerPool
from posttrain.rollout.build import make_generator
from posttrain.rollout.generator import Request
from posttrain.store.checkpoint import weights_digest
from posttrain.train.device import set_threads
from posttrain.types import Completion, RolloutError, SamplingParams

Done = tuple[int, int, Completion]  # request, index, completion


class OtherWeights(RolloutError):
    """A sampler was asked for completions of weights that it does not hold. It is replaced."""


class Sampler:
    """Answers requests for the weights it was given, and for no others."""

    def __init__(self, policy: Policy, rollout: RolloutConfig, threads: int) -> None:
        set_threads(threads)
        self.generator = make_generator(policy, rollout)
        self._loaded = ""  # digest of the weights

    def load(self, weights: Mapping[str, torch.Tensor] | None, version: int, digest: str) -> str:
        """Loads weights (None: those it has, as another version); returns the digest of what the generator holds."""
        if weights is not None:
            self._loaded = ""  # half-loaded weights are nobody's
            self.generator.load(weights, version)
            held = self.generator.weights()
            self._loaded = weights_digest({name: held[name] for name in weights})
        self.generator.version = version
        return self._loaded

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, version: int, digest: str
    ) -> Iterator[Done]:
        """Yields completions as they end. Raises OtherWeights if the weights are not those that were asked for."""
        if (self.generator.version, self._loaded) != (version, digest):
            raise OtherWeights(
                f"it holds other weights (version {self.generator.version}) than those that were asked for (version "
                f"{version})",
                boundary="generator",
            )
        ended: queue.SimpleQueue[Done | None] = queue.SimpleQueue()
        with WorkerPool(1) as thread:
            sampling = thread.submit(
                lambda: self.generator.generate(requests, params, on_done=lambda g, i, c: ended.put((g, i, c)))
            )
            sampling.add_done_callback(lambda _: ended.put(None))
            while (one := ended.get()) is not None:
                yield one
            sampling.result()
