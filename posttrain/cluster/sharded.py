"""Learner for models that do not fit into one process: weights, gradients and optimizer are sharded with FSDP2.

`ShardedLearner` has the verbs of `train/learner.py`. It is made in every process (rank) of a torch.distributed group,
and every rank must be called with the same arguments, in the same order; all ranks return the same results, except that
only rank 0 gets the tensors of `state`. Each decoder layer is one unit of `torch.distributed.fsdp.fully_shard` (Zhao et
al., arXiv 2304.11277): its weights are gathered before it is computed and freed afterwards, and its gradient is summed
over ranks. Embeddings, last norm and output layer are gathered for a whole pass.

Micro-batch i of a call is computed by rank i mod R. Collectives happen inside passes, so ranks must compute equally
many: in the last round, a rank without a micro-batch computes the first row of another one, with a gradient of zero.
So an error in a loss is shared before the backward pass and raised by every rank. One inside the model on a single rank
leaves the others waiting until the group's timeout.

The gradient is that of one process up to rounding, because the order of its sum depends on the number of ranks
(`gradient_difference` measures it). Checkpoints have the names and shapes of those of one process. Weights of lower
precision have float32 masters: these are sharded, and rounded when they are gathered.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain import rng
from posttrain.config import TrainConfig
from posttrain.data import batching
from posttrain.models.load import trainable
from posttrain.models.policy import Policy, by_rows, learner_mode
from posttrain.train.forward import Forward, per_token, planned, token_stats
from posttrain.train.learner import Loss
from posttrain.train.learners.local import LocalLearner
from posttrain.train.update import check_names, check_norm, check_weights, checked_loss, finite, learning_rate
from posttrain.types import Batch, ConfigError, Json, JsonView, Sample, Stat

T = TypeVar("T")


class Pass(nn.Module):
    """A forward pass as a module: FSDP gathers weights in hooks of a module's call, and a pass reads some directly."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.model, self.scalar = policy, policy.model, policy.scalar

    def forward(self, forward: Forward, batch: Batch, temperature: float, more: int = 0) -> tuple[torch.Tensor, ...]:
        """The outputs of `forward`; `more` is the number of additional calls of the decoder, which change nothing.

        They come first: ranks then agree in what they gather after the decoder, and before it in the backward pass.
        """
        if not more:
            return forward(self.policy, batch, temperature)
        tokens = batch.tokens[0, :2]
        hidden = by_rows(self.policy, tokens.repeat(more), torch.full((more,), len(tokens)))
        nothing = (hidden * torch.zeros_like(hidden)).sum().float()
        outputs = forward(self.policy, batch, temperature)
        return tuple(part + nothing if part.requires_grad else part for part in outputs)


