"""In-process learner whose gradients are added in lanes (train/lanes.py), as several processes would add them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from posttrain import rng
from posttrain.config import TrainConfig
from posttrain.models.load import Policy, trainable
from posttrain.train import lanes
from posttrain.train.forward import Forward, sample_logprobs
from posttrain.train.learner import Loss
from posttrain.train.update import backward, check_names, check_norm, learning_rate
from posttrain.types import Batch, Json, JsonView, Sample, Stat

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per element


class LaneLearner:
    """Owns the optimizer of one policy: float32 master weights, moments and gradient as flat vectors in chunks."""

    def __init__(
        self, policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float, forward: Forward
    ) -> None:
        self.policy, self.cfg, self.temperature, self.total_steps = policy, cfg, temperature, total_steps
        self.forward = forward
        self.steps = 0
        self.parameters = trainable(policy)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.layout = lanes.Layout({name: p.shape for name, p in self.parameters.items()}, cfg.lanes)
        self.master = self.layout.flat({n: p.detach() for n, p in self.parameters.items()}, policy.device)
        self.moments = {name: torch.zeros_like(self.master) for name in MOMENTS}
        self.gradient: torch.Tensor | None = None  # of the calls of `forward_backward` since the last step
        self._chunks = list(self.layout.parts(self.master))
        groups = [
            {"params": [chunk for chunk, decays in self._chunks if decays], "weight_decay": cfg.weight_decay},
            {"params": [chunk for chunk, decays in self._chunks if not decays], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(cfg.beta1, cfg.beta2), fused=True)
        self._share_moments(0)

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See `Learner.logprobs`; micro-batches hold at most `train.micro_batch_tokens` tokens."""
        return sample_logprobs(self.policy, samples, self.cfg.micro_batch_tokens, self.temperature)

    def forward_backward(self, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """See `Learner.forward_backward`. The random numbers of a micro-batch depend on its number in the call only."""
        if not batches:
            return []
        stats: list[dict[str, Stat]] = [{} for _ in batches]
        drawn = int(torch.randint(1 << 62, ()))

        def sums() -> Iterator[torch.Tensor]:
            for numbers in lanes.order(len(batches), self.cfg.lanes):
                if not numbers:
                    continue  # zeros, which change no sum
                total = torch.zeros_like(self.master)
                for number in numbers:
                    rng.seed_global("pass", drawn, number)
                    stats[number] = backward(
                        self.policy, batches[number], loss, self.forward, self.temperature, self.steps + 1
                    )
                    self._add_gradients(total)
                yield total

        total = lanes.tree(sums())
        self.gradient = total if self.gradient is None else self.gradient.add_(total)
        rng.seed_global("after", drawn)
        return stats

    def _add_gradients(self, total: torch.Tensor) -> None:
        """Moves the parameters' gradients into a lane's sum."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.layout.places[name].view(total).add_(parameter.grad)
                parameter.grad = None

    def step(self, only: str = "", update: int | None = None) -> dict[str, Stat]:
        """See `Learner.step`."""
        gradient = torch.zeros_like(self.master) if self.gradient is None else self.gradient
        for name, view in self.layout.views(gradient).items():
            if not name.startswith(only):
                view.zero_()
        norm = self.layout.norm(gradient)
        check_norm(norm, self.steps + 1)
        if self.cfg.max_grad_norm and norm > self.cfg.max_grad_norm:
            gradient *= (self.cfg.max_grad_norm / (norm + 1e-6)).float()
        for (chunk, _), (part, _) in zip(self._chunks, self.layout.parts(gradient), strict=True):
            chunk.grad = part
        rate = learning_rate(self.cfg, self.total_steps, self.steps if update is None else update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.gradient = None  # frees memory while sampling
        self._publish()
        self.steps += 1
        return {"grad_norm": Stat(norm.item()), "lr": Stat(rate)}

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainable tensors by name (views, not copies)."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
        """The state for `load`, named as by the learner without lanes: a checkpoint does not know the lanes."""
        optim: dict[str, torch.Tensor] = {}
        for kind, flat in self.moments.items():
            optim |= {f"{name}/{kind}": view for name, view in self.layout.views(flat).items()}
        optim |= {f"{name}/step": torch.tensor(float(self.steps)) for name in self.parameters}
        return {"model": self.layout.views(self.master), "optim": optim}, {"steps": self.steps}

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: JsonView) -> None:
        """Restores the state that `state` returned, bit-exact."""
        check_names(tensors["model"], self.parameters)
        for name, view in self.layout.views(self.master).items():
            view.copy_(tensors["model"][name])
        for kind, flat in self.moments.items():
            for name, view in self.layout.views(flat).items():
                kept = tensors["optim"].get(f"{name}/{kind}")
                view.zero_() if kept is None else view.copy_(kept)  # none before the first update
        self.steps = int(state["steps"])
        self._share_moments(self.steps)
        self._publish()

    def _share_moments(self, steps: int) -> None:
        """Makes the optimizer's state of each chunk a view of the flat moments, after `steps` updates."""
        views = [self.layout.parts(self.moments[kind]) for kind in MOMENTS]
        for (chunk, _), *parts in zip(self._chunks, *views, strict=True):
            count = torch.tensor(float(steps), device=chunk.device)
            self.optimizer.state[chunk] = {"step": count} | {k: p for k, (p, _) in zip(MOMENTS, parts, strict=True)}

    def _publish(self) -> None:
        """Copies the master weights into the model's."""
        with torch.no_grad():
            for name, view in self.layout.views(self.master).items():
                self.parameters[name].copy_(view)
