"""GRPO and its family (DeepSeekMath, arXiv 2402.03300, and those who changed it), the whole algorithm in one file.

For each task the policy writes a group of answers; a program scores them; an answer's advantage is its reward compared
with a baseline, by default the group's mean; the policy gradient makes better answers likelier, token by token. There
is no critic and, by default, no reference model.

What this file decides, and where implementations differ: advantages are not divided by the group's standard deviation
(Dr. GRPO) unless `std`; tokens are weighted equally over the whole optimizer batch (DAPO's token-mean) unless
`aggregate` says otherwise; the stop token is trained; answers cut by max_tokens are trained as they were scored unless
`drop_truncated`; an answer that could not be scored has weight 0. With one minibatch, one epoch and no lag the update
is strictly on-policy: `old_logp` is `logp` itself, the ratio is 1 and nothing clips. `posttrain presets` lists the
choices of papers and other implementations, each of which is a set of the settings in config/grpo.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.config import GRPOConfig, GRPORecipe
from posttrain.data import batching
from posttrain.evaluation.accuracy import Examiner
from posttrain.models.load import Policy
from posttrain.objectives.advantages import (
    batch_relative,
    flat_groups,
    group_relative,
    leave_one_out,
    max_rl,
    minus_baseline,
    returns_to_go,
)
from posttrain.objectives.policy import POLICY_LOSSES, is_correction
from posttrain.objectives.tokens import KL_ESTIMATORS, whiten
from posttrain.rollout.build import Job, OnStep, Setup, final_answer, make_collector, world_tasks
from posttrain.rollout.collector import (
    Collector,
    check_failures,
    episode_rows,
    episode_stats,
    timings,
    to_samples,
    turn_returns,
    turns_of,
    with_logp,
)
from posttrain.rollout.curriculum import Curriculum
from posttrain.rollout.dynamic_sampling import Sampled, gather, shaped_rewards
from posttrain.rollout.prefetch import Ahead
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import Event, Run
from posttrain.train.forward import token_stats, token_stats_with_entropy
from posttrain.train.frozen import frozen_start
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner, Loss
from posttrain.types import Batch, Episode, Sample, Stat, Task, TrainingDiverged, add_stats


def prepare(setup: Setup) -> Job:
    """The job of a recipe: judged tasks, a collector on the policy being trained, an examination."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify, env = world_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = make_collector(policy, setup.chat, verify, recipe, env)
    examine = Examiner(collector, sets.test, recipe.eval.samples, recipe.eval.temperature, final_answer)
    if recipe.algo.max_lag or recipe.algo.overlap:  # a sampler that lags has weights of its own
        collector = make_collector(copy.deepcopy(policy), setup.chat, verify, recipe, env)

    def start(store: Run, on_step: OnStep, interrupt: Interrupt) -> dict[str, Any] | None:
        with Ahead[Sampled](recipe.algo.overlap) as ahead:
            stoppable = replace(collector, check=ahead.check)
            return run(recipe, policy, stoppable, sets.train, examine, ahead, store, on_step, interrupt)

    return Job(policy, sets.hash, sets.notes, start)