class ShardedLearner:
    """Owns one rank's shards of a policy: its weights in float32, their gradients and AdamW's moments."""

    def __init__(
        self,
        policy: Policy,
        cfg: TrainConfig,
        total_steps: int,
        temperature: float = 1.0,
        forward: Forward = token_stats,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Shards the policy's model in place, layer by layer; on GPUs each layer is moved there before it is cut.

        `group` is that of the ranks, by default all processes. Raises ConfigError if the model cannot be sharded.
        """
        if cfg.lanes > 1:
            raise ConfigError(
                f"train.lanes={cfg.lanes} fixes the order in which gradients are added, which a sharded learner cannot "
                "keep. Set train.lanes = 1, or do not shard the model."
            )
        self.policy, self.cfg, self.temperature, self.total_steps = policy, cfg, temperature, total_steps
        self.forward, self.steps = forward, 0
        self.group = dist.group.WORLD if group is None else group
        assert self.group is not None, "torch.distributed has no process group"
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.dtypes = {name: parameter.dtype for name, parameter in trainable(policy).items()}
        on = "cuda" if dist.get_backend(self.group) == "nccl" else policy.device.type
        self.root = shard(policy, DeviceMesh.from_group(self.group, on))
        self.parameters = cast(dict[str, DTensor], trainable(policy))
        groups = [
            {"params": [p for p in self.parameters.values() if p.dim() >= 2], "weight_decay": cfg.weight_decay},
            {"params": [p for p in self.parameters.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(cfg.beta1, cfg.beta2), fused=True)

    def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See `Learner.logprobs`; micro-batches hold at most `train.micro_batch_tokens` tokens."""
        return per_token(samples, lambda rows: self.outputs(rows, token_stats))

    @torch.no_grad()
    def outputs(self, samples: Sequence[Sample], forward: Forward) -> list[np.ndarray]:
        """See `Learner.outputs`."""
        self.policy.model.eval()
        parts = planned(samples, self.cfg.micro_batch_tokens)
        batches: list[Batch] = []
        for part in parts:
            rows = [samples[i] for i in part]
            batches.append(batching.pad(rows, batching.loss_masks(rows).float()))
        mine: dict[int, np.ndarray] = {}
        for number, batch, more in self._rounds(batches):
            outputs = self.root(forward, batch, self.temperature, more)
            if number is not None:
                mine |= zip(parts[number], outputs[0].float().cpu().numpy(), strict=True)
        self.root.reshard()  # or the next pass would read weights of before the next update
        return self._gathered(mine, len(samples))

    def forward_backward(self, batches: Sequence[Batch], loss: Loss) -> list[dict[str, Stat]]:
        """See `Learner.forward_backward`. Raises the error of any rank's loss on all of them.

        The random numbers of a micro-batch depend on rank 0's generator and its number in the call, as with lanes.
        """
        if not batches:
            return []
        drawn = torch.randint(1 << 62, ()).to(self.policy.device)
        dist.broadcast(drawn, group=self.group, group_src=0)
        stats: dict[int, dict[str, Stat]] = {}
        try:
            for number, batch, more in self._rounds(batches):
                rng.seed_global("pass", int(drawn), -1 if number is None else number)
                made = self._pass(batch, more, loss if number is not None else None)
                stats |= {} if number is None else {number: made}
        except BaseException:
            self.root.reset_iter_state()
            raise
        rng.seed_global("after", int(drawn))
        return self._gathered(stats, len(batches))

    def _pass(self, batch: Batch, more: int, loss: Loss | None) -> dict[str, Stat]:
        """Adds the gradient of one micro-batch; without a loss, zeros."""
        learner_mode(self.policy)
        outputs = self.root(self.forward, batch, self.temperature, more)
        value = sum((part * torch.zeros_like(part)).sum() for part in outputs if part.requires_grad)
        stats, error = dict[str, Stat](), None
        if loss is not None:
            try:
                value, stats = checked_loss(outputs, batch, loss, self.steps + 1)
                if not value.requires_grad:
                    raise ValueError("the loss does not depend on the model's outputs, so it has no gradient.")
            except Exception as failure:  # raised below, by every rank
                error = failure
        self._agree(error)
        assert isinstance(value, torch.Tensor), "the forward pass has no output with a gradient"
        value.backward()
        return stats

    def _rounds(self, batches: Sequence[Batch]) -> Iterator[tuple[int | None, Batch, int]]:
        """This rank's micro-batches: number (None: a row that only keeps up), batch, additional calls of the decoder.

        Rows longer than the model's `route.reach` are computed by a call each, and ranks must make equally many calls.
        """
        for start in range(0, len(batches), self.ranks):
            round_ = batches[start : start + self.ranks]
            counts = [_calls(self.policy, batch) for batch in round_]
            if self.rank < len(round_):
                batch, number = round_[self.rank], start + self.rank
            else:
                batch, number = _first_row(round_[0]), None
            yield number, moved(batch, self.policy.device), max(counts) - _calls(self.policy, batch)

    def step(self, only: str = "", update: int | None = None) -> dict[str, Stat]:
        """See `Learner.step`."""
        total = torch.zeros((), dtype=torch.float64, device=self.policy.device)
        gradients: list[torch.Tensor] = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:  # no micro-batch used it; momentum and decay still apply
                parameter.grad = torch.zeros_like(parameter)
            assert isinstance(parameter.grad, DTensor)
            gradient = parameter.grad.to_local()
            if not name.startswith(only):
                gradient.zero_()
            total += gradient.double().square().sum()
            gradients.append(gradient)
        dist.all_reduce(total, group=self.group)
        norm = total.sqrt().float()
        check_norm(norm, self.steps + 1)
        if self.cfg.max_grad_norm:
            factor = (self.cfg.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor)
        rate = learning_rate(self.cfg, self.total_steps, self.steps if update is None else update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        odd = torch.tensor(float(not finite(p.to_local() for p in self.parameters.values())))
        dist.all_reduce(odd, group=self.group)
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        check_weights(not odd.item(), self.steps)
        return {"grad_norm": Stat(norm.item()), "lr": Stat(rate)}

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainable tensors by name, whole, on every rank: copies in the given model's precision."""
        return dict(self.tensors())

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of `weights` one at a time, so that only one need be whole. Every rank must take them all."""
        for name, parameter in self.parameters.items():
            yield name, _whole(parameter.to(self.dtypes[name]))

    @torch.no_grad()
    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Learner.assign`."""
        for name, tensor in tensors.items():
            self.parameters[name].copy_(_part(tensor.float(), self.parameters[name]))

    @torch.no_grad()
    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], Json]:
        """The state for `load`, named as by the learner of one process: whole tensors in the memory of rank 0's CPU.

        Every rank takes part; the others get no tensors.
        """
        model: dict[str, torch.Tensor] = {}
        optim: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            named = {f"{name}/{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
            for into, key, tensor in [(model, name, parameter), *((optim, k, v) for k, v in named.items())]:
                whole = _whole(tensor).cpu()
                if self.rank == 0:
                    into[key] = whole
        return {"model": model, "optim": optim}, {"steps": self.steps}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: JsonView) -> None:
        """Restores the state that `state` returned, of any number of ranks or of one process, bit-exact.

        Every rank needs all tensors, best mapped from a file: each is read alone, and only the rank's part is kept.
        """
        check_names(tensors["model"], self.parameters)
        kept: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors["optim"].items():
            name, _, kind = key.rpartition("/")
            like = self.parameters[name]
            part = (
                _part(value, like) if value.shape == like.shape and kind != "step" else value.to(like.device, copy=True)
            )
            kept.setdefault(name, {})[kind] = part
        for name, parameter in self.parameters.items():
            parameter.copy_(_part(tensors["model"][name], parameter))
            if name in kept:
                self.optimizer.state[parameter] = kept[name]
        self.steps = int(state["steps"])

    def _agree(self, error: Exception | None) -> None:
        """Raises an error of any rank on all of them."""
        failed = torch.tensor(int(error is not None), device=self.policy.device)
        dist.all_reduce(failed, group=self.group)
        if failed:
            errors = [e for e in self._of_ranks(None if error is None else _portable(error)) if e is not None]
            raise errors[0]

    def _gathered(self, mine: Mapping[int, T], count: int) -> list[T]:
        """The results of all ranks by number, in order."""
        merged: dict[int, T] = {}
        for part in self._of_ranks(dict(mine)):
            merged |= part
        return [merged[number] for number in range(count)]

    def _of_ranks(self, mine: T) -> list[T]:
        out: list[Any] = [None] * self.ranks
        dist.all_gather_object(out, mine, group=self.group)
        return out


