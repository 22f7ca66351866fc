"""Fine-tuning on the model's own best samples: rejection sampling, RAFT (arXiv 2304.06767), expert iteration, STaR,
ReST-EM.

Each step is a round: sample a group of completions per task, score them with a verifier or reward model, select some
and fine-tune on them with cross-entropy. Training uses the sampled token ids themselves, stop token included; nothing
is decoded and tokenized again.

Choices made here, where implementations differ: the loss is the mean over all trained tokens of an optimizer batch, at
temperature 1 whatever the sampling temperature. `select = "best"` takes the best completion of a task even if all are
wrong, as published for RAFT; `passed` and `threshold` then select none. Completions of one task with equal texts count
once. Each round continues from the current weights (RAFT, rejection sampling) or, with `restart`, from the starting
model with a fresh optimizer (STaR arXiv 2203.14465, ReST-EM arXiv 2312.06585), on this round's completions or on all so
far (`pool`; expert iteration, arXiv 1705.08439, keeps them all). A selected completion that was truncated at
`rollout.max_tokens` is trained as it is.
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
from posttrain.rollout.journal import journaled
from posttrain.rollout.tasks import judged_tasks
from posttrain.search.best_of_n import bon_kl
from posttrain.store.run import EpisodeRow
from posttrain.train import health
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.types import Batch, Episode, Sample, Stat, Task, stat_values


def prepare(setup: Setup[RaftRecipe]) -> Job:
    """Loads the tasks and their verifier; makes a collector on the policy being trained and a held-out evaluator."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = journaled(make_collector(policy, setup.chat, verify, recipe, workers=setup.workers), setup)
    evaluator = Evaluator(collector, sets.test, recipe.eval)
    return Job(policy, sets.hash, sets.notes, lambda loop: run(recipe, policy, collector, sets.train, evaluator, loop))


def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
    """Negative log-likelihood of the selected completions, weighted over the optimizer batch; logp, entropy (B, T)."""
    mask = b.mask
    stats = {
        "nll": Stat(-logp[mask].sum().item(), int(mask.sum())),
        "entropy": Stat(entropy[mask].sum().item(), int(mask.sum())),
    }
    return -(b.weights * torch.where(mask, logp, 0)).sum(), stats


def choose(group: Sequence[Episode], cfg: RaftConfig, *seed: int | str) -> list[Episode]:
    """Selects completions of one task: eligible, with distinct texts, at most `max_per_task`.

    `best` takes the highest rewards first. Ties, and the choice under the other rules, follow an order that is a
    function of `seed`.
    """
    candidates = eligible([group[i] for i in rng.permutation(len(group), *seed)], cfg)
    if cfg.select == "best":
        candidates.sort(key=lambda e: -_reward(e))  # stable: equal rewards keep the seeded order
    different: dict[str, Episode] = {}
    for episode in candidates:
        different.setdefault(episode.text, episode)
    return list(different.values())[: cfg.max_per_task]


def eligible(group: Sequence[Episode], cfg: RaftConfig) -> list[Episode]:
    """The completions of a task that may be selected; unscored ones never are."""
    scored = [e for e in group if e.reward is not None]
    if cfg.select == "passed":
        return [e for e in scored if e.passed]
    if cfg.select == "threshold":
        return [e for e in scored if _reward(e) >= cfg.threshold]
    return scored


