"""Runs a sharded learner in 1, 2 and 4 processes and writes what it found.

`python -m tests.sharded_cases FOLDER MODELS`; MODELS is a JSON object: model → the numbers of processes with which all
losses are tried; with others it is one for each algorithm. Without numbers, only gradients of BRIEF are compared.

The processes are forked from one that has imported everything, because imports take longer than all the cases.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from bench import architectures, zoo
from posttrain import config
from posttrain.algos import distill, dpo, grpo, online_dpo, ppo, prm, raft, reward, sft
from posttrain.cluster.sharded import ShardedLearner, gradient_difference
from posttrain.config import ModelConfig, TrainConfig
from posttrain.data import batching
from posttrain.models import decoder
from posttrain.models.heads import attach_scalar
from posttrain.models.load import load_policy
from posttrain.models.lora import disabled
from posttrain.models.policy import Policy
from posttrain.objectives.distill import DIVERGENCES
from posttrain.objectives.policy import POLICY_LOSSES
from posttrain.objectives.preference import PAIR_LOSSES
from posttrain.train import forward as passes
from posttrain.train.forward import Forward, sample_logprobs, token_stats
from posttrain.train.learner import Loss
from posttrain.train.learners.local import LocalLearner
from posttrain.types import Batch, Sample, Stat, TrainingDiverged

RANKS = (1, 2, 4)
PATIENCE = 900  # seconds for all models with one number of processes
FEW, MANY = 110, 70  # micro_batch_tokens: mostly 3 micro-batches and 5, so that the last round is incomplete
CFG = TrainConfig(lr=1e-3, weight_decay=0.1, micro_batch_tokens=MANY, max_grad_norm=0.5)
HEADS = 3
Models = Mapping[str, tuple[Policy, Sequence[int]]]
Rows = Sequence[Sample]
Case = tuple[str, Forward, Loss, list[Batch]]
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 4},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 lora": {"dtype": "bfloat16", "lora_rank": 4},
    "checkpointing": {"gradient_checkpointing": True},
}
"""Variants of a model, `NAME, VARIANT`."""


def made(name: str, folder: Path) -> Policy:
    """A model with three scalar heads: `abacus` or one of bench/zoo.py, both with settings of SETTINGS."""
    name, _, variant = name.partition(", ")
    path = "abacus"
    if name != "abacus":
        of, settings = zoo.ZOO[name]
        path = str(folder / name.replace(" ", "-"))
        if not Path(path).exists():
            architectures.save(getattr(transformers, of)(**settings), Path(path))
    policy = load_policy(ModelConfig(path=path, **SETTINGS.get(variant, {})))
    return attach_scalar(policy, HEADS, 0)


@torch.no_grad()
def samples(policy: Policy, seed: int = 0) -> list[Sample]:
    """Ten sums with right and wrong answers and every optional field; rows 2i and 2i + 1 have the same prompt."""
    draw, out = np.random.default_rng(seed), list[Sample]()

    def tokens(*turns: tuple[str, str], begin: bool = False) -> list[int]:
        messages = [{"role": role, "content": text} for role, text in turns]
        text = policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin)
        return policy.tokenizer(text, add_special_tokens=False).input_ids

    numbers = draw.integers(2, 100, (5, 2)).tolist()
    for i in range(10):
        a, b = numbers[i // 2]
        question = ("user", f"What is {a} + {b}?")
        row = np.array(tokens(question, ("assistant", f"{a} + {b} = {a + b + i % 2}")))
        mask = (np.arange(len(row)) >= len(tokens(question, begin=True))) & (draw.random(len(row)) < 0.8)
        mask[-1] = True
        noise = draw.normal(0, 1, (2, len(row))).astype(np.float32)
        returns = (noise[1] > 0).astype(np.float32)
        out.append(
            Sample(row, mask, noise[0], np.where(mask, noise[1], 0), old_values=noise[0], returns=returns,
                   label=float(1 - i % 2), margin=float(abs(noise[1, 0])))
        )  # fmt: skip
    for i, logp in enumerate(sample_logprobs(policy, out, CFG.micro_batch_tokens)):
        near = [logp + draw.normal(0, 0.1, len(logp)).astype(np.float32) for _ in range(3)]
        out[i] = replace(out[i], behaviour_logp=near[0], old_logp=near[1], ref_logp=near[2])
    return out


def micro(rows: Rows, tokens: int, together: int = 1, share: bool = True) -> list[Batch]:
    return batching.micro(rows, tokens, "token-mean", together=together, share=share)


def grpo_cases(policy: Policy, rows: Rows) -> list[Case]:
    out: list[Case] = []
    for name in POLICY_LOSSES:
        more = {"algo.kl_coef": 0.1, "algo.entropy_coef": 0.01}
        recipe: Any = config.resolve("grpo", {}, {"algo.policy_loss": name, **more})
        out.append((name, passes.token_stats_with_entropy, grpo.make_loss(recipe), micro(rows, FEW)))
    return out


def ppo_cases(policy: Policy, rows: Rows) -> list[Case]:
    recipe: Any = config.resolve("ppo", {}, {"algo.entropy_coef": 0.01})
    one: Any = config.resolve("ppo", {}, {"algo.critic": "shared"})
    shown = [replace(row, returns=None) for row in rows]
    return [
        ("policy", ppo.make_forward(recipe.algo), ppo.policy_loss(recipe.algo), micro(rows, FEW)),
        ("critic", passes.token_values, ppo.critic_loss(recipe.algo), micro(rows, FEW)),
        ("shared", ppo.make_forward(one.algo), ppo.shared_loss(one.algo, False), micro(rows, FEW)),
        ("ptx", ppo.make_forward(one.algo), ppo.ptx_loss(0.5), micro(shown, FEW)),
    ]


def dpo_cases(policy: Policy, rows: Rows) -> list[Case]:
    out: list[Case] = []
    for name in (*PAIR_LOSSES, "kto"):
        recipe: Any = config.resolve("dpo", {}, {"algo.loss": name})
        loss = dpo.make_loss(recipe.algo, 0.1, torch.tensor(0.2) if name == "kto" else None)
        out.append((name, token_stats, loss, micro(rows, FEW, 1 if name == "kto" else 2)))
    return out


def online_dpo_cases(policy: Policy, rows: Rows) -> list[Case]:
    recipe: Any = config.resolve("online-dpo", {}, {})
    return [("", token_stats, online_dpo.make_loss(recipe.algo), micro(rows, FEW, 2))]


def reward_cases(policy: Policy, rows: Rows) -> list[Case]:
    recipe: Any = config.resolve("reward", {}, {"algo.heads": HEADS, "algo.centre_coef": 0.1})
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    batches = reward.pair_batches(pairs, FEW, policy.device)
    return [("", passes.row_scores, reward.make_loss(recipe.algo, torch.rand(len(pairs), HEADS)), batches)]


def sft_cases(policy: Policy, rows: Rows) -> list[Case]:
    noisy = [sft.seeded(batch, 0, 1) for batch in micro(rows, FEW, share=False)]
    return [
        ("", token_stats, sft.loss, micro(rows, FEW)),
        ("noisy", sft.noisy_forward(5.0), sft.loss, noisy),
    ]


def distill_cases(policy: Policy, rows: Rows) -> list[Case]:
    teacher = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.mul_(0.5)
    settings = [{"algo.divergence": name} for name in DIVERGENCES] + [{"algo.estimator": "sampled"}]
    out: list[Case] = []
    for given in settings:
        recipe: Any = config.resolve("distill", {}, {"algo.teacher": policy.source, **given})
        out.append((str(*given.values()), distill.make_forward(teacher, recipe.algo), distill.loss, micro(rows, FEW)))
    return out


CASES: dict[str, Callable[[Policy, Rows], list[Case]]] = {
    "grpo": grpo_cases,
    "sft": sft_cases,
    "dpo": dpo_cases,
    "online-dpo": online_dpo_cases,
    "reward": reward_cases,
    "prm": lambda policy, rows: [("", passes.step_scores, prm.loss, micro(rows, FEW))],
    "ppo": ppo_cases,
    "raft": lambda policy, rows: [("", token_stats, raft.loss, micro(rows, FEW))],
    "distill": distill_cases,
}
"""Algorithm → its losses, each with its forward pass and an optimizer batch."""
BRIEF = ("grpo", "sft", "reward")


def plain(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
    """The plain policy gradient; with the rows of the micro-batch, so that its place is seen."""
    return -(b.weights * b.advantages * logp).sum(), {"first_row": Stat(b.rows[0])}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def gradients(learner: ShardedLearner, whole: Policy, every: Sequence[int]) -> dict[str, float]:
    """The difference for each loss from one process without fused kernels, and for one loss from one with them.

    A sharded pass has none. Their rounding is as far from float64 as that of the plain pass is, 1e-6 to 5e-6.
    """
    found, rows, fits = dict[str, float](), samples(whole), decoder.fits
    for algorithm in CASES if every else BRIEF:
        for name, forward, loss, batches in CASES[algorithm](whole, rows)[: None if learner.ranks in every else 1]:
            assert len(batches) > 2
            learner.forward = forward
            decoder.fits = lambda body: False
            found[f"{algorithm} {name}".strip()] = gradient_difference(learner, whole, batches, loss)
            decoder.fits = fits
            if algorithm == "sft":
                found["fused"] = gradient_difference(learner, whole, batches, loss)
    learner.forward = token_stats
    return found


def updates(learner: ShardedLearner, one: LocalLearner) -> dict[str, Any]:
    """Three updates beside one process's; then log-probabilities, weights and what a step returns."""
    rows = samples(one.policy, 5)
    before = learner.logprobs(rows)
    found: dict[str, Any] = {"stats": True, "order": True, "norms": []}
    for step in range(3):
        batches = micro(samples(one.policy, step), MANY)
        ours, theirs = learner.forward_backward(batches, plain), one.forward_backward(batches, plain)
        found["order"] &= [s["first_row"] for s in ours] == [s["first_row"] for s in theirs]
        found["stats"] &= np.allclose([s["loss"].total for s in ours], [s["loss"].total for s in theirs], atol=1e-3)
        only = "" if step else next(iter(learner.parameters))
        made, wanted = learner.step(only, update=step), one.step(only, update=step)
        found["norms"].append([made["grad_norm"].total, wanted["grad_norm"].total])
        assert made["lr"] == wanted["lr"]
    expected = sample_logprobs(one.policy, rows, CFG.micro_batch_tokens)
    after = learner.logprobs(rows)
    weights = learner.weights()
    assert {n: (w.shape, w.dtype) for n, w in weights.items()} == {
        n: (w.shape, w.dtype) for n, w in one.weights().items()
    }
    found["moved"] = max(float(abs(a - b).max()) for a, b in zip(after, before, strict=True))
    found["logp"] = max(float(abs(a - b).max()) for a, b in zip(after, expected, strict=True))
    found["weights"] = max(float((weights[n] - w).abs().max()) for n, w in one.weights().items())
    scores = np.stack(learner.outputs(rows, passes.row_scores))
    found["scores"] = float(abs(scores - passes.sample_scores(one.policy, rows, CFG.micro_batch_tokens)).max())
    return found