def make_loss(recipe: GRPORecipe) -> Loss:
    """The loss of one pass: weighted per-token policy loss, sampler correction, KL to the reference, entropy bonus."""
    cfg = recipe.algo

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:  # (B, T)
        mask = b.mask
        old_logp = logp.detach() if b.old_logp is None else b.old_logp
        per_token, clipped = POLICY_LOSSES[cfg.policy_loss](
            logp, old_logp, b.advantages, mask, cfg.clip_low, cfg.clip_high
        )
        stats = {"clipped": Stat.over(clipped.float(), mask), "entropy": Stat.over(entropy, mask)}
        if cfg.is_cap:
            weight = is_correction(old_logp, b.behaviour_logp, mask, cfg.is_cap, cfg.is_mode, cfg.is_floor)
            per_token = per_token * weight
            stats["is_weight"] = Stat.over(weight, mask)
        if b.ref_logp is not None:
            kl = KL_ESTIMATORS[cfg.kl_estimator](torch.where(mask, logp, 0), torch.where(mask, b.ref_logp, 0))
            per_token = per_token + (cfg.kl_coef * kl if cfg.kl_place == "loss" else 0)
            stats["kl"] = Stat.over(kl, mask)
        if cfg.entropy_coef:
            per_token = per_token - cfg.entropy_coef * entropy
        now = logp.detach() if cfg.old_logp == "sampler" else old_logp
        gap = (now - b.behaviour_logp).abs()[mask]
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
    ahead: Ahead[Sampled],
    store: Run,
    on_step: OnStep,
    interrupt: Interrupt,
) -> dict[str, Any] | None:
    """Trains until `train.steps`, from the run's newest checkpoint if it has one.

    Everything random is a function of (run.seed, step, task, attempt), so a run that was killed anywhere and resumed
    ends with the same bits. Returns the summary, or None when `interrupt` asked it to stop (saved, resumable).
    """
    cfg, seed, sampler = recipe.algo, recipe.run.seed, collector.generator
    updates = cfg.minibatches * cfg.epochs
    lags = cfg.overlap or cfg.max_lag > 0
    forward = token_stats_with_entropy if cfg.entropy_coef else token_stats
    room, temperature = recipe.train.tokens_per_pass, recipe.rollout.temperature
    learner = Learner(policy, recipe.train, recipe.train.steps * updates, temperature, forward)
    reference = frozen_start(recipe.model, policy, room, temperature) if cfg.kl_coef else None
    loss = make_loss(recipe)
    curriculum = Curriculum(train_tasks, cfg.curriculum, seed)
    step, flat_steps, cursor, ema = 0, 0, 0, None
    if saved := checkpoint.latest(store.folder):
        tensors, state = checkpoint.load(saved)
        learner.load(tensors, state["learner"])
        step, flat_steps, cursor, ema = (state[name] for name in ("step", "flat_steps", "cursor", "ema"))
        curriculum.load(state.get("curriculum", {}))
        if "sampler" in tensors:
            sampler.load(tensors["sampler"], state["sampler"])

    if step == 0:
        values, rows = examine(0)
        store.write(0, values, {}, rows)
        on_step(0, values)

    while step < recipe.train.steps and not interrupt.requested:
        failpoint("step:start")
        start = time.monotonic()
        if step == 0 or not (cfg.overlap or step % (cfg.max_lag + 1)):
            sampler.load(learner.weights(), version=step)
        now = partial(gather, recipe, collector, train_tasks, curriculum, cursor, step)
        sampled, hidden = ahead.take(now)  # P groups of G episodes, some of them dropped
        groups, cursor = sampled.groups, cursor + len(sampled.groups)
        difficulty = curriculum.learn(groups)
        check_failures(groups, recipe.reward.max_failure_rate)
        finished = time.monotonic()
        failpoint("step:rollouts-done")
        if cfg.overlap:  # the next answers are written while these are learned from, with the weights of this moment
            sampler.load(learner.weights(), version=step)
            if step + 1 < recipe.train.steps:
                ahead.start(partial(gather, recipe, collector, train_tasks, curriculum, cursor, step + 1))

        rewards = shaped_rewards(recipe, groups)  # (P, G)
        episodes = [e for group in groups for e in group]  # P·G, group after group
        rows_of = [to_samples(e, 0.0) for e in episodes]  # one row each, more where a history was edited
        samples = [sample for own in rows_of for sample in own]
        owner = torch.tensor([i for i, own in enumerate(rows_of) for _ in own])  # row → attempt
        trusted = cfg.old_logp == "sampler" and updates > 1
        if trusted:  # the first minibatch's passes measure whether it may be
            samples = [replace(s, old_logp=s.behaviour_logp) for s in samples]
        elif updates > 1 or (lags and cfg.is_cap):  # remember the policy before this step's first update
            samples = with_logp(samples, "old_logp", learner.sample_logprobs)
        elif lags:  # the ratio itself corrects for the older sampler
            samples = [replace(s, old_logp=s.behaviour_logp) for s in samples]
        if reference is not None:
            samples = with_logp(samples, "ref_logp", reference)
        baseline = ema if sampled.greedy is None else sampled.greedy
        samples, rewards, advantages = credit(cfg, samples, rewards, baseline, learner, owner, groups)
        ema = moving_mean(ema, rewards, cfg.ema_decay)
        samples = trained(cfg, samples, groups, sampled.kept, owner)

        rng.seed_global(seed, "update", step)  # dropout, if the model has any
        flat = flat_groups(rewards) if cfg.group_size > 1 else (advantages == 0).all(1)  # (P,)
        stats = [episode_stats(groups, int(flat.sum())), {"lag": Stat(step - sampled.version)}]
        stats.append({"groups": Stat(len(groups), 1, "sum"), "groups_kept": Stat(sum(sampled.kept), 1, "sum")})
        first = learner.steps
        for epoch in range(cfg.epochs):
            for minibatch in batching.minibatches(samples, cfg.minibatches, rng.key(seed, "minibatch", step, epoch)):
                batches = batching.micro(
                    minibatch,
                    room,
                    cfg.aggregate,
                    recipe.rollout.max_tokens,
                    policy.device,
                    # without KL and entropy in the loss, a row with advantage 0 has gradient 0
                    skip_zero_advantage=not cfg.entropy_coef and (reference is None or cfg.kl_place != "loss"),
                )
                made = [learner.forward_backward(batch, loss) for batch in batches]
                if trusted and learner.steps > first:  # by now the policy itself has moved
                    made = [{k: v for k, v in row.items() if not k.startswith("mismatch")} for row in made]
                stats += made
                if batches:  # without a signal nothing moves, momentum included
                    stats.append(learner.step())
        step += 1
        flat_steps = flat_steps + 1 if bool(flat.all()) else 0
        failpoint("step:updated")

        values = {name: stat.value for name, stat in add_stats(stats).items()} | difficulty
        times = timings(groups, start, finished, hidden)
        rows = episode_rows("train", step, groups, sampled.tasks, advantages)
        if step == recipe.train.steps or (recipe.eval.every and step % recipe.eval.every == 0):
            ahead.wait()  # so that the reward is not called from here and from there at once
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
            whole = {"step": step, "flat_steps": flat_steps, "cursor": cursor, "ema": ema, "learner": state}
            whole["curriculum"] = curriculum.state()
            if cfg.overlap or step % (cfg.max_lag + 1):  # the next steps still sample from older weights
                tensors["sampler"], whole["sampler"] = sampler.weights(), sampler.version
            checkpoint.save(store.folder, step, tensors, whole, recipe.run.keep)
            failpoint("step:after-checkpoint")
    if step < recipe.train.steps:
        return None
    before, after = store.at(0), store.at(step)
    return {"steps": step, "before": before, "after": after, "weights": checkpoint.weights_digest(learner.weights())}