def shard(policy: Policy, mesh: DeviceMesh) -> Any:
    """Replaces the parameters of the policy's model with shards over the mesh; returns the `Pass` that computes them.

    Trainable parameters become float32. Raises ConfigError if layers share weights or have weights of mixed precision.
    """
    root, layers = Pass(policy), layers_of(policy)
    inside = {id(module) for layer in layers for module in layer.modules()}
    units = [*layers, *([policy.scalar] if policy.scalar is not None else [])]
    inside |= {id(module) for module in (policy.scalar.modules() if policy.scalar is not None else ())}
    outside = [p for m in root.modules() if id(m) not in inside for p in m.parameters(recurse=False)]
    owned = [[*unit.parameters()] for unit in units] + [[*{id(p): p for p in outside}.values()]]
    if len({id(p) for own in owned for p in own}) < sum(map(len, owned)):
        raise ConfigError(f"model {policy.source!r} cannot be sharded: its layers share weights. Do not shard it.")
    for unit, own in zip([*units, root], owned, strict=True):
        fully_shard(unit, mesh=mesh, mp_policy=_precision(policy, own))
    assert isinstance(root, FSDPModule)
    root.set_gradient_divide_factor(1.0)  # sums, not means: weights of tokens are those of the whole batch
    root.set_force_sum_reduction_for_comms(True)
    root.set_reduce_scatter_unused_params(True)  # an expert may have no token on one rank
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def layers_of(policy: Policy) -> list[nn.Module]:
    """The decoder layers: transformers' checkpointed modules that are in no other one."""
    found = [m for m in policy.body.modules() if isinstance(m, GradientCheckpointingLayer)]
    nested = {id(inner) for layer in found for inner in layer.modules() if inner is not layer}
    return [layer for layer in found if id(layer) not in nested]


