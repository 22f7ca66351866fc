"""The learner's five verbs in one process: `logprobs`, `forward_backward`, `step`, `weights`, `state`/`load`.

The loss is the algorithm's own function of (B, T) tensors. The model underneath runs packed: no padding token goes
through a linear layer, and log-probabilities come from a chunked projection of the trained positions only. Gradients
of all passes are summed; `step` applies them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from posttrain.config import TrainConfig
from posttrain.data import batching
from posttrain.models.attention import Packed
from posttrain.models.load import Policy, hidden_states, trainable
from posttrain.objectives.tokens import select
from posttrain.types import Batch, ResumeError, Sample, Stat, TrainingDiverged

Loss = Callable[[torch.Tensor, torch.Tensor, Batch], tuple[torch.Tensor, dict[str, Stat]]]
"""loss(logp (B, T), entropy (B, T), batch) → (scalar already weighted over the optimizer batch, stats)."""

LOGITS_PER_CHUNK = 1 << 24  # elements of a (tokens, vocabulary) block held at once, 64 MiB in fp32


def token_stats(policy: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (B, T) of the trained tokens, 0 elsewhere; differentiable."""
    layout = Packed(batch.real.sum(1))
    tokens = batch.tokens[batch.real]
    hidden = hidden_states(policy, tokens.unsqueeze(0), layout.positions, layout)[0]
    where = batch.mask[batch.real].nonzero().squeeze(1)  # packed positions of trained tokens
    logp, entropy = _project(policy, hidden.index_select(0, where - 1), tokens[where], temperature)
    blank = torch.zeros(batch.tokens.shape, dtype=logp.dtype, device=logp.device)
    return blank.masked_scatter(batch.mask, logp), blank.masked_scatter(batch.mask, entropy.detach())


def _project(
    policy: Policy, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (K, width), targets (K,) → logp (K,), entropy (K,) without ever holding all (K, V) logits."""

    def chunk(part: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return select(policy.head(part), wanted, temperature)

    size = max(1, LOGITS_PER_CHUNK // policy.vocab)
    if len(hidden) <= size:
        return chunk(hidden, targets)
    parts = [
        checkpoint(chunk, part, wanted, use_reentrant=False)
        for part, wanted in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])  # type: ignore[misc]


@torch.no_grad()
def logprobs(policy: Policy, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """(B, T) log-probabilities of the trained tokens under a policy, 0 elsewhere, without gradient."""
    policy.model.eval()
    return token_stats(policy, batch, temperature)[0]


def sample_logprobs(
    policy: Policy, samples: Sequence[Sample], tokens_per_pass: int, temperature: float = 1.0
) -> list[np.ndarray]:
    """Per-token log-probabilities [L] float32 of each sample's trained tokens under a policy, in the order given."""
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples)
    for part in batching.passes([len(s.tokens) for s in samples], tokens_per_pass):
        rows = [samples[i] for i in part]
        batch = batching.pad(rows, batching.loss_masks(rows).float(), policy.device)
        for i, row in zip(part, logprobs(policy, batch, temperature).cpu().numpy(), strict=True):
            out[i] = row[: len(samples[i].tokens)].astype(np.float32)
    return out


class Learner:
    """Owns the optimizer of one policy. Weights in bf16 get an fp32 master copy that the optimizer updates."""

    def __init__(self, policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float = 1.0) -> None:
        self.policy, self.cfg, self.temperature, self.total_steps = policy, cfg, temperature, total_steps
        self.steps = 0
        self.parameters = trainable(policy)
        self.master = {
            n: p.detach().float().clone() if p.dtype != torch.float32 else p for n, p in self.parameters.items()
        }
        for master in self.master.values():
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [m for m in self.master.values() if m.dim() >= 2], "weight_decay": cfg.weight_decay},
            {"params": [m for m in self.master.values() if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(cfg.beta1, cfg.beta2), fused=True)

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """(B, T) log-probabilities under the current weights, without gradient."""
        return logprobs(self.policy, batch, self.temperature)

    def sample_logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """The same for whole samples of any number: per-token [L] float32 arrays, in the order given."""
        return sample_logprobs(self.policy, samples, self.cfg.tokens_per_pass, self.temperature)

    def forward_backward(self, batch: Batch, loss: Loss) -> dict[str, Stat]:
        """Adds one pass's gradient. Raises TrainingDiverged on a loss that is not finite; nothing is applied."""
        self.policy.model.train()
        logp, entropy = token_stats(self.policy, batch, self.temperature)
        value, stats = loss(logp, entropy, batch)
        if not torch.isfinite(value):
            rows = (~torch.isfinite(logp)).any(1).nonzero().flatten().tolist()
            raise TrainingDiverged(
                f"the loss of update {self.steps + 1} is {value.item()} (rows with non-finite log-probabilities: "
                f"{rows or 'none'}). The update was not applied; lower train.lr or inspect the step's episodes."
            )
        value.backward()
        for name, parameter in self.parameters.items():
            master = self.master[name]
            if master is not parameter and parameter.grad is not None:
                assert master.grad is not None
                master.grad += parameter.grad
                parameter.grad = None
        return {"loss": Stat(value.item(), 1, "sum"), **stats}

    def step(self) -> dict[str, Stat]:
        """Applies the summed gradient once and clears it; returns its norm and the learning rate used."""
        masters = list(self.master.values())
        norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        if not torch.isfinite(norm):
            raise TrainingDiverged(
                f"the gradient norm of update {self.steps + 1} is {norm.item()}. The update was not applied; "
                "lower train.lr or set train.max_grad_norm."
            )
        if self.cfg.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(masters, self.cfg.max_grad_norm, norm)
        rate = self.learning_rate(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._publish()
        for master in masters:
            assert master.grad is not None
            master.grad.zero_()
        self.steps += 1
        return {"grad_norm": Stat(norm.item()), "lr": Stat(rate)}

    def learning_rate(self, step: int) -> float:
        """The rate of update `step` (from 0): linear warm-up, then constant, linear or cosine to 0."""
        cfg = self.cfg
        if step < cfg.warmup_steps:
            return cfg.lr * (step + 1) / cfg.warmup_steps
        done = (step - cfg.warmup_steps) / max(1, self.total_steps - cfg.warmup_steps)
        if cfg.schedule == "linear":
            return cfg.lr * max(0.0, 1 - done)
        if cfg.schedule == "cosine":
            return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return cfg.lr

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name (views, not copies)."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Everything `load` needs: tensors by file, and small values for JSON."""
        optim: dict[str, torch.Tensor] = {}
        for name, master in self.master.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                optim[f"{name}/{key}"] = value
        model = {name: master.detach() for name, master in self.master.items()}
        return {"model": model, "optim": optim}, {"steps": self.steps}

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
        """Restores what `state` gave, bit for bit."""
        if tensors["model"].keys() != self.master.keys():
            odd = sorted(tensors["model"].keys() ^ self.master.keys())
            raise ResumeError(f"the checkpoint does not fit the model: {len(odd)} names differ, first {odd[0]!r}.")
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
        """Copies fp32 masters into weights of lower precision."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.master[name] is not parameter:
                    parameter.copy_(self.master[name])
