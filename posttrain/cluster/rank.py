"""A rank: a worker with its own copy of the models and its share of their optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from posttrain.cluster.actors import WorkerDied
from posttrain.cluster.sharded import ShardedLearner, gradient_difference, moved
from posttrain.cluster.worker import ADDRESS
from posttrain.config import TrainConfig
from posttrain.models.load import Policy
from posttrain.train.device import set_threads
from posttrain.train.forward import Forward, outputs_of_pass
from posttrain.train.lane_learner import LaneLearner
from posttrain.train.learner import Loss
from posttrain.train.ranks import Ranks
from posttrain.types import Batch, PosttrainError, Sample, Stat


class Rank:
    """One of `ranks` processes that compute gradients together. The driver calls every rank for every collective."""

    def __init__(self, number: int, ranks: int, threads: int, device: str, timeout: float) -> None:
        self.number, self.ranks, self.timeout = number, ranks, timedelta(seconds=timeout)
        set_threads(threads)
        cuda = device.startswith("cuda")
        self.device = torch.device(f"cuda:{number % torch.cuda.device_count()}" if cuda else device)
        self.learners: dict[str, LaneLearner] = {}
        self.shards: dict[str, ShardedLearner] = {}
        self._store: TCPStore | None = None

    def listen(self) -> tuple[str, int]:
        """Opens the store where ranks find each other, on rank 0; returns its address and port."""
        host = os.environ[ADDRESS]
        self._store = TCPStore(host, 0, None, True, self.timeout, wait_for_workers=False)
        return host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Joins the process group; returns when all ranks have."""
        store = self._store or TCPStore(host, port, None, False, self.timeout)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.number, world_size=self.ranks, timeout=self.timeout)

    def open(
        self, key: str, policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float, forward: Forward
    ) -> None:
        """Makes a learner of a policy; `key` names it from then on and replaces an earlier one of that name."""
        self.learners.pop(key, None)
        policy.model.to(self.device)
        if policy.scalar is not None:
            policy.scalar.to(self.device)
        group = Ranks(self.number, self.ranks)
        self.learners[key] = LaneLearner(policy, cfg, total_steps, temperature, forward, group)

    def accumulate(
        self, key: str, batches: Mapping[int, Batch], count: int, loss: Loss, drawn: int
    ) -> Iterator[tuple[int, dict[str, Stat]]]:
        """See `LaneLearner.accumulate`; no collective."""
        here = {number: moved(batch, self.device) for number, batch in batches.items()}
        yield from self.learners[key].accumulate(here, count, loss, drawn)

    def outputs(self, key: str, passes: Sequence[Sequence[Sample]], forward: Forward) -> Iterator[np.ndarray]:
        """Yields the first output of `forward` for the rows of each pass; no collective."""
        learner = self.learners[key]
        for rows in passes:
            yield outputs_of_pass(learner.policy, rows, forward, learner.temperature)

    def weights(self, key: str) -> dict[str, torch.Tensor]:
        """The trainable tensors, which every rank has; no collective."""
        return self.learners[key].weights()

    def kept(self, key: str) -> dict[str, list[torch.Tensor]]:
        """This rank's share of the master weights and moments; no collective."""
        return self.learners[key].kept

    def shard(
        self, key: str, policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float, forward: Forward
    ) -> None:
        """Makes a learner whose model is sharded over the ranks; a collective."""
        self.shards.pop(key, None)
        with self._collective():
            self.shards[key] = ShardedLearner(policy, cfg, total_steps, temperature, forward)

    def together(self, key: str, method: str, *arguments: Any) -> Any:
        """Calls a method of a learner in which all ranks take part; a collective."""
        with self._collective():
            return getattr(self.shards.get(key) or self.learners[key], method)(*arguments)

    def seeded(self, key: str, drawn: int, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """See `ShardedLearner.forward_backward`, with the driver's random numbers; a collective."""
        torch.manual_seed(drawn)
        with self._collective():
            return self.shards[key].forward_backward(batches, loss)

    def difference(self, key: str, drawn: int, whole: Policy | None, batches: Sequence[Batch], loss: Loss) -> float:
        """See `gradient_difference`; a collective."""
        torch.manual_seed(drawn)
        with self._collective():
            return gradient_difference(self.shards[key], whole, batches, loss)

    def gathered(self, key: str) -> dict[str, torch.Tensor] | None:
        """The trainable tensors, from rank 0; a collective."""
        with self._collective():
            weights = self.shards[key].weights()
        return weights if self.number == 0 else None

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """A lost connection to other ranks counts as a death, after which all ranks start anew."""
        try:
            yield
        except PosttrainError:
            raise
        except RuntimeError as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise WorkerDied(f"learner-{self.number}", f"it has lost the others ({lines[0]})") from None
