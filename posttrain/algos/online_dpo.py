"""Online DPO (OAIF, arXiv 2402.04792): DPO on pairs sampled from the current policy.

Each step samples a group of completions per task and scores them with a verifier or a reward model. The best and the
worst completion of a group form a pair for a DPO loss against the frozen starting model.

Choices made here, where implementations differ: there is one update per batch of completions, so the pairs always come
from the current policy; among several best (or worst) completions the one with the lowest index is taken; a group
whose scored completions all have the same reward gives no pair (metric `flat_groups`), and the N remaining pairs weigh
1/N each; training uses exactly the sampled tokens at the sampling temperature, and a truncated completion is compared
as it is, without an added stop token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from posttrain import rng
from posttrain.config.online_dpo import OnlineDPOConfig, OnlineDPORecipe
from posttrain.data import batching
from posttrain.evaluation.accuracy import Evaluator
from posttrain.models.load import Policy
from posttrain.objectives.preference import PAIR_LOSSES, implicit_rewards, sequence_logp
from posttrain.objectives.tokens import kl_k1
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import (
    Collector,
    episode_rows,
    episode_stats,
    sample_step,
    sampled_tokens,
    to_sample,
    with_logp,
)
from posttrain.rollout.journal import journaled
from posttrain.rollout.tasks import judged_tasks
from posttrain.train import health
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import Loss
from posttrain.train.reference import frozen_reference
from posttrain.types import Batch, Episode, Sample, Stat, Task, stat_values

FLAT = "No task had completions of different reward for {steps} steps in a row."


def prepare(setup: Setup[OnlineDPORecipe]) -> Job:
    """Loads the tasks and their verifier; makes a collector on the policy being trained and a held-out evaluator."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = journaled(make_collector(policy, setup.chat, verify, recipe, workers=setup.workers), setup)
    evaluator = Evaluator(collector, sets.test, recipe.eval)
    return Job(policy, sets.hash, sets.notes, lambda loop: run(recipe, policy, collector, sets.train, evaluator, loop))


def make_loss(cfg: OnlineDPOConfig) -> Loss:
    """The DPO loss of one micro-batch of pairs (chosen, rejected, …), weighted per pair over the optimizer batch."""

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:  # (B, T)
        mask = b.mask
        assert b.ref_logp is not None and b.labels is not None and b.margins is not None
        logps = sequence_logp(logp, mask, cfg.length_normalise).view(-1, 2)  # (N, 2)
        refs = sequence_logp(b.ref_logp, mask, cfg.length_normalise).view(-1, 2)
        pair = (logps[:, 0], logps[:, 1], refs[:, 0], refs[:, 1])
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


def best_and_worst(groups: Sequence[Sequence[Episode]]) -> list[tuple[Episode, Episode]]:
    """(best, worst) of each group whose scored completions differ in reward; ties go to the lowest index."""
    pairs: list[tuple[Episode, Episode]] = []
    for group in groups:
        scored = sorted((e for e in group if e.reward is not None), key=lambda e: (-(e.reward or 0.0), e.index))
        if scored and scored[0].reward != scored[-1].reward:
            pairs.append((scored[0], next(e for e in scored if e.reward == scored[-1].reward)))
    return pairs


def pair_samples(pairs: Sequence[tuple[Episode, Episode]]) -> list[Sample]:
    """Rows 2i (best) and 2i + 1 (worst) of each pair; both have the reward difference as margin."""
    rows: list[Sample] = []
    for best, worst in pairs:
        margin = (best.reward or 0.0) - (worst.reward or 0.0)
        rows += [replace(to_sample(e, 1.0), label=label, margin=margin) for e, label in ((best, 1.0), (worst, 0.0))]
    return rows


