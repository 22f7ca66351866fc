"""GRPO (DeepSeekMath, arXiv 2402.03300) and its variants: Dr. GRPO, DAPO, RLOO, REINFORCE++ and others.

Each step samples a group of completions per task and scores them with a verifier or reward model. The advantage of a
completion is its reward minus a baseline, by default the group mean. The policy gradient increases the probability of
completions with a positive advantage and lowers that of the others, token by token. There is no critic and, by default,
no reference model.

Choices made here, where implementations differ: advantages are not divided by the group's standard deviation (Dr. GRPO)
unless `std` is set; tokens have equal weight over the whole optimizer batch (DAPO's token-mean) unless `aggregate` says
otherwise; the stop token is trained; truncated completions are trained with the reward they got unless
`mask_truncated`; unscored completions have weight 0. With one minibatch, one epoch and no lag the update is strictly
on-policy: `old_logp` is `logp` itself, the ratio is 1 and nothing is clipped. `posttrain presets` lists the choices of
papers and other implementations as settings of config/grpo.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch

from posttrain import rng
from posttrain.config import GRPOConfig, GRPORecipe
from posttrain.data import batching
from posttrain.data.mixing import task_order
from posttrain.evaluation.accuracy import Evaluator
from posttrain.models.load import Policy
from posttrain.objectives import laws
from posttrain.objectives.advantages import (
    batch_relative,
    flat_groups,
    group_relative,
    leave_one_out,
    max_rl,
    minus_baseline,
    returns_to_go,
)
from posttrain.objectives.policy import POLICY_LOSSES, PolicyLoss, is_correction
from posttrain.objectives.tokens import KL_ESTIMATORS, whiten
from posttrain.rewards.functions import load_function
from posttrain.rollout.ahead import Ahead, Weights
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import (
    Collector,
    check_failures,
    episode_rows,
    episode_stats,
    sampled_tokens,
    to_samples,
    turn_returns,
    turns_of,
    with_logp,
)
from posttrain.rollout.curriculum import Curriculum
from posttrain.rollout.dynamic_sampling import SampledGroups, sample_groups, shaped_rewards
from posttrain.rollout.generator import Generator
from posttrain.rollout.journal import journaled
from posttrain.rollout.prefetch import Prefetcher
from posttrain.rollout.tasks import env_tasks
from posttrain.store.run import EpisodeRow, Event
from posttrain.train import health
from posttrain.train.device import file_hash
from posttrain.train.forward import token_stats, token_stats_with_entropy
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import Learner, Loss
from posttrain.train.reference import frozen_reference
from posttrain.types import Batch, ConfigError, Episode, Json, Sample, Stat, Task, stat_values


@dataclass
class Progress:
    """State of a run besides weights and optimizer; saved in every checkpoint."""

    flat_steps: int = 0
    cursor: int = 0  # position in the task order
    ema: float | None = None  # running mean of the rewards
    solved_steps: int = 0


def prepare(setup: Setup[GRPORecipe]) -> Job:
    """Loads tasks, verifier or environment; makes the collector (with weights of its own if it lags) and evaluator."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify, env = env_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = make_collector(policy, setup.chat, verify, recipe, env, workers=setup.workers)
    lag = recipe.algo.ahead or recipe.algo.max_lag
    collector = collector if lag else journaled(collector, setup)
    evaluate = Evaluator(collector, sets.test, recipe.eval)
    if lag:
        sampler = policy
        if not recipe.cluster.samplers:  # a lagging sampler needs its own copy of the weights; processes have one
            sampler = copy.deepcopy(policy)
            sampler.notes = policy.notes  # what its decoder notes is about the run
        collector = journaled(
            make_collector(sampler, setup.chat, verify, recipe, env, workers=setup.workers), setup, lag
        )

    def start(loop: Loop) -> Summary | None:
        with Prefetcher[SampledGroups]() if recipe.algo.ahead else nullcontext() as prefetch:
            sampler = replace(collector, check=prefetch.check) if prefetch else collector
            return run(recipe, policy, sampler, sets.train, evaluate, prefetch, loop)

    content, notes = check_loss(recipe.algo.policy_loss)
    return Job(policy, sets.hash + content, [*sets.notes, *notes], start)


def policy_loss(name: str) -> PolicyLoss:
    """The policy loss of that name, or of a file, `FILE.py:FUNCTION`."""
    return POLICY_LOSSES[name] if name in POLICY_LOSSES else load_function(name, "loss")