def gradient_difference(learner: ShardedLearner, whole: Policy | None, batches: Sequence[Batch], loss: Loss) -> float:
    """‖g − g₁‖ / ‖g₁‖: how far the sharded gradient g of an optimizer batch is from that of one process, g₁.

    `whole` is the same policy, not sharded. Rank 0 computes g₁ with it, so it must fit there; other ranks need none.
    The learner's gradient must be clear, and is cleared again.
    """
    single: dict[str, torch.Tensor | None] = {}
    if learner.rank == 0:
        assert whole is not None, "rank 0 needs the whole policy"
        one = LocalLearner(whole, learner.cfg, 1, learner.temperature, learner.forward)
        one.forward_backward(batches, loss)
        for name, master in one.master.items():
            single[name], master.grad = master.grad, None
    learner.forward_backward(batches, loss)
    sums = torch.zeros(2, dtype=torch.float64, device=learner.policy.device)
    for name, parameter in learner.parameters.items():
        expected = single.get(name)
        if expected is None:  # not used by any micro-batch, or sent by rank 0
            expected = torch.zeros(parameter.shape, device=parameter.device)
        wanted = distribute_tensor(expected, parameter.device_mesh, parameter.placements).to_local().double()
        gradient = cast(DTensor | None, parameter.grad)
        made = torch.zeros_like(wanted) if gradient is None else gradient.to_local().double()
        sums += torch.stack([(made - wanted).square().sum(), wanted.square().sum()])
        parameter.grad = None
    dist.all_reduce(sums, group=learner.group)
    return float((sums[0] / sums[1]).sqrt())


def _precision(policy: Policy, parameters: Sequence[nn.Parameter]) -> MixedPrecisionPolicy:
    """Makes trainable parameters float32 and returns the precision in which they are gathered and reduced."""
    trained = [p for p in parameters if p.requires_grad]
    kinds = {p.dtype for p in trained}
    low = kinds - {torch.float32}
    if len(kinds) > 1 or (low and {p.dtype for p in parameters} != low):
        names = ", ".join(sorted(str(p).removeprefix("torch.") for p in {p.dtype for p in parameters}))
        raise ConfigError(
            f"model {policy.source!r} cannot be sharded: a layer has weights in {names}. Do not shard it."
        )
    for parameter in trained:
        parameter.grad = None
        parameter.data = parameter.data.float()
    return MixedPrecisionPolicy(
        param_dtype=low.pop() if low else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _calls(policy: Policy, batch: Batch) -> int:
    """How often a pass calls the decoder (models/policy.py:states)."""
    lengths = batch.real.sum(1)
    return len(lengths) if int(lengths.max()) > policy.route.reach else 1


def _first_row(batch: Batch) -> Batch:
    """The batch's first row alone."""
    tensors = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **{name: value[:1] for name, value in tensors.items()}, shared=(), rows=batch.rows[:1])


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    tensors = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **{name: value.to(device) for name, value in tensors.items()})


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from all ranks if it is sharded; not shared with the optimizer."""
    return tensor.full_tensor().detach().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def _part(whole: torch.Tensor, like: DTensor) -> Any:
    """A copy of this rank's shard of a whole tensor, cut as `like`; no rank sends anything."""
    return distribute_tensor(
        whole.detach().to(like.dtype), like.device_mesh, like.placements, src_data_rank=None
    ).clone()  # the shard alone, not a view that keeps the whole alive


def _portable(error: Exception) -> Exception:
    """The error itself if it can be sent to another process, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class's own constructor makes of it
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