def failures(learner: ShardedLearner, policy: Policy) -> list[str]:
    """What this rank raises if the loss of one micro-batch is not finite, or fails."""
    batches = micro(samples(policy), MANY)
    bad = batches[min(1, len(batches) - 1)].rows[0]

    def infinite(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> Any:
        value, stats = plain(logp, entropy, b)
        return value * (float("nan") if b.rows[0] == bad else 1.0), stats

    def failing(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> Any:
        if b.rows[0] == bad:
            raise KeyError("a loss of the user's")
        return plain(logp, entropy, b)

    said: list[str] = []
    for loss in (infinite, failing):
        try:
            learner.forward_backward(batches, loss)
        except (TrainingDiverged, KeyError) as error:
            said.append(f"{type(error).__name__}: {error}")
    for parameter in learner.parameters.values():
        parameter.grad = None
    said.append(str(np.isfinite(learner.forward_backward(batches, plain)[0]["loss"].total)))
    for parameter in learner.parameters.values():
        parameter.grad = None
    return said


def base_difference(learner: ShardedLearner, whole: Policy) -> float:
    """How far log-probabilities with adapters disabled are from one process's."""
    rows = samples(whole, 7)

    def base(policy: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, ...]:
        with disabled(policy.model):
            return token_stats(policy, batch, temperature)

    ours = learner.outputs(rows, base)
    with disabled(whole.model):
        theirs = sample_logprobs(whole, rows, CFG.micro_batch_tokens)
    return max(float(abs(a[: len(b)] - b).max()) for a, b in zip(ours, theirs, strict=True))


def save(folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], small: Any) -> None:
    folder.mkdir()
    for kind, of in tensors.items():
        save_file(dict(of), folder / kind)
    (folder / "small.json").write_text(json.dumps(small))


def load(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], Any]:
    return {kind: load_file(folder / kind) for kind in ("model", "optim")}, json.loads(
        (folder / "small.json").read_text()
    )


