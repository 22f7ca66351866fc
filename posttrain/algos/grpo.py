"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300), the whole algorithm in one file.

For each task the policy writes a group of answers; a program scores them; an answer's advantage is its reward minus
the group's mean; the policy gradient makes better-than-average answers likelier, token by token. There is no critic
and, by default, no reference model.

What this file decides, and where implementations differ: advantages are not divided by the group's standard deviation
(Dr. GRPO) unless `normalise_std`; tokens are weighted equally over the whole optimizer batch (DAPO's token-mean) unless
`aggregate` says otherwise; the stop token is trained; answers cut by max_tokens are trained as they were scored; an
answer that could not be scored has weight 0. With `minibatches = 1` the update is strictly on-policy: `old_logp` is
`logp` itself, the ratio is 1 and nothing clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.collect import (
    Collector,
    check_failures,
    episode_rows,
    episode_stats,
    rewards_tensor,
    timings,
    to_sample,
    with_logp,
)
from posttrain.config import GRPORecipe
from posttrain.data import batching
from posttrain.evaluation import Examiner
from posttrain.models import lora
from posttrain.models.load import Policy, load_policy
from posttrain.objectives.advantages import flat_groups, group_relative
from posttrain.objectives.policy import clip, is_correction, reinforce
from posttrain.objectives.tokens import kl_k3
from posttrain.prepare import Job, OnStep, Setup, final_answer, judged_tasks, make_collector
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import Event, Run
from posttrain.train.forward import sample_logprobs
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner, Loss
from posttrain.types import Batch, Sample, Stat, Task, TrainingDiverged, add_stats

POLICY_LOSSES = {"clip": clip, "reinforce": reinforce}


def prepare(setup: Setup) -> Job:
    """The job of a recipe: judged tasks, a collector on the policy being trained, an examination."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = make_collector(policy, setup.chat, verify, recipe)
    examine = Examiner(collector, sets.test, recipe.eval.samples, recipe.eval.temperature, final_answer)
    return Job(policy, sets.hash, sets.notes, lambda *rest: run(recipe, policy, collector, sets.train, examine, *rest))


def make_loss(recipe: GRPORecipe) -> Loss:
    """The loss of one pass: weighted per-token policy loss, optional sampler correction and KL to the reference."""
    cfg = recipe.algo

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:  # (B, T)
        mask = b.mask
        old_logp = logp.detach() if b.old_logp is None else b.old_logp
        per_token, clipped = POLICY_LOSSES[cfg.policy_loss](
            logp, old_logp, b.advantages, mask, cfg.clip_low, cfg.clip_high
        )
        if cfg.is_cap:
            per_token = per_token * is_correction(old_logp, b.behaviour_logp, mask, cfg.is_cap)
        stats = {"clipped": _mean(clipped.float(), mask), "entropy": _mean(entropy, mask)}
        if b.ref_logp is not None:
            kl = kl_k3(torch.where(mask, logp, 0), torch.where(mask, b.ref_logp, 0))
            per_token = per_token + cfg.kl_coef * kl
            stats["kl"] = _mean(kl, mask)
        gap = (old_logp - b.behaviour_logp).abs()[mask]
        stats["mismatch"] = Stat(gap.max().item() if gap.numel() else 0.0, 1, "max")
        stats["mismatch_mean"] = Stat(gap.sum().item(), gap.numel())
        return (b.weights * per_token).sum(), stats

    return loss


def run(
    recipe: GRPORecipe,
    policy: Policy,
    collector: Collector,
    train_tasks: Sequence[Task],
    examine: Examiner,
    store: Run,
    on_step: OnStep,
    interrupt: Interrupt,
) -> dict[str, Any] | None:
    """Trains until `train.steps`, from the run's newest checkpoint if it has one.

    Everything random is a function of (run.seed, step, task, attempt), so a run that was killed anywhere and resumed
    ends with the same bits. Returns the summary, or None when `interrupt` asked it to stop (saved, resumable).
    """
    cfg, seed = recipe.algo, recipe.run.seed
    learner = Learner(policy, recipe.train, recipe.train.steps * cfg.minibatches, recipe.rollout.temperature)
    reference = make_reference(recipe, policy)
    loss = make_loss(recipe)
    step, flat_steps = 0, 0
    if saved := checkpoint.latest(store.folder):
        tensors, state = checkpoint.load(saved)
        learner.load(tensors, state["learner"])
        step, flat_steps = state["step"], state["flat_steps"]

    if step == 0:
        values, rows = examine(0)
        store.write(0, values, {}, rows)
        on_step(0, values)

    while step < recipe.train.steps and not interrupt.requested:
        failpoint("step:start")
        start = time.monotonic()
        collector.generator.load(learner.weights(), version=step)
        tasks = [train_tasks[i] for i in rng.draw_order(len(train_tasks), step * cfg.prompts, cfg.prompts, seed)]
        groups = collector.groups(tasks, cfg.group_size, step)  # P lists of G episodes
        check_failures(groups, recipe.reward.max_failure_rate)
        sampled = time.monotonic()
        failpoint("step:rollouts-done")

        rewards = rewards_tensor(groups)  # (P, G)
        advantages = group_relative(rewards, std=cfg.normalise_std)  # (P, G)
        flat = flat_groups(rewards)  # (P,)
        samples = [
            to_sample(e, float(a))
            for g, row in zip(groups, advantages, strict=True)
            for e, a in zip(g, row, strict=True)
        ]
        if cfg.minibatches > 1:  # several updates per batch: remember the policy before the first
            samples = with_logp(samples, "old_logp", learner.sample_logprobs)
        if reference is not None:
            samples = with_logp(samples, "ref_logp", reference)

        rng.seed_global(seed, "update", step)  # dropout, if the model has any
        stats = [episode_stats(groups, int(flat.sum()))]
        for minibatch in batching.minibatches(samples, cfg.minibatches, rng.key(seed, "minibatch", step)):
            batches = batching.micro(
                minibatch,
                recipe.train.tokens_per_pass,
                cfg.aggregate,
                recipe.rollout.max_tokens,
                policy.device,
                skip_zero_advantage=reference is None,  # without KL, a row with advantage 0 has gradient 0
            )
            stats += [learner.forward_backward(batch, loss) for batch in batches]
            if batches:  # without a signal nothing moves, momentum included
                stats.append(learner.step())
        step += 1
        flat_steps = flat_steps + 1 if bool(flat.all()) else 0
        failpoint("step:updated")

        values = {name: stat.value for name, stat in add_stats(stats).items()}
        times = timings(groups, start, sampled)
        rows = episode_rows("train", step, groups, tasks, advantages)
        if step == recipe.train.steps or (recipe.eval.every and step % recipe.eval.every == 0):
            measured, eval_rows = examine(step)
            values, rows = values | measured, rows + eval_rows
        failpoint("step:before-store")
        store.write(step, values, times, rows, _events(values, flat_steps))
        failpoint("step:after-store")
        on_step(step, values | times)
        _stop_if_hopeless(recipe, step, values, flat_steps)
        if step % recipe.run.checkpoint_every == 0 or step == recipe.train.steps or interrupt.requested:
            failpoint("step:before-checkpoint")
            tensors, state = learner.state()
            whole = {"step": step, "flat_steps": flat_steps, "learner": state}
            checkpoint.save(store.folder, step, tensors, whole, recipe.run.keep)
            failpoint("step:after-checkpoint")
    if step < recipe.train.steps:
        return None
    before, after = ({name: v for at, name, v in store.metrics() if at == which} for which in (0, step))
    return {"steps": step, "before": before, "after": after, "weights": checkpoint.weights_digest(learner.weights())}


def make_reference(recipe: GRPORecipe, policy: Policy) -> Callable[[Sequence[Sample]], list[np.ndarray]] | None:
    """Log-probabilities under the starting model: adapters switched off, or a frozen second copy; None without KL."""
    if not recipe.algo.kl_coef:
        return None
    room, temperature = recipe.train.tokens_per_pass, recipe.rollout.temperature
    if recipe.model.lora_rank:

        def adapters_off(samples: Sequence[Sample]) -> list[np.ndarray]:
            with lora.disabled(policy.model):
                return sample_logprobs(policy, samples, room, temperature)

        return adapters_off
    frozen = load_policy(recipe.model, str(policy.device))
    frozen.model.requires_grad_(False)
    return lambda samples: sample_logprobs(frozen, samples, room, temperature)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> Stat:
    return Stat(torch.where(mask, values, 0).sum().item(), int(mask.sum()))


def _events(values: dict[str, float], flat_steps: int) -> list[Event]:
    """What a person should know about this step."""
    events: list[Event] = []
    if values["unscored"]:
        events.append(Event("warning", "unscored", f"{values['unscored']:.0f} attempts could not be scored."))
    if flat_steps >= 3:
        events.append(Event("warning", "flat", f"No group had differing rewards for {flat_steps} steps in a row."))
    return events


def _stop_if_hopeless(recipe: GRPORecipe, step: int, values: dict[str, float], flat_steps: int) -> None:
    """Raises TrainingDiverged when sampler and learner disagree, or when nothing has been learnable for long."""
    if values.get("mismatch", 0.0) > recipe.algo.max_mismatch:
        raise TrainingDiverged(
            f"step {step}: sampler and learner differ by {values['mismatch']:.3g} in a token's log-probability "
            f"(allowed: algo.max_mismatch={recipe.algo.max_mismatch}). The rollouts are not from this policy."
        )
    if flat_steps >= recipe.algo.max_flat_steps:
        raise TrainingDiverged(
            f"step {step}: in the last {flat_steps} steps every group's answers had equal rewards (mean "
            f"{values['reward']:.3g}), so nothing was learned. Use easier or harder tasks, a larger "
            "algo.group_size, or a reward that tells answers apart."
        )