def check_loss(name: str) -> tuple[str, list[str]]:
    """The hash of a loss from a file, and notes on what it is not; empty for the losses of this package.

    Raises ConfigError if it breaks a law that training relies on (objectives/laws.py).
    """
    if name in POLICY_LOSSES:
        return "", []
    loss = policy_loss(name)
    if wrong := laws.broken(loss, laws.LAWS):
        count = sum(len(fault.laws) for fault in wrong)
        raise ConfigError(f"the loss {name} breaks {count} of {len(laws.LAWS)} laws: {'; '.join(map(str, wrong))}.")
    notes = [f"The loss {name} differs from the built-in ones: {says}." for says in laws.broken(loss, laws.TRAITS)]
    return f"+{file_hash(name.rpartition(':')[0])}", notes


def make_loss(recipe: GRPORecipe) -> Loss:
    """The loss of one micro-batch: policy loss, importance-sampling correction, KL to the reference, entropy bonus."""
    cfg, surrogate = recipe.algo, policy_loss(recipe.algo.policy_loss)

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:  # (B, T)
        mask = b.mask
        old_logp = logp.detach() if b.old_logp is None else b.old_logp
        per_token, clipped = surrogate(logp, old_logp, b.advantages, mask, cfg.clip_low, cfg.clip_high)
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
    tasks: Sequence[Task],
    evaluator: Evaluator,
    prefetch: Prefetcher[SampledGroups] | None,
    loop: Loop,
) -> Summary | None:
    """Trains until `train.steps`. Everything random is a function of (run.seed, step, task, completion)."""
    cfg, train, seed, sampler = recipe.algo, recipe.train, recipe.run.seed, collector.generator
    updates, lags = cfg.minibatches * cfg.epochs, cfg.ahead > 0 or cfg.max_lag > 0
    forward = token_stats_with_entropy if cfg.entropy_coef else token_stats
    temperature = recipe.rollout.temperature
    learner = loop.learner(policy, train, train.steps * updates, temperature, forward)
    reference = None
    if cfg.kl_coef:
        reference = frozen_reference(recipe.model, policy, train.micro_batch_tokens, temperature)
    loss = make_loss(recipe)
    order = task_order(tasks, recipe.data, seed)
    curriculum, progress = Curriculum(tasks, cfg.curriculum, seed, order), Progress()
    sample = partial(sample_groups, recipe, collector, tasks)
    ahead = Ahead(cfg.ahead, prefetch, sampler, sample, train.steps) if prefetch else None
    if saved := loop.restore(learner):
        solved = 0 if loop.extended else saved.get("solved_steps", 0)
        progress = Progress(saved["flat_steps"], saved["cursor"], saved["ema"], solved)
        curriculum.load(saved.get("curriculum", {}))
        if "sampler" in saved["tensors"] and not ahead:
            sampler.load(saved["tensors"]["sampler"], saved["sampler"])
        elif ahead:
            ahead.load(saved, loop.step, curriculum, progress.cursor)

    def evaluate(step: int) -> tuple[Metrics, list[EpisodeRow]]:
        with prefetch.paused() if prefetch else nullcontext():  # the reward must not be called from two threads at once
            return evaluator(step, learner.weights())

    for step in loop.steps(train.steps, evaluate, recipe.eval.every):
        if step == 0 or not (cfg.ahead or step % (cfg.max_lag + 1)):
            sampler.load(learner.weights(), version=step)
        taken = ahead.take() if ahead and ahead.started else None
        sampled, hidden = taken or (sample(curriculum, progress.cursor, step), 0.0)
        groups = sampled.groups  # P groups of G episodes; dynamic sampling trains on some of them
        progress.cursor += len(groups)
        difficulty = curriculum.learn(groups)
        check_failures(groups, recipe.reward.max_failure_rate)
        loop.sampled(sampled_tokens(groups), hidden)
        if ahead:  # sample later steps with the current weights while training on this one
            ahead.begin(step, learner.weights(), curriculum, progress.cursor)

        rewards = shaped_rewards(recipe, groups)  # (P, G)
        samples, owner = training_rows(groups)
        samples = with_old_logp(cfg, samples, learner, lags)
        if reference is not None:
            samples = with_logp(samples, "ref_logp", reference)
        baseline = progress.ema if sampled.greedy is None else sampled.greedy
        samples, rewards, advantages = credit(cfg, samples, rewards, baseline, learner, owner, groups)
        progress.ema = moving_mean(progress.ema, rewards, cfg.ema_decay)
        samples = trained(cfg, samples, groups, sampled.kept, owner)

        rng.seed_global(seed, "update", step)  # whatever the model draws
        flat = flat_groups(rewards) if cfg.group_size > 1 else (advantages == 0).all(1)  # (P,)
        stats = [episode_stats(groups, int(flat.sum()), sampled.tasks), {"lag": Stat(step - sampled.version)}]
        stats.append({"groups": Stat(len(groups), 1, "sum"), "groups_kept": Stat(sum(sampled.kept), 1, "sum")})
        first = learner.steps
        for epoch in range(cfg.epochs):
            parts = batching.minibatches(samples, cfg.minibatches, rng.key(seed, "minibatch", step, epoch))
            for update, minibatch in enumerate(parts, step * updates + epoch * cfg.minibatches):
                batches = batching.micro(
                    minibatch,
                    train.micro_batch_tokens,
                    cfg.aggregate,
                    recipe.rollout.max_tokens,
                    policy.device,
                    # without a KL or entropy term in the loss, a row with advantage 0 has no gradient
                    skip_zero_advantage=not cfg.entropy_coef and (reference is None or cfg.kl_place != "loss"),
                )
                batch_stats = learner.forward_backward(batches, loss)
                if cfg.old_logp == "sampler" and learner.steps > first:  # the policy has changed since sampling
                    batch_stats = [
                        {k: v for k, v in row.items() if not k.startswith("mismatch")} for row in batch_stats
                    ]
                stats += batch_stats
                if batches:  # with nothing to train on the optimizer takes no step, not even from momentum
                    stats.append(learner.step(update=update))
        progress.flat_steps = progress.flat_steps + 1 if bool(flat.all()) else 0
        values = stat_values(stats) | difficulty
        progress.solved_steps = health.solved_steps(progress.solved_steps, bool(flat.all()), values)
        tensors, older = ahead.state() if ahead else older_weights(sampler, (step + 1) % (cfg.max_lag + 1) != 0)
        state = asdict(progress) | {"curriculum": curriculum.state()} | older
        loop.end(
            learner,
            values,
            episode_rows("train", step + 1, groups, sampled.tasks, advantages),
            events=events(values, progress.flat_steps),
            hopeless=hopeless(cfg, values, 0 if progress.solved_steps else progress.flat_steps),
            solved=health.solved(progress.solved_steps, cfg.max_flat_steps),
            state=state,
            tensors=tensors,
        )
    return loop.summary(learner)