def checkpoints(name: str, learner: ShardedLearner, one: LocalLearner, folder: Path) -> bool:
    """Loads the checkpoint of half as many ranks, the first that of one process, and writes it again.

    Returns whether a learner restored from it repeats its next update.
    """
    here, before = folder / f"{name}-{learner.ranks}", folder / f"{name}-{learner.ranks // 2}"
    if learner.ranks == 1:
        save(before, *one.state())
    learner.load(*load(before))
    tensors, small = learner.state()
    if learner.rank == 0:
        save(here, tensors, small)
    else:
        assert tensors == {"model": {}, "optim": {}}
    dist.barrier()
    batches, ended = micro(samples(one.policy, 9), MANY), list[list[torch.Tensor]]()
    for _ in range(2):
        learner.load(*load(here))
        learner.forward_backward(batches, plain)
        learner.step()
        ended.append([parameter.to_local().clone() for parameter in learner.parameters.values()])
    return all(torch.equal(a, b) for a, b in zip(*ended, strict=True))


def of_model(name: str, policy: Policy, every: Sequence[int], folder: Path) -> dict[str, Any]:
    """Everything about one model, on this rank; the state is written to and read from the folder."""
    start = time.perf_counter()
    torch.manual_seed(0)
    whole = copy.deepcopy(policy)
    learner = ShardedLearner(policy, CFG, 10)
    found: dict[str, Any] = {"route": whole.route.reach}
    if "bfloat16" not in name:
        found["gradients"] = gradients(learner, whole, every)
    if "lora" in name:
        found["base"] = base_difference(learner, whole)
    if every:
        one = LocalLearner(whole, CFG, 10)
        found["updates"] = updates(learner, one)
        found["failures"] = failures(learner, whole)
        found["resumed"] = checkpoints(name, learner, one, folder)
    return found | {"seconds": time.perf_counter() - start}


def rank(number: int, ranks: int, folder: Path, models: Models) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # where it hangs, if it does
    store = FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=number, world_size=ranks, timeout=timedelta(seconds=60))
    found = {name: of_model(name, policy, every, folder) for name, (policy, every) in models.items()}
    (folder / f"found-{ranks}-{number}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path, models: Mapping[str, Sequence[int]]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    tqdm.monitor_interval = 0  # no thread but this one may be running when processes are forked
    loaded = {name: (made(name, folder), every) for name, every in models.items()}
    for ranks in RANKS:
        start_processes(rank, (ranks, folder, loaded), nprocs=ranks, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
