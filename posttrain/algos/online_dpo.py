"""Online DPO (OAIF, arXiv 2402.04792): DPO on answers the policy has just written. The whole algorithm in one file.

Each step the policy writes a group of answers to each task, a verifier or a reward model judges them, and the best and
the worst of a group become a pair for a DPO loss against the frozen starting model.

What this file decides, and where implementations differ: the update is made once per batch of answers, so the pairs are
always the current policy's; of several best (or worst) answers the first written is taken; a group whose scored
answers all have one reward gives no pair and is counted, and the other pairs weigh 1/N for the N that are left; the
tokens trained are exactly those sampled, at the sampling temperature, and an answer that max_tokens cut is compared as
it is, without a stop token it never wrote.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from posttrain import rng
from posttrain.config.online_dpo import OnlineDPOConfig, OnlineDPORecipe
from posttrain.data import batching
from posttrain.evaluation.accuracy import Examiner
from posttrain.models.load import Policy
from posttrain.objectives.preference import PAIR_LOSSES, implicit_rewards, sequence_logp
from posttrain.objectives.tokens import kl_k1
from posttrain.rollout.build import Job, OnStep, Setup, final_answer, judged_tasks, make_collector
from posttrain.rollout.collector import (
    Collector,
    check_failures,
    episode_rows,
    episode_stats,
    timings,
    to_sample,
    with_logp,
)
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import Event, Run
from posttrain.train.frozen import frozen_start
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner, Loss
from posttrain.types import Batch, Episode, Sample, Stat, Task, TrainingDiverged, add_stats


def prepare(setup: Setup) -> Job:
    """The job of a recipe: judged tasks, a collector on the policy being trained, an examination."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = make_collector(policy, setup.chat, verify, recipe)
    examine = Examiner(collector, sets.test, recipe.eval.samples, recipe.eval.temperature, final_answer)
    return Job(policy, sets.hash, sets.notes, lambda *rest: run(recipe, policy, collector, sets.train, examine, *rest))


def make_loss(cfg: OnlineDPOConfig) -> Loss:
    """The loss of one pass over rows of pairs, better before worse: weighted per pair over the optimizer batch."""

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:  # (B, T)
        mask = b.mask
        assert b.ref_logp is not None and b.labels is not None and b.margins is not None
        answers = sequence_logp(logp, mask, cfg.length_normalise).view(-1, 2)  # (N, 2)
        refs = sequence_logp(b.ref_logp, mask, cfg.length_normalise).view(-1, 2)
        pair = (answers[:, 0], answers[:, 1], refs[:, 0], refs[:, 1])
        label, margin = b.labels[0::2] * (1 - cfg.label_smoothing), cfg.margin_coef * b.margins[0::2]
        each = PAIR_LOSSES[cfg.loss](*pair, cfg.beta, label, margin)  # (N,)
        good, bad = implicit_rewards(*pair, cfg.beta)
        right = (good > bad).float() + 0.5 * (good == bad).float()
        gap = (logp.detach() - b.behaviour_logp).abs()[mask]
        stats = {
            "preference_accuracy": Stat.over(right),
            "chosen_reward": Stat.over(good),
            "rejected_reward": Stat.over(bad),
            "reward_margin": Stat.over(good - bad),
            "chosen_logp": Stat.over(pair[0]),
            "rejected_logp": Stat.over(pair[1]),
            "entropy": Stat.over(entropy[mask]),
            "mismatch": Stat(gap.max().item(), 1, "max"),
            "mismatch_mean": Stat.over(gap),
        }
        return (b.row_weights.view(-1, 2).sum(1) * each).sum(), stats

    return loss


def pairs_of(groups: Sequence[Sequence[Episode]]) -> list[tuple[Episode, Episode]]:
    """(best, worst) of each group whose scored answers differ in reward; of equals, the first written."""
    pairs: list[tuple[Episode, Episode]] = []
    for group in groups:
        scored = sorted((e for e in group if e.reward is not None), key=lambda e: (-(e.reward or 0.0), e.index))
        if scored and scored[0].reward != scored[-1].reward:
            pairs.append((scored[0], next(e for e in scored if e.reward == scored[-1].reward)))
    return pairs