def older_weights(sampler: Generator, kept: bool) -> tuple[dict[str, Weights], Json]:
    """The sampler's weights for a checkpoint (tensors, JSON) if the next steps still sample from them, else nothing."""
    return ({"sampler": sampler.weights()}, {"sampler": sampler.version}) if kept else ({}, {})


def training_rows(groups: Sequence[Sequence[Episode]]) -> tuple[list[Sample], torch.Tensor]:
    """The training rows of all episodes, group by group, and the episode index of each row (rows,).

    An episode is one row, or several if its history was edited.
    """
    rows = [to_samples(e, 0.0) for group in groups for e in group]
    samples = [sample for row in rows for sample in row]
    return samples, torch.tensor([i for i, row in enumerate(rows) for _ in row])


def with_old_logp(cfg: GRPOConfig, samples: list[Sample], learner: Learner, lags: bool) -> list[Sample]:
    """Samples with `old_logp`, the denominator of the ratio; None where that is the current policy."""
    updates = cfg.minibatches * cfg.epochs
    if cfg.old_logp == "sampler" and updates > 1:  # the first minibatch measures the mismatch
        return [replace(s, old_logp=s.behaviour_logp) for s in samples]
    if updates > 1 or (lags and cfg.is_cap):  # of the policy before the first update of this step
        return with_logp(samples, "old_logp", learner.logprobs)
    if lags:  # the ratio itself corrects for the lag
        return [replace(s, old_logp=s.behaviour_logp) for s in samples]
    return samples