def run(
    recipe: OnlineDPORecipe,
    policy: Policy,
    collector: Collector,
    tasks: Sequence[Task],
    evaluator: Evaluator,
    loop: Loop,
) -> Summary | None:
    """Trains until `train.steps`. Everything random is a function of (run.seed, step, task, completion)."""
    cfg, train, temperature = recipe.algo, recipe.train, recipe.rollout.temperature
    learner = loop.learner(policy, train, train.steps, temperature)
    reference = frozen_reference(recipe.model, policy, train.micro_batch_tokens, temperature)
    loss, saved = make_loss(cfg), loop.restore(learner)
    flat_steps, solved_steps = saved.get("flat_steps", 0), 0 if loop.extended else saved.get("solved_steps", 0)

    for step in loop.steps(train.steps, lambda n: evaluator(n, learner.weights()), recipe.eval.every):
        batch_tasks, groups = sample_step(collector, tasks, recipe, learner.weights(), step)
        loop.sampled(sampled_tokens(groups))
        pairs = best_and_worst(groups)
        samples = with_logp(pair_samples(pairs), "ref_logp", reference)
        stats = [episode_stats(groups, len(groups) - len(pairs), batch_tasks), {"pairs": Stat(len(pairs), 1, "sum")}]
        stats.append({"pair_kl": policy_kl(samples)})

        rng.seed_global(recipe.run.seed, "update", step)  # whatever the model draws
        batches = batching.micro(
            samples, train.micro_batch_tokens, "seq-mean-token-sum", device=policy.device, together=2
        )  # each token of a row has weight 1 / rows
        stats += learner.forward_backward(batches, loss)
        if batches:  # without a pair the optimizer takes no step, not even from momentum
            stats.append(learner.step(update=step))
        values, flat_steps = stat_values(stats), 0 if pairs else flat_steps + 1
        solved_steps = health.solved_steps(solved_steps, not pairs, values)
        loop.end(
            learner,
            values,
            episode_rows("train", step + 1, groups, batch_tasks, pair_roles(groups, pairs)),
            events=health.unscored(values) + health.repeated("flat", FLAT, flat_steps),
            hopeless=hopeless(cfg, values, 0 if solved_steps else flat_steps),
            solved=health.solved(solved_steps, cfg.max_flat_steps),
            state={"flat_steps": flat_steps, "solved_steps": solved_steps},
        )
    return loop.summary(learner)


def policy_kl(samples: Sequence[Sample]) -> Stat:
    """Mean log π/π_ref per completion (k1) over the paired completions, with the sampler's log-probabilities.

    Pairs hold the best and the worst of each group, so this is only a rough estimate of KL(π ‖ π_ref).
    """
    total = 0.0
    for s in samples:
        assert s.ref_logp is not None
        logp, ref_logp = (torch.from_numpy(row[s.loss_mask]).double() for row in (s.behaviour_logp, s.ref_logp))
        total += float(kl_k1(logp, ref_logp).sum())
    return Stat(total, len(samples))


def pair_roles(groups: Sequence[Sequence[Episode]], pairs: Sequence[tuple[Episode, Episode]]) -> torch.Tensor:
    """(P, G) stored as the advantage: 1 for the chosen and −1 for the rejected of a pair, 0 outside pairs."""
    roles = torch.zeros(len(groups), len(groups[0]))
    for best, worst in pairs:
        roles[best.group, best.index], roles[worst.group, worst.index] = 1.0, -1.0
    return roles


def hopeless(cfg: OnlineDPOConfig, values: Metrics, flat_steps: int) -> str:
    """Reason to stop: sampler and learner disagree, or no pair for `max_flat_steps` steps. Empty to continue."""
    disagreement = health.mismatch(values, cfg.max_mismatch)
    if disagreement or flat_steps < cfg.max_flat_steps:
        return disagreement
    return (
        f"in the last {flat_steps} steps all completions of each task had equal rewards (mean {values['reward']:.3g}), "
        "so there was no pair to learn from. Use easier or harder tasks, a larger algo.group_size, or a reward that "
        "tells completions apart."
    )
