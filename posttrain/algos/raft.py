"""Learning from one's own best answers: rejection sampling, RAFT (arXiv 2304.06767), expert iteration, STaR, ReST-EM.

A step is a round: the policy writes a group of answers to each task, a program judges them, some are selected, and
supervised fine-tuning makes the selected ones likelier. What is trained are the very tokens that were sampled, stop
token included; nothing is decoded and tokenised again.

What this file decides, and where implementations differ: the loss is the mean over all trained tokens of an optimizer
batch, at temperature 1 whatever the sampling temperature. `select = "best"` takes the best answer of a task even where
all are wrong, as RAFT is published; `passed` and `threshold` take none there. Answers of one task whose texts are
equal count once. Each round continues from the current weights (RAFT, rejection sampling) or, with `restart`, starts
again from the starting model with a fresh optimizer (STaR arXiv 2203.14465, ReST-EM arXiv 2312.06585), on this round's
answers or on all so far (`pool`; expert iteration, arXiv 1705.08439, keeps them all). An answer that was cut by
`rollout.max_tokens` is trained as far as it goes when it is selected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from posttrain import rng
from posttrain.config.raft import RaftConfig, RaftRecipe
from posttrain.data import batching
from posttrain.evaluation.accuracy import Evaluator
from posttrain.models.load import Policy, load_weights, trainable
from posttrain.objectives.advantages import flat_groups
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import (
    Collector,
    episode_rows,
    episode_stats,
    rewards_tensor,
    sample_step,
    sampled_tokens,
    to_sample,
)
from posttrain.rollout.tasks import judged_tasks
from posttrain.search.best_of_n import bon_kl
from posttrain.store.run import EpisodeRow
from posttrain.train import health
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import make_learner
from posttrain.types import Batch, Episode, Sample, Stat, Task, stat_values


def prepare(setup: Setup[RaftRecipe]) -> Job:
    """Judged tasks, a collector on the policy being trained, held-out evaluation."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = make_collector(policy, setup.chat, verify, recipe)
    evaluator = Evaluator(collector, sets.test, recipe.eval)
    return Job(policy, sets.hash, sets.notes, lambda loop: run(recipe, policy, collector, sets.train, evaluator, loop))


def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
    """−log π of the selected answers' tokens, weighted over the optimizer batch; logp, entropy (B, T)."""
    mask = b.mask
    stats = {
        "nll": Stat(-logp[mask].sum().item(), int(mask.sum())),
        "entropy": Stat(entropy[mask].sum().item(), int(mask.sum())),
    }
    return -(b.weights * torch.where(mask, logp, 0)).sum(), stats


def choose(group: Sequence[Episode], cfg: RaftConfig, *seed: int | str) -> list[Episode]:
    """The selected answers of one task: eligible, different in text, at most `max_per_task`.

    `best` takes the highest rewards first. Everything else is settled by an order that is a function of `seed`.
    """
    found = eligible([group[i] for i in rng.permutation(len(group), *seed)], cfg)
    if cfg.select == "best":
        found.sort(key=lambda e: -_reward(e))  # stable: equal rewards keep the drawn order
    different: dict[str, Episode] = {}
    for episode in found:
        different.setdefault(episode.text, episode)
    return list(different.values())[: cfg.max_per_task]


def eligible(group: Sequence[Episode], cfg: RaftConfig) -> list[Episode]:
    """The answers of a task that may be selected; one that could not be scored never is."""
    scored = [e for e in group if e.reward is not None]
    if cfg.select == "passed":
        return [e for e in scored if e.passed]
    if cfg.select == "threshold":
        return [e for e in scored if _reward(e) >= cfg.threshold]
    return scored


def selection_stats(
    groups: Sequence[Sequence[Episode]], chosen: Sequence[Sequence[Episode]], cfg: RaftConfig
) -> dict[str, Stat]:
    """What was selected, and how far selecting moves the policy: `selection_kl`, in nats per answer.

    That is a bound on KL(selected ‖ policy) for the best of n, log n − (n − 1)/n, and log(n / k) for the best k. Where
    answers are accepted by a test, it is −log of the share that passes, exact for a test's true share; tasks without
    an accepted answer have none.
    """
    answers = [e for picks in chosen for e in picks]
    stats = {
        "selected_share": Stat(len(answers), sum(len(g) for g in groups)),
        "selected_per_task": Stat(len(answers), len(groups)),
        "reward_selected": Stat(sum(map(_reward, answers)), len(answers)),
    }
    for group, picks in zip(groups, chosen, strict=True):
        if not picks:
            continue
        scored = sum(e.reward is not None for e in group)
        if cfg.select == "best":
            kl = bon_kl(scored) if cfg.max_per_task == 1 else math.log(scored / len(picks))
        else:
            kl = math.log(scored / len(eligible(group, cfg)))
        stats["selection_kl"] = stats.get("selection_kl", Stat(0.0, 0)) + Stat(kl)
    return {name: stat for name, stat in stats.items() if stat.count}