def pair_samples(pairs: Sequence[tuple[Episode, Episode]]) -> list[Sample]:
    """Rows 2i (best) and 2i + 1 (worst) of each pair; both carry the difference in reward as their margin."""
    rows: list[Sample] = []
    for best, worst in pairs:
        margin = (best.reward or 0.0) - (worst.reward or 0.0)
        rows += [replace(to_sample(e, 1.0), label=label, margin=margin) for e, label in ((best, 1.0), (worst, 0.0))]
    return rows


def run(
    recipe: OnlineDPORecipe,
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
    learner = Learner(policy, recipe.train, recipe.train.steps, recipe.rollout.temperature)
    room, temperature = recipe.train.tokens_per_pass, recipe.rollout.temperature
    reference = frozen_start(recipe.model, policy, room, temperature)
    loss = make_loss(cfg)
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

        pairs = pairs_of(groups)
        samples = pair_samples(pairs)
        samples = with_logp(samples, "ref_logp", reference)
        stats = [episode_stats(groups, len(groups) - len(pairs)), {"pairs": Stat(len(pairs), 1, "sum")}]
        stats.append({"pair_kl": policy_kl(samples)})

        rng.seed_global(seed, "update", step)  # dropout, if the model has any
        batches = batching.micro(
            samples, recipe.train.tokens_per_pass, "seq-mean-token-sum", device=policy.device, together=2
        )  # a row's tokens all weigh 1 / rows
        stats += [learner.forward_backward(batch, loss) for batch in batches]
        if batches:  # without a pair nothing moves, momentum included
            stats.append(learner.step())
        step += 1
        flat_steps = 0 if pairs else flat_steps + 1
        failpoint("step:updated")

        values = {name: stat.value for name, stat in add_stats(stats).items()}
        times = timings(groups, start, sampled)
        rows = episode_rows("train", step, groups, tasks, pair_roles(groups, pairs))
        if step == recipe.train.steps or (recipe.eval.every and step % recipe.eval.every == 0):
            measured, eval_rows = examine(step, learner.weights())
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
    before, after = store.at(0), store.at(step)
    return {"steps": step, "before": before, "after": after, "weights": checkpoint.weights_digest(learner.weights())}


def policy_kl(samples: Sequence[Sample]) -> Stat:
    """Mean over the pairs' answers of log π/π_ref of a whole answer (k1), from what the sampler said of its tokens.

    Half of them are best and half worst of their group, so it estimates KL(π ‖ π_ref) only roughly.
    """
    total = 0.0
    for s in samples:
        assert s.ref_logp is not None
        logp, ref_logp = (torch.from_numpy(row[s.loss_mask]).double() for row in (s.behaviour_logp, s.ref_logp))
        total += float(kl_k1(logp, ref_logp).sum())
    return Stat(total, len(samples))


def pair_roles(groups: Sequence[Sequence[Episode]], pairs: Sequence[tuple[Episode, Episode]]) -> torch.Tensor:
    """(P, G) what is stored as an answer's advantage: 1 the better of a pair, −1 the worse, 0 in none."""
    roles = torch.zeros(len(groups), len(groups[0]))
    for best, worst in pairs:
        roles[best.group, best.index], roles[worst.group, worst.index] = 1.0, -1.0
    return roles


def _events(values: dict[str, float], flat_steps: int) -> list[Event]:
    """What a person should know about this step."""
    events: list[Event] = []
    if values["unscored"]:
        events.append(Event("warning", "unscored", f"{values['unscored']:.0f} attempts could not be scored."))
    if flat_steps >= 3:
        events.append(Event("warning", "flat", f"No two answers to a task differed for {flat_steps} steps in a row."))
    return events


def _stop_if_hopeless(recipe: OnlineDPORecipe, step: int, values: dict[str, float], flat_steps: int) -> None:
    """Raises TrainingDiverged when sampler and learner disagree, or when there has been no pair for long."""
    if values.get("mismatch", 0.0) > recipe.algo.max_mismatch:
        raise TrainingDiverged(
            f"step {step}: sampler and learner differ by {values['mismatch']:.3g} in a token's log-probability "
            f"(allowed: algo.max_mismatch={recipe.algo.max_mismatch}). The rollouts are not from this policy."
        )
    if flat_steps >= recipe.algo.max_flat_steps:
        raise TrainingDiverged(
            f"step {step}: in the last {flat_steps} steps all answers to a task had equal rewards (mean "
            f"{values['reward']:.3g}), so there was no pair to learn from. Use easier or harder tasks, a larger "
            "algo.group_size, or a reward that tells answers apart."
        )
