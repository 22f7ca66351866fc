"""In-process learner: gradient accumulation and AdamW with float32 master weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from posttrain.config import TrainConfig
from posttrain.models.load import Policy, trainable
from posttrain.train.forward import Forward, outputs, sample_logprobs, token_stats
from posttrain.train.lane_learner import LaneLearner
from posttrain.train.learner import Learner, Loss
from posttrain.train.update import backward, check_names, check_norm, check_weights, finite, learning_rate
from posttrain.types import Batch, Json, JsonView, Sample, Stat


class LocalLearner:
    """Owns the optimizer of one policy. bf16 weights have an fp32 master copy that the optimizer updates."""

    def __init__(
        self,
        policy: Policy,
        cfg: TrainConfig,
        total_steps: int,
        temperature: float = 1.0,
        forward: Forward = token_stats,
    ) -> None:
        self.policy, self.cfg, self.temperature, self.total_steps = policy, cfg, temperature, total_steps
        self.forward = forward
        self.steps = 0
        self.parameters = trainable(policy)
        self.master = {
            n: p.detach().float().clone() if p.dtype != torch.float32 else p for n, p in self.parameters.items()
        }
        for parameter in [*self.parameters.values(), *self.master.values()]:
            parameter.grad = None
        groups = [
            {"params": [m for m in self.master.values() if m.dim() >= 2], "weight_decay": cfg.weight_decay},
            {"params": [m for m in self.master.values() if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(cfg.beta1, cfg.beta2), fused=True)

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See `Learner.logprobs`; micro-batches hold at most `train.micro_batch_tokens` tokens."""
        return sample_logprobs(self.policy, samples, self.cfg.micro_batch_tokens, self.temperature)

    def outputs(self, samples: Sequence[Sample], forward: Forward) -> list[np.ndarray]:
        """See `Learner.outputs`."""
        return outputs(self.policy, samples, self.cfg.micro_batch_tokens, forward, self.temperature)

    def forward_backward(self, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """See `Learner.forward_backward`."""
        return [self._pass(batch, loss) for batch in batches]

    def _pass(self, batch: Batch, loss: Loss) -> dict[str, Stat]:
        """Accumulates the gradient of one micro-batch. Raises TrainingDiverged on a non-finite loss."""
        stats = backward(self.policy, batch, loss, self.forward, self.temperature, self.steps + 1)
        for name, parameter in self.parameters.items():
            master = self.master[name]
            if master is not parameter and parameter.grad is not None:
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None
        return stats

    def step(self, only: str = "", update: int | None = None) -> dict[str, Stat]:
        """See `Learner.step`."""
        for name, master in self.master.items():
            if not name.startswith(only) and master.grad is not None:
                master.grad.zero_()
        masters = list(self.master.values())
        for master in masters:
            if master.grad is None:  # no micro-batch used it; momentum and decay still apply
                master.grad = torch.zeros_like(master)
        norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        check_norm(norm, self.steps + 1)
        if self.cfg.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(masters, self.cfg.max_grad_norm, norm)
        rate = self.learning_rate(self.steps if update is None else update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        torch.autograd.graph.increment_version(masters)  # fused AdamW does not bump tensor versions
        check_weights(finite(masters), self.steps + 1)
        self._publish()
        self.optimizer.zero_grad(set_to_none=True)  # frees memory while sampling
        self.steps += 1
        return {"grad_norm": Stat(norm.item()), "lr": Stat(rate)}

    def learning_rate(self, step: int) -> float:
        """Learning rate of planned update `step` (from 0)."""
        return learning_rate(self.cfg, self.total_steps, step)

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainable tensors by name (views, not copies)."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Learner.assign`."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.master[name].copy_(tensor)
        self._publish()

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
        """The state for `load`: tensors by file, and small JSON values."""
        optim: dict[str, torch.Tensor] = {}
        for name, master in self.master.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                optim[f"{name}/{key}"] = value
        model = {name: master.detach() for name, master in self.master.items()}
        return {"model": model, "optim": optim}, {"steps": self.steps}

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: JsonView) -> None:
        """Restores the state that `state` returned, bit-exact."""
        check_names(tensors["model"], self.master)
        with torch.no_grad():
            for name, master in self.master.items():
                master.copy_(tensors["model"][name])
                kept = {
                    key.rsplit("/", 1)[1]: value.to(master.device, copy=True)
                    for key, value in tensors["optim"].items()
                    if key.rsplit("/", 1)[0] == name
                }
                if kept:
                    self.optimizer.state[master] = kept
        self.steps = int(state["steps"])
        self._publish()

    def _publish(self) -> None:
        """Copies fp32 master weights into the lower-precision weights."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.master[name] is not parameter:
                    parameter.copy_(self.master[name])


def make(policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float, forward: Forward) -> Learner:
    """Makes the learner for `train.learner = "local"`; with `train.lanes` above 1, the one that adds in lanes."""
    made = LaneLearner if cfg.lanes > 1 else LocalLearner
    return made(policy, cfg, total_steps, temperature, forward)