def selection_stats(
    groups: Sequence[Sequence[Episode]], chosen: Sequence[Sequence[Episode]], cfg: RaftConfig
) -> dict[str, Stat]:
    """Metrics of the selection, including `selection_kl`: how far it shifts the policy, in nats per completion.

    For the best of n it is the bound log n − (n − 1)/n on KL(selected ‖ policy), and log(n / k) for the best k. With a
    pass test it is −log of the share that passes, which is exact for the true pass rate; tasks without an accepted
    completion are left out.
    """
    selected = [e for picks in chosen for e in picks]
    stats = {
        "selected_share": Stat(len(selected), sum(len(g) for g in groups)),
        "selected_per_task": Stat(len(selected), len(groups)),
        "reward_selected": Stat(sum(map(_reward, selected)), len(selected)),
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
    learner = loop.learner(policy, train, 0)  # without restart the learning rate is constant
    saved = loop.restore(learner)
    empty_rounds, pool = saved.get("empty_rounds", 0), list[Sample]()
    if "pool" in saved.get("tensors", {}):
        pool = unpack(saved["tensors"]["pool"])

    def evaluate(step: int) -> tuple[Metrics, list[EpisodeRow]]:
        return evaluator(step, learner.weights())

    for step in loop.steps(train.steps, evaluate, recipe.eval.every):
        batch_tasks, groups = sample_step(collector, tasks, recipe, learner.weights(), step)
        loop.sampled(sampled_tokens(groups))
        chosen = [choose(g, cfg, seed, "select", step, i) for i, g in enumerate(groups)]
        fresh = [to_sample(e, 1.0) for picks in chosen for e in picks]
        pool = joined(pool, fresh) if cfg.pool == "all" else fresh
        stats = [episode_stats(groups, int(flat_groups(rewards_tensor(groups)).sum()), batch_tasks)]
        stats.append({**selection_stats(groups, chosen, cfg), "pool": Stat(len(pool), 1, "sum")})
        if fresh:  # with nothing selected the optimizer takes no step, not even from momentum
            if cfg.restart:
                load_weights(policy, starting)
                learner = loop.learner(policy, train, cfg.epochs * math.ceil(len(pool) / cfg.batch_rows))
            rng.seed_global(seed, "update", step)  # whatever the model draws
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
            episode_rows("train", step + 1, groups, batch_tasks, weights_of(groups, chosen)),
            events=health.unscored(values)
            + health.repeated("empty", "Nothing was selected for {steps} rounds in a row.", empty_rounds, 1),
            hopeless=hopeless(cfg, values, empty_rounds),
            state={"empty_rounds": empty_rounds},
            tensors={"pool": pack(pool)} if pool and cfg.pool == "all" else {},  # each round has its own otherwise
        )
    return loop.summary(learner)


def joined(pool: Sequence[Sample], fresh: Sequence[Sample]) -> list[Sample]:
    """The pool followed by the fresh rows (prompt and completion) that it does not contain yet."""
    known = {tuple(s.tokens.tolist()) for s in pool}
    return [*pool, *(s for s in fresh if tuple(s.tokens.tolist()) not in known)]


def pack(pool: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Packs a pool into three tensors: concatenated tokens, their loss mask, and the length of each row."""
    return {
        "tokens": torch.from_numpy(np.concatenate([s.tokens for s in pool]).astype(np.int64)),
        "trained": torch.from_numpy(np.concatenate([s.loss_mask for s in pool])),
        "lengths": torch.tensor([len(s.tokens) for s in pool]),
    }


def unpack(tensors: Mapping[str, torch.Tensor]) -> list[Sample]:
    """Inverse of `pack`. The sampler's log-probabilities are not stored, because SFT does not use them."""
    ends = np.cumsum(tensors["lengths"].numpy())[:-1]
    rows = zip(*(np.split(tensors[name].numpy(), ends) for name in ("tokens", "trained")), strict=True)
    return [Sample(tokens, mask, np.zeros(len(mask), np.float32), mask.astype(np.float32)) for tokens, mask in rows]


def weights_of(groups: Sequence[Sequence[Episode]], chosen: Sequence[Sequence[Episode]]) -> torch.Tensor:
    """(P, G) 1 for selected completions, else 0; fine-tuning on them is a policy gradient with this advantage."""
    picked = [{e.index for e in picks} for picks in chosen]
    return torch.tensor([[float(e.index in p) for e in g] for g, p in zip(groups, picked, strict=True)])


def _reward(episode: Episode) -> float:
    assert episode.reward is not None, "only scored completions are compared"
    return episode.reward


def hopeless(cfg: RaftConfig, values: Metrics, empty_rounds: int) -> str:
    """Reason to stop the run: nothing was selected for `max_empty` rounds. Empty to continue."""
    if empty_rounds < cfg.max_empty:
        return ""
    return (
        f"nothing was selected for {empty_rounds} rounds in a row (mean reward {values['reward']:.3g}, "
        f"algo.select={cfg.select!r}), so nothing was learned. Use easier tasks, a larger algo.group_size, a lower "
        "algo.threshold, or a better starting model."
    )