def credit(
    cfg: GRPOConfig,
    samples: Sequence[Sample],
    rewards: torch.Tensor,
    baseline: torch.Tensor | float | None,
    learner: Learner,
    owner: torch.Tensor | None = None,
    groups: Sequence[Sequence[Episode]] = (),
) -> tuple[list[Sample], torch.Tensor, torch.Tensor]:
    """Computes token advantages: (samples with advantages, rewards (P, G), advantages per completion (P, G)).

    `owner` (rows,) is the episode of each sample, where an episode has several rows. With `credit = "turn"`, which
    needs `groups`, the tokens of a turn get the return from that turn on, against the baseline at the same turn.

    With the KL in the reward, it is subtracted from a completion's reward before the baseline. With "reward-to-go" the
    KL penalties from each token on are subtracted from its advantage, after the baseline (OpenRLHF, REINFORCE++).
    """
    owner = torch.arange(len(samples)) if owner is None else owner
    mask = batching.loss_masks(samples)  # (rows, T)
    penalty = torch.zeros(mask.shape)
    if cfg.kl_coef and cfg.kl_place != "loss":
        current = learner.logprobs(samples) if samples[0].old_logp is None else [s.old_logp for s in samples]
        for i, (sample, logp) in enumerate(zip(samples, current, strict=True)):
            assert sample.ref_logp is not None and logp is not None
            kl = KL_ESTIMATORS[cfg.kl_estimator](torch.from_numpy(logp), torch.from_numpy(sample.ref_logp))
            penalty[i, : len(kl)] = torch.where(mask[i, : len(kl)], -cfg.kl_coef * kl, 0)
    if cfg.kl_place == "reward":
        rewards = rewards + torch.zeros(rewards.numel()).index_add_(0, owner, penalty.sum(1)).view(rewards.shape)
    advantages = compare(cfg, rewards, baseline)  # (P, G)
    of_row = advantages.reshape(-1, 1)[owner].expand(mask.shape)
    if cfg.credit == "turn":
        by_turn = [compare(cfg, returns, baseline) for returns in turn_returns(groups).unbind(2)]  # K of (P, G)
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
    filled = [replace(s, advantages=rows[i, : len(s.tokens)].copy()) for i, s in enumerate(samples)]
    return filled, rewards, advantages


def compare(cfg: GRPOConfig, rewards: torch.Tensor, baseline: torch.Tensor | float | None) -> torch.Tensor:
    """Advantages (P, G) of rewards (P, G) relative to the recipe's baseline; 0 where unscored."""
    if cfg.baseline == "leave-one-out":
        return leave_one_out(rewards)
    if cfg.baseline == "batch-mean":
        return batch_relative(rewards, "sample" if cfg.std == "batch" else "none", cfg.std_eps)
    if cfg.baseline == "group-mean":
        return max_rl(rewards) if cfg.std == "mean" else group_relative(rewards, cfg.std, cfg.std_eps)
    if cfg.baseline == "none":
        baseline = 0.0
    elif baseline is None:  # the running mean starts with the mean of the first step
        baseline = rewards.nanmean()
    return minus_baseline(rewards, torch.as_tensor(baseline, dtype=rewards.dtype).expand(len(rewards), 1))


def moving_mean(ema: float | None, rewards: torch.Tensor, decay: float) -> float | None:
    """Exponential moving average of the mean reward after one more step; starts with the mean of the first step."""
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
    """The samples of kept groups; `mask_truncated` removes truncated completions from the loss."""
    episodes = [(e, keep) for group, keep in zip(groups, kept, strict=True) for e in group]
    out: list[Sample] = []
    for sample, (episode, keep) in zip(samples, (episodes[i] for i in owner.tolist()), strict=True):
        if keep and cfg.mask_truncated and episode.stop == "length":
            out.append(replace(sample, loss_mask=np.zeros_like(sample.loss_mask), advantages=sample.advantages * 0))
        elif keep:
            out.append(sample)
    return out


def events(values: Metrics, flat_steps: int) -> list[Event]:
    """Warnings for this step."""
    flat = "No group had differing rewards for {steps} steps in a row."
    return health.unscored(values) + health.repeated("flat", flat, flat_steps)


def hopeless(cfg: GRPOConfig, values: Metrics, flat_steps: int) -> str:
    """Reason to stop: sampler and learner disagree, or all groups were flat for long. Empty to continue."""
    disagreement = "" if values["lag"] else health.mismatch(values, cfg.max_mismatch)
    if disagreement or flat_steps < cfg.max_flat_steps:
        return disagreement
    return (
        f"in the last {flat_steps} steps all completions of each task had equal rewards (mean {values['reward']:.3g}), "
        "so nothing was learned. Use easier or harder tasks, a larger algo.group_size, or a reward that tells "
        "completions apart."
    )
