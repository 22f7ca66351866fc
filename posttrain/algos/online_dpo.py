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
from posttrain.rollout.tasks import judged_tasks
from posttrain.train import health
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import Loss, make_learner
from posttrain.train.reference import frozen_reference
from posttrain.types import Batch, Episode, Sample, Stat, Task, stat_values

FLAT = "No task had completions of different reward for {steps} steps in a row."


def prepare(setup: Setup[OnlineDPORecipe]) -> Job:
    """Judged tasks, a collector on the policy being trained, held-out evaluation."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = make_collector(policy, setup.chat, verify, recipe)
    evaluator = Evaluator(collector, sets.test, recipe.eval)
    return Job(policy, sets.hash, sets.notes, lambda loop: run(recipe, policy, collector, sets.train, evaluator, loop))


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


def best_and_worst(groups: Sequence[Sequence[Episode]]) -> list[tuple[Episode, Episode]]:
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
    tasks: Sequence[Task],
    evaluator: Evaluator,
    loop: Loop,
) -> Summary | None:
    """Trains until `train.steps`. Everything random is a function of (run.seed, step, task, completion)."""
    cfg, train, temperature = recipe.algo, recipe.train, recipe.rollout.temperature
    learner = make_learner(policy, train, train.steps, temperature)
    reference = frozen_reference(recipe.model, policy, train.micro_batch_tokens, temperature)
    loss, flat_steps = make_loss(cfg), loop.restore(learner).get("flat_steps", 0)

    for step in loop.steps(train.steps, lambda at: evaluator(at, learner.weights()), recipe.eval.every):
        asked, groups = sample_step(collector, tasks, recipe, learner.weights(), step)
        loop.sampled(sampled_tokens(groups))
        pairs = best_and_worst(groups)
        samples = with_logp(pair_samples(pairs), "ref_logp", reference)
        stats = [episode_stats(groups, len(groups) - len(pairs)), {"pairs": Stat(len(pairs), 1, "sum")}]
        stats.append({"pair_kl": policy_kl(samples)})

        rng.seed_global(recipe.run.seed, "update", step)  # dropout, if the model has any
        batches = batching.micro(
            samples, train.micro_batch_tokens, "seq-mean-token-sum", device=policy.device, together=2
        )  # a row's tokens all weigh 1 / rows
        stats += learner.forward_backward(batches, loss)
        if batches:  # without a pair nothing moves, momentum included
            stats.append(learner.step())
        values, flat_steps = stat_values(stats), 0 if pairs else flat_steps + 1
        loop.end(
            learner,
            values,
            episode_rows("train", step + 1, groups, asked, pair_roles(groups, pairs)),
            events=health.unscored(values) + health.repeated("flat", FLAT, flat_steps),
            hopeless=hopeless(cfg, values, flat_steps),
            state={"flat_steps": flat_steps},
        )
    return loop.summary(learner)


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


def hopeless(cfg: OnlineDPOConfig, values: Metrics, flat_steps: int) -> str:
    """Why to stop: sampler and learner disagree, or there has been no pair for long. Empty: go on."""
    apart = health.mismatch(values, cfg.max_mismatch)
    if apart or flat_steps < cfg.max_flat_steps:
        return apart
    return (
        f"in the last {flat_steps} steps all completions of each task had equal rewards (mean {values['reward']:.3g}), "
        "so there was no pair to learn from. Use easier or harder tasks, a larger algo.group_size, or a reward that "
        "tells completions apart."
    )
