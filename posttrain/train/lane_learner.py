"""Learner whose gradients are added in lanes (train/lanes.py), in one process or on several ranks (train/ranks.py).

Each rank has the whole model, and its share of the float32 master weights, the optimizer's moments and the gradient
(ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from posttrain import rng
from posttrain.config import TrainConfig
from posttrain.models.load import Policy, trainable
from posttrain.train import lanes
from posttrain.train.forward import Forward, outputs, sample_logprobs
from posttrain.train.learner import Loss
from posttrain.train.ranks import Alone, Group, shares
from posttrain.train.update import backward, check_names, check_norm, check_weights, finite, learning_rate
from posttrain.types import Batch, Json, JsonView, Sample, Stat

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per element


class LaneLearner:
    """Owns the optimizer of one policy, or this rank's share of it."""

    def __init__(
        self,
        policy: Policy,
        cfg: TrainConfig,
        total_steps: int,
        temperature: float,
        forward: Forward,
        group: Group | None = None,
    ) -> None:
        self.policy, self.cfg, self.temperature, self.total_steps = policy, cfg, temperature, total_steps
        self.forward, self.group = forward, group or Alone()
        self.steps = 0
        self.parameters = trainable(policy)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.layout = lanes.Layout({name: p.shape for name, p in self.parameters.items()}, cfg.lanes)
        self.spans = shares(self.layout, self.group.rank, self.group.ranks)
        flat = self.layout.flat({n: p.detach() for n, p in self.parameters.items()}, policy.device)
        self.master = self._share_of(flat)
        self.moments = {name: self._share_of(torch.zeros_like(flat)) for name in MOMENTS}
        self._params = [self._chunks(part, region) for region, part in enumerate(self.master)]
        self.gradient: list[torch.Tensor] | None = None  # of the calls of `forward_backward` since the last step
        self._sum: torch.Tensor | None = None  # of this rank's lanes, in the latest call
        decays = (cfg.weight_decay, 0.0)
        groups = [
            {"params": chunks, "weight_decay": decays[region]} for region, chunks in enumerate(self._params) if chunks
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=True)
        self._share_moments(0)

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See `Learner.logprobs`; micro-batches hold at most `train.micro_batch_tokens` tokens."""
        return sample_logprobs(self.policy, samples, self.cfg.micro_batch_tokens, self.temperature)

    def outputs(self, samples: Sequence[Sample], forward: Forward) -> list[np.ndarray]:
        """See `Learner.outputs`."""
        return outputs(self.policy, samples, self.cfg.micro_batch_tokens, forward, self.temperature)

    def forward_backward(self, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """See `Learner.forward_backward`. The random numbers of a micro-batch depend on its number in the call only."""
        if not batches:
            return []
        drawn = int(torch.randint(1 << 62, ()))
        stats = dict(self.accumulate(dict(enumerate(batches)), len(batches), loss, drawn))
        self.reduce()
        rng.seed_global("after", drawn)
        return [stats[number] for number in range(len(batches))]

    def accumulate(
        self, batches: Mapping[int, Batch], count: int, loss: Loss, drawn: int
    ) -> Iterator[tuple[int, dict[str, Stat]]]:
        """Adds the gradients of this rank's lanes of a call of `count` micro-batches; yields their numbers and stats.

        `batches` has those of this rank's lanes, `drawn` is the seed of the call.
        """
        own = self.cfg.lanes // self.group.ranks
        order = lanes.order(count, self.cfg.lanes)[self.group.rank * own : (self.group.rank + 1) * own]
        total = lanes.Tree()
        for numbers in order:
            if not numbers:
                continue  # zeros, which change no sum
            lane = torch.zeros(self.layout.size, device=self.policy.device)
            for number in numbers:
                rng.seed_global("pass", drawn, number)
                args = (batches[number], loss, self.forward, self.temperature, self.steps + 1)
                yield number, backward(self.policy, *args)
                self._add_gradients(lane)
            total.add(lane)
        self._sum = total.sum()

    def reduce(self) -> None:
        """Adds the ranks' sums of the latest `accumulate`; every rank must call it."""
        total = torch.zeros(self.layout.size, device=self.policy.device) if self._sum is None else self._sum
        parts = self.group.reduce(self.layout, total)
        self.gradient = (
            parts if self.gradient is None else [a.add_(b) for a, b in zip(self.gradient, parts, strict=True)]
        )
        self._sum = None

    def _add_gradients(self, total: torch.Tensor) -> None:
        """Moves the parameters' gradients into a lane's sum."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.layout.places[name].view(total).add_(parameter.grad)
                parameter.grad = None

    def step(self, only: str = "", update: int | None = None) -> dict[str, Stat]:
        """See `Learner.step`."""
        gradient = [torch.zeros_like(part) for part in self.master] if self.gradient is None else self.gradient
        for name in self.parameters:
            if not name.startswith(only):
                for region, view in self._own(name):
                    gradient[region][view] = 0
        norm = self._norm(gradient)
        check_norm(norm, self.steps + 1)
        if self.cfg.max_grad_norm and norm > self.cfg.max_grad_norm:
            for part in gradient:
                part *= (self.cfg.max_grad_norm / (norm + 1e-6)).float()
        for region, part in enumerate(gradient):
            for chunk, slope in zip(self._params[region], self._chunks(part, region), strict=True):
                chunk.grad = slope
        rate = learning_rate(self.cfg, self.total_steps, self.steps if update is None else update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.gradient = None  # frees memory while sampling
        self.publish()
        check_weights(finite(self.parameters.values()), self.steps + 1)  # on all ranks alike: no rank waits for another
        self.steps += 1
        return {"grad_norm": Stat(norm.item()), "lr": Stat(rate)}

    def _norm(self, gradient: Sequence[torch.Tensor]) -> torch.Tensor:
        """The L2 norm of the whole gradient: the sum of its chunks' squares, in order, in float64."""
        squares = torch.zeros(2 * self.layout.chunks, dtype=torch.float64, device=gradient[0].device)
        for region, part in enumerate(gradient):
            if len(part):
                first = (self.spans[region][0] - self.layout.regions[region][0]) // self.layout.chunk_of(region)
                for number, chunk in enumerate(self._chunks(part, region), first + region * self.layout.chunks):
                    squares[number] = chunk.double().square().sum()
        total = torch.zeros((), dtype=torch.float64, device=squares.device)
        for square in self.group.join(squares):
            total += square
        return total.sqrt()

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainable tensors by name (views, not copies)."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Learner.assign`; every rank is given the same tensors."""
        for name, tensor in tensors.items():
            self._set(name, self.master, tensor)
        self.publish()

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
        """The state for `load`, named as by the learner without lanes: a checkpoint does not know lanes and ranks."""
        return named_state(self.layout, self.gathered(), self.steps)

    def gathered(self) -> dict[str, torch.Tensor]:
        """The whole vectors of the master weights ("model") and the moments; every rank must call it."""
        return {name: self.group.gather(self.layout, parts) for name, parts in self.kept.items()}

    @property
    def kept(self) -> dict[str, list[torch.Tensor]]:
        """This rank's share of everything that a checkpoint has."""
        return {"model": self.master, **self.moments}

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: JsonView) -> None:
        """Restores the state that `state` returned, bit-exact; every rank is given the same state."""
        check_names(tensors["model"], self.parameters)
        for name in self.parameters:
            self._set(name, self.master, tensors["model"][name])
            for kind, parts in self.moments.items():
                self._set(name, parts, tensors["optim"].get(f"{name}/{kind}"))  # none before the first update
        self.steps = int(state["steps"])
        self._share_moments(self.steps)
        self.publish()

    def _own(self, name: str) -> Iterator[tuple[int, slice]]:
        """Where this rank's share of a tensor lies: the region, and a slice of the rank's part of it."""
        place = self.layout.places[name]
        for region, (start, end) in enumerate(self.spans):
            first, last = max(start, place.start), min(end, place.start + place.shape.numel())
            if first < last:
                yield region, slice(first - start, last - start)

    def _set(self, name: str, parts: Sequence[torch.Tensor], tensor: torch.Tensor | None) -> None:
        """Copies this rank's share of a tensor into its parts; None is zeros."""
        place = self.layout.places[name]
        for region, view in self._own(name):
            if tensor is None:
                parts[region][view] = 0
                continue
            offset = self.spans[region][0] - place.start
            parts[region][view] = tensor.reshape(-1)[view.start + offset : view.stop + offset].to(parts[region])

    def _share_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """This rank's part of each region of a vector: views of it in a single process, which has the whole."""
        parts = [flat[start:end] for start, end in self.spans]
        return parts if self.group.ranks == 1 else [part.clone() for part in parts]

    def _chunks(self, part: torch.Tensor, region: int) -> list[torch.Tensor]:
        """The chunks of this rank's part of a region, in order."""
        return list(part.split(self.layout.chunk_of(region))) if len(part) else []

    def _share_moments(self, steps: int) -> None:
        """Makes the optimizer's state of each chunk a view of the flat moments, after `steps` updates."""
        for region, chunks in enumerate(self._params):
            views = [self._chunks(self.moments[kind][region], region) for kind in MOMENTS]
            for chunk, *parts in zip(chunks, *views, strict=True):
                count = torch.tensor(float(steps), device=chunk.device)
                self.optimizer.state[chunk] = {"step": count} | dict(zip(MOMENTS, parts, strict=True))

    def publish(self) -> None:
        """Copies the master weights of all ranks into the model's."""
        flat = self.group.gather(self.layout, self.master)
        with torch.no_grad():
            for name, view in self.layout.views(flat).items():
                self.parameters[name].copy_(view)


def named_state(
    layout: lanes.Layout, vectors: Mapping[str, torch.Tensor], steps: int
) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
    """A learner's state from the whole vectors of its master weights and moments."""
    optim: dict[str, torch.Tensor] = {}
    for kind in MOMENTS:
        optim |= {f"{name}/{kind}": view for name, view in layout.views(vectors[kind]).items()}
    optim |= {f"{name}/step": torch.tensor(float(steps)) for name in layout.places}
    return {"model": layout.views(vectors["model"]), "optim": optim}, {"steps": steps}