def credit(
    cfg: GRPOConfig,
    samples: Sequence[Sample],
    rewards: torch.Tensor,
    baseline: torch.Tensor | float | None,
    learner: Learner,
    owner: torch.Tensor | None = None,
    groups: Sequence[Sequence[Episode]] = (),
) -> tuple[list[Sample], torch.Tensor, torch.Tensor]:
    """Advantages for every token of the samples; also the rewards (P, G) they came from and each answer's own (P, G).

    `owner` (rows,) says which attempt each sample is from where an attempt has several. With credit by turn, which
    needs the `groups`, a reply's tokens get what was earned from that turn on, compared with others at the same turn.

    With the KL in the reward, it is subtracted from the answer's reward before the baseline; with "reward-to-go" each
    token's advantage loses the KL penalties from that token on, after the baseline (OpenRLHF, REINFORCE++).
    """
    owner = torch.arange(len(samples)) if owner is None else owner
    mask = batching.loss_masks(samples)  # (rows, T)
    penalty = torch.zeros(mask.shape)
    if cfg.kl_coef and cfg.kl_place != "loss":
        now = learner.sample_logprobs(samples) if samples[0].old_logp is None else [s.old_logp for s in samples]
        for i, (sample, logp) in enumerate(zip(samples, now, strict=True)):
            assert sample.ref_logp is not None and logp is not None
            kl = KL_ESTIMATORS[cfg.kl_estimator](torch.from_numpy(logp), torch.from_numpy(sample.ref_logp))
            penalty[i, : len(kl)] = torch.where(mask[i, : len(kl)], -cfg.kl_coef * kl, 0)
    if cfg.kl_place == "reward":
        rewards = rewards + torch.zeros(rewards.numel()).index_add_(0, owner, penalty.sum(1)).view(rewards.shape)
    advantages = compare(cfg, rewards, baseline)  # (P, G)
    of_row = advantages.reshape(-1, 1)[owner].expand(mask.shape)
    if cfg.credit == "turn":
        by_turn = [compare(cfg, earned, baseline) for earned in turn_returns(groups).unbind(2)]  # K of (P, G)
        turns = torch.zeros(mask.shape, dtype=torch.int64)
        for i, row in enumerate(row for group in groups for e in group for row in turns_of(e)):
            turns[i, : len(row)] = torch.from_numpy(row)
        of_row = torch.stack(by_turn, 2).flatten(0, 1)[owner].gather(1, turns)
    per_token = torch.where(mask, of_row, 0)
    if cfg.kl_place == "reward-to-go":
        per_token = per_token + returns_to_go(penalty, mask, 1.0)
    if cfg.whiten != "none":
        per_token = whiten(per_token, mask, bessel=cfg.whiten == "sample")
    rows = per_token.numpy()
    done = [replace(s, advantages=rows[i, : len(s.tokens)].copy()) for i, s in enumerate(samples)]
    return done, rewards, advantages