def run(
    recipe: RaftRecipe, policy: Policy, collector: Collector, tasks: Sequence[Task], evaluator: Evaluator, loop: Loop
) -> Summary | None:
    """Runs `train.steps` rounds. The pool is part of the checkpoint; everything random is a function of
    (run.seed, round, task, completion)."""
    cfg, train, seed = recipe.algo, recipe.train, recipe.run.seed
    starting = {n: w.detach().clone() for n, w in trainable(policy).items()} if cfg.restart else {}
    learner = make_learner(policy, train, 0)  # without restart the rate is constant, whatever the number of updates
    saved = loop.restore(learner)
    empty_rounds, pool = saved.get("empty_rounds", 0), list[Sample]()
    if "pool" in saved.get("tensors", {}):
        pool = unpack(saved["tensors"]["pool"])

    def evaluate(step: int) -> tuple[Metrics, list[EpisodeRow]]:
        return evaluator(step, learner.weights())  # of the newest learner

    for step in loop.steps(train.steps, evaluate, recipe.eval.every):
        asked, groups = sample_step(collector, tasks, recipe, learner.weights(), step)
        loop.sampled(sampled_tokens(groups))
        chosen = [choose(g, cfg, seed, "select", step, i) for i, g in enumerate(groups)]
        fresh = [to_sample(e, 1.0) for picks in chosen for e in picks]
        pool = joined(pool, fresh) if cfg.pool == "all" else fresh
        stats = [episode_stats(groups, int(flat_groups(rewards_tensor(groups)).sum()))]
        stats.append({**selection_stats(groups, chosen, cfg), "pool": Stat(len(pool), 1, "sum")})
        if fresh:  # a round in which nothing was selected changes nothing, momentum included
            if cfg.restart:
                load_weights(policy, starting)
                learner = make_learner(policy, train, cfg.epochs * math.ceil(len(pool) / cfg.batch_rows))
            rng.seed_global(seed, "update", step)  # dropout, if the model has any
            for epoch in range(cfg.epochs):
                order = rng.permutation(len(pool), seed, "epoch", step, epoch)
                for i in range(0, len(pool), cfg.batch_rows):
                    rows = [pool[j] for j in order[i : i + cfg.batch_rows]]
                    batches = batching.micro(rows, train.micro_batch_tokens, "token-mean", device=policy.device)
                    stats += [*learner.forward_backward(batches, loss), learner.step()]
        values, empty_rounds = stat_values(stats), 0 if fresh else empty_rounds + 1
        loop.end(
            learner,
            values,
            episode_rows("train", step + 1, groups, asked, weights_of(groups, chosen)),
            events=health.unscored(values)
            + health.repeated("empty", "Nothing was selected for {steps} rounds in a row.", empty_rounds, 1),
            hopeless=hopeless(cfg, values, empty_rounds),
            state={"empty_rounds": empty_rounds},
            tensors={"pool": pack(pool)} if pool and cfg.pool == "all" else {},  # a round's own are not needed later
        )
    return loop.summary(learner)


def joined(pool: Sequence[Sample], fresh: Sequence[Sample]) -> list[Sample]:
    """The pool and those fresh answers (prompt included) that are not in it yet, in that order."""
    known = {tuple(s.tokens.tolist()) for s in pool}
    return [*pool, *(s for s in fresh if tuple(s.tokens.tolist()) not in known)]


def pack(pool: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """A pool as three tensors: all tokens end to end, which of them are trained, and the length of each row."""
    return {
        "tokens": torch.from_numpy(np.concatenate([s.tokens for s in pool]).astype(np.int64)),
        "trained": torch.from_numpy(np.concatenate([s.loss_mask for s in pool])),
        "lengths": torch.tensor([len(s.tokens) for s in pool]),
    }


def unpack(tensors: Mapping[str, torch.Tensor]) -> list[Sample]:
    """The pool that `pack` gave; what the sampler thought of the tokens is not kept, as training does not ask."""
    ends = np.cumsum(tensors["lengths"].numpy())[:-1]
    rows = zip(*(np.split(tensors[name].numpy(), ends) for name in ("tokens", "trained")), strict=True)
    return [Sample(tokens, mask, np.zeros(len(mask), np.float32), mask.astype(np.float32)) for tokens, mask in rows]


def weights_of(groups: Sequence[Sequence[Episode]], chosen: Sequence[Sequence[Episode]]) -> torch.Tensor:
    """(P, G): 1 for a selected answer, 0 for another; fine-tuning on them is a policy gradient with this advantage."""
    picked = [{e.index for e in picks} for picks in chosen]
    return torch.tensor([[float(e.index in p) for e in g] for g, p in zip(groups, picked, strict=True)])


def _reward(episode: Episode) -> float:
    assert episode.reward is not None, "only scored answers are compared"
    return episode.reward


def hopeless(cfg: RaftConfig, values: Metrics, empty_rounds: int) -> str:
    """Why to stop: nothing has been selected for long. Empty: go on."""
    if empty_rounds < cfg.max_empty:
        return ""
    return (
        f"nothing was selected for {empty_rounds} rounds in a row (mean reward {values['reward']:.3g}, "
        f"algo.select={cfg.select!r}), so nothing was learned. Use easier tasks, a larger algo.group_size, a lower "
        "algo.threshold, or a better starting model."
    )
