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
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.config.raft import RaftConfig, RaftRecipe
from posttrain.data import batching
from posttrain.evaluation.accuracy import Examiner
from posttrain.models.load import Policy, load_weights, trainable
from posttrain.objectives.advantages import flat_groups
from posttrain.rollout.build import Job, OnStep, Setup, final_answer, judged_tasks, make_collector
from posttrain.rollout.collector import (
    Collector,
    check_failures,
    episode_rows,
    episode_stats,
    rewards_tensor,
    timings,
    to_sample,
)
from posttrain.search.best_of_n import bon_kl
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import Event, Run
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner
from posttrain.types import Batch, Episode, Sample, Stat, Task, TrainingDiverged, add_stats


def prepare(setup: Setup) -> Job:
    """The job of a recipe: judged tasks, a collector on the policy being trained, an examination."""
    recipe, policy = setup.recipe, setup.policy
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = make_collector(policy, setup.chat, verify, recipe)
    examine = Examiner(collector, sets.test, recipe.eval.samples, recipe.eval.temperature, final_answer)
    return Job(policy, sets.hash, sets.notes, lambda *rest: run(recipe, policy, collector, sets.train, examine, *rest))


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
    recipe: RaftRecipe,
    policy: Policy,
    collector: Collector,
    train_tasks: Sequence[Task],
    examine: Examiner,
    store: Run,
    on_step: OnStep,
    interrupt: Interrupt,
) -> dict[str, Any] | None:
    """Runs `train.steps` rounds, from the run's newest checkpoint if it has one.

    Everything random is a function of (run.seed, round, task, attempt), and the pool is part of the checkpoint, so a
    run that was killed anywhere and resumed ends with the same bits. Returns the summary, or None when `interrupt`
    asked it to stop (saved, resumable).
    """
    cfg, seed = recipe.algo, recipe.run.seed
    starting = {n: w.detach().clone() for n, w in trainable(policy).items()} if cfg.restart else {}
    learner = Learner(policy, recipe.train, 0)  # without restart the rate is constant, whatever the number of updates
    step, empty_rounds = 0, 0
    pool: list[Sample] = []
    if saved := checkpoint.latest(store.folder):
        tensors, state = checkpoint.load(saved)
        learner.load(tensors, state["learner"])
        step, empty_rounds = state["step"], state["empty_rounds"]
        pool = unpack(tensors["pool"]) if "pool" in tensors else []

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

        chosen = [choose(g, cfg, seed, "select", step, i) for i, g in enumerate(groups)]
        fresh = [to_sample(e, 1.0) for picks in chosen for e in picks]
        pool = joined(pool, fresh) if cfg.pool == "all" else fresh
        stats = [episode_stats(groups, int(flat_groups(rewards_tensor(groups)).sum()))]
        stats.append({**selection_stats(groups, chosen, cfg), "pool": Stat(len(pool), 1, "sum")})
        if fresh:  # a round without a selected answer changes nothing, momentum included
            if cfg.restart:
                load_weights(policy, starting)
                learner = Learner(policy, recipe.train, cfg.epochs * math.ceil(len(pool) / cfg.batch_rows))
            rng.seed_global(seed, "update", step)  # dropout, if the model has any
            for epoch in range(cfg.epochs):
                order = rng.permutation(len(pool), seed, "epoch", step, epoch)
                for i in range(0, len(pool), cfg.batch_rows):
                    rows = [pool[j] for j in order[i : i + cfg.batch_rows]]
                    batches = batching.micro(rows, recipe.train.tokens_per_pass, "token-mean", device=policy.device)
                    stats += [learner.forward_backward(batch, loss) for batch in batches]
                    stats.append(learner.step())
        step += 1
        empty_rounds = 0 if fresh else empty_rounds + 1
        failpoint("step:updated")

        values = {name: stat.value for name, stat in add_stats(stats).items()}
        times = timings(groups, start, sampled)
        rows = episode_rows("train", step, groups, tasks, weights_of(groups, chosen))
        if step == recipe.train.steps or (recipe.eval.every and step % recipe.eval.every == 0):
            measured, eval_rows = examine(step, learner.weights())
            values, rows = values | measured, rows + eval_rows
        failpoint("step:before-store")
        store.write(step, values, times, rows, _events(values, empty_rounds))
        failpoint("step:after-store")
        on_step(step, values | times)
        _stop_if_empty(cfg, step, values, empty_rounds)
        if step % recipe.run.checkpoint_every == 0 or step == recipe.train.steps or interrupt.requested:
            failpoint("step:before-checkpoint")
            tensors, state = learner.state()
            if pool and cfg.pool == "all":  # a round's own answers are not needed after it
                tensors["pool"] = pack(pool)
            whole = {"step": step, "empty_rounds": empty_rounds, "learner": state}
            checkpoint.save(store.folder, step, tensors, whole, recipe.run.keep)
            failpoint("step:after-checkpoint")
    if step < recipe.train.steps:
        return None
    before, after = store.at(0), store.at(step)
    return {"steps": step, "before": before, "after": after, "weights": checkpoint.weights_digest(learner.weights())}


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


def _events(values: dict[str, float], empty_rounds: int) -> list[Event]:
    """What a person should know about this round."""
    events: list[Event] = []
    if values["unscored"]:
        events.append(Event("warning", "unscored", f"{values['unscored']:.0f} attempts could not be scored."))
    if empty_rounds:
        events.append(Event("warning", "empty", f"Nothing was selected for {empty_rounds} rounds in a row."))
    return events


def _stop_if_empty(cfg: RaftConfig, step: int, values: dict[str, float], empty_rounds: int) -> None:
    """Raises TrainingDiverged when nothing has been selected for long."""
    if empty_rounds >= cfg.max_empty:
        raise TrainingDiverged(
            f"round {step}: nothing was selected for {empty_rounds} rounds in a row (mean reward "
            f"{values['reward']:.3g}, algo.select={cfg.select!r}), so nothing was learned. Use easier tasks, a larger "
            "algo.group_size, a lower algo.threshold, or a better starting model."
        )