def compare(cfg: GRPOConfig, rewards: torch.Tensor, baseline: torch.Tensor | float | None) -> torch.Tensor:
    """Rewards (P, G) against the baseline the recipe names → advantages (P, G); 0 where unscored."""
    if cfg.baseline == "leave-one-out":
        return leave_one_out(rewards)
    if cfg.baseline == "batch-mean":
        return batch_relative(rewards, "sample" if cfg.std == "batch" else "none", cfg.std_eps)
    if cfg.baseline == "group-mean":
        return max_rl(rewards) if cfg.std == "mean" else group_relative(rewards, cfg.std, cfg.std_eps)
    if cfg.baseline == "none":
        baseline = 0.0
    elif baseline is None:  # the running mean starts at the first step's own
        baseline = rewards.nanmean()
    return minus_baseline(rewards, torch.as_tensor(baseline, dtype=rewards.dtype).expand(len(rewards), 1))


def moving_mean(ema: float | None, rewards: torch.Tensor, decay: float) -> float | None:
    """The running mean of the rewards after one more step; the first step's own mean starts it."""
    if not rewards.isfinite().any():
        return ema
    mean = float(rewards.nanmean())
    return mean if ema is None else decay * ema + (1 - decay) * mean


def trained(
    cfg: GRPOConfig,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Episode]],
    kept: Sequence[bool],
    owner: torch.Tensor,
) -> list[Sample]:
    """The samples of kept groups; with `drop_truncated`, answers that were cut keep no trained token."""
    episodes = [(e, keep) for group, keep in zip(groups, kept, strict=True) for e in group]
    out: list[Sample] = []
    for sample, (episode, keep) in zip(samples, (episodes[i] for i in owner.tolist()), strict=True):
        if keep and cfg.drop_truncated and episode.stop == "length":
            out.append(replace(sample, loss_mask=np.zeros_like(sample.loss_mask), advantages=sample.advantages * 0))
        elif keep:
            out.append(sample)
    return out


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
    if not values["lag"] and values.get("mismatch", 0.0) > recipe.algo.max_mismatch:
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
