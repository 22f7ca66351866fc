"""On-policy distillation: the student writes, a teacher says what it would have written. The algorithm in one file.

The student answers tasks; at every token it wrote, its next-token distribution is moved towards the teacher's at the
same place, so it learns in the states that it really gets into (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543).
There is a signal at each token and no reward; the reward only measures.

What this file decides, and where implementations differ: `full` compares whole next-token distributions, exactly;
`sampled` is the policy gradient with the per-token advantage log τ − log π of the drawn token, no discount and no
baseline, which has the same expectation in each visited state and more noise. That earlier tokens decide which states
are visited is left out by both. Both distributions are taken at `rollout.temperature`. One update per batch of answers,
so it is strictly on-policy; answers of the teacher or of a data set are not mixed in (GKD's λ is 1).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute

from posttrain import rng
from posttrain.config import ModelConfig
from posttrain.config.distill import DistillConfig, DistillRecipe
from posttrain.data import batching
from posttrain.evaluation.accuracy import Examiner
from posttrain.models.load import Policy, load_policy
from posttrain.objectives.advantages import flat_groups
from posttrain.objectives.distill import DIVERGENCES, reverse_kl, sampled_reverse_kl
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
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import Event, Run
from posttrain.train import forward
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner
from posttrain.types import Batch, ConfigError, ResumeError, Stat, Task, TrainingDiverged, add_stats


def prepare(setup: Setup) -> Job:
    """The job of a recipe: judged tasks, the teacher, a collector on the policy being trained, an examination."""
    recipe, policy = setup.recipe, setup.policy
    teacher = load_teacher(recipe, policy)
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = make_collector(policy, setup.chat, verify, recipe)
    examine = Examiner(collector, sets.test, recipe.eval.samples, recipe.eval.temperature, final_answer)
    return Job(
        policy, sets.hash, sets.notes, lambda *rest: run(recipe, policy, teacher, collector, sets.train, examine, *rest)
    )


def load_teacher(recipe: DistillRecipe, student: Policy) -> Policy:
    """The frozen teacher, on the student's device and in its precision.

    Raises ConfigError where there is none, or where its tokens do not mean what the student's do.
    """
    name = recipe.algo.teacher
    if not name:
        raise ConfigError("algo.teacher is empty; name the model to learn from: a folder, hub id or finished run.")
    path = name
    if (Path(name) / "run.json").exists():
        path = str(Path(name) / "model")
        if not Path(path).exists():
            raise ConfigError(f"teacher {name!r} is a run that has not finished. Resume it first: posttrain resume.")
    teacher = load_policy(ModelConfig(path=path, dtype=recipe.model.dtype), student.device)
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    odd = min((token for token, _ in ours.items() ^ theirs.items()), default=None)
    if odd is not None:
        raise ConfigError(
            f"teacher {name!r} and student {recipe.model.path!r} have different vocabularies: {odd!r}, for one, is "
            f"token {theirs.get(odd)} there and {ours.get(odd)} here. Choose a teacher with the student's tokenizer."
        )
    if teacher.vocab < student.vocab:
        raise ConfigError(
            f"teacher {name!r} has {teacher.vocab} output rows for the student's {student.vocab}, so it says nothing "
            "about the last ones. Choose a teacher of the same size of vocabulary."
        )
    teacher.model.requires_grad_(False).eval()
    return teacher


def make_forward(teacher: Policy, cfg: DistillConfig) -> forward.Forward:
    """A pass of student and teacher over the same batch.

    It yields (B, T) tensors, 0 where nothing is trained: the per-token loss, which alone carries a gradient, and, of
    the student and the drawn tokens, logp, teacher_logp, entropy, exact reverse KL, and whether both find the same
    token likeliest. Logits of both exist for a few positions at a time only, also in the backward pass.
    """

    def compare(
        hidden: torch.Tensor, expert: torch.Tensor, targets: torch.Tensor, student: Policy, temperature: float
    ) -> tuple[torch.Tensor, ...]:
        """hidden, expert (n, width), targets (n,) → six tensors (n,)."""
        ours = torch.log_softmax(student.head(hidden).float() / temperature, -1)  # (n, V)
        with torch.no_grad():
            rows = teacher.head(expert)[:, : student.vocab]  # a larger teacher may have more rows for padding
            theirs = torch.log_softmax(rows.float() / temperature, -1)
        logp, teacher_logp = (x.gather(-1, targets.unsqueeze(-1)).squeeze(-1) for x in (ours, theirs))
        if cfg.estimator == "full":
            per_token = DIVERGENCES[cfg.divergence](ours, theirs, cfg.beta)
        else:
            per_token = sampled_reverse_kl(logp, teacher_logp, torch.ones_like(targets, dtype=torch.bool))
        fixed = ours.detach()
        entropy, agree = -(fixed.exp() * fixed).sum(-1), fixed.argmax(-1) == theirs.argmax(-1)
        return per_token, logp.detach(), teacher_logp, entropy, reverse_kl(fixed, theirs), agree.float()

    def both(student: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, ...]:
        targets = batch.tokens[batch.mask]
        with torch.no_grad():
            expert = forward.before_trained(teacher, batch)
        hidden = forward.before_trained(student, batch)
        size = max(1, forward.LOGITS_PER_CHUNK // (2 * student.vocab))
        parts = [
            recompute(compare, *part, student, temperature, use_reentrant=False)
            for part in zip(hidden.split(size), expert.split(size), targets.split(size), strict=True)
        ]
        columns = zip(*parts, strict=True)  # type: ignore[arg-type]
        return tuple(forward.scatter(torch.cat(column), batch.mask) for column in columns)

    return both


def loss(
    per_token: torch.Tensor,
    logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    entropy: torch.Tensor,
    kl: torch.Tensor,
    agree: torch.Tensor,
    b: Batch,
) -> tuple[torch.Tensor, dict[str, Stat]]:
    """The weighted sum of the per-token divergences of `make_forward`; everything (B, T)."""
    mask = b.mask
    stats = {
        "divergence": Stat.over(per_token.detach(), mask),
        "reverse_kl": Stat.over(kl, mask),
        "teacher_logp": Stat.over(teacher_logp, mask),
        "agreement": Stat.over(agree, mask),
        "entropy": Stat.over(entropy, mask),
    }
    gap = (logp - b.behaviour_logp).abs()[mask]
    stats["mismatch"] = Stat(gap.max().item() if gap.numel() else 0.0, 1, "max")
    stats["mismatch_mean"] = Stat(gap.sum().item(), gap.numel())
    return (b.weights * per_token).sum(), stats


def run(
    recipe: DistillRecipe,
    policy: Policy,
    teacher: Policy,
    collector: Collector,
    train_tasks: Sequence[Task],
    examine: Examiner,
    store: Run,
    on_step: OnStep,
    interrupt: Interrupt,
) -> dict[str, Any] | None:
    """Trains until `train.steps`, from the run's newest checkpoint if it has one.

    Everything random is a function of (run.seed, step, task, attempt), so a run that was killed anywhere and resumed
    ends with the same bits. Returns the summary, or None when `interrupt` asked it to stop (saved, resumable). Raises
    ResumeError where the teacher is not the one the run was saved with.
    """
    cfg, seed = recipe.algo, recipe.run.seed
    temperature = recipe.rollout.temperature
    learner = Learner(policy, recipe.train, recipe.train.steps, temperature, make_forward(teacher, cfg))
    digest = checkpoint.weights_digest(dict(teacher.model.named_parameters()))
    step = 0
    if saved := checkpoint.latest(store.folder):
        tensors, state = checkpoint.load(saved)
        if state["teacher"] != digest:
            raise ResumeError(
                f"the teacher {cfg.teacher!r} of {store.folder} has other weights than when the run was saved. "
                "Restore it, or start a new run."
            )
        learner.load(tensors, state["learner"])
        step = state["step"]

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

        samples = [to_sample(e, 0.0) for g in groups for e in g]
        rng.seed_global(seed, "update", step)  # dropout, if the model has any
        batches = batching.micro(
            samples, recipe.train.tokens_per_pass, cfg.aggregate, recipe.rollout.max_tokens, policy.device
        )
        stats = [episode_stats(groups, int(flat_groups(rewards_tensor(groups)).sum()))]
        stats += [learner.forward_backward(batch, loss) for batch in batches]
        stats.append(learner.step())
        step += 1
        failpoint("step:updated")

        values = {name: stat.value for name, stat in add_stats(stats).items()}
        times = timings(groups, start, sampled)
        rows = episode_rows("train", step, groups, tasks)
        if step == recipe.train.steps or (recipe.eval.every and step % recipe.eval.every == 0):
            measured, eval_rows = examine(step, learner.weights())
            values, rows = values | measured, rows + eval_rows
        failpoint("step:before-store")
        store.write(step, values, times, rows, _events(values))
        failpoint("step:after-store")
        on_step(step, values | times)
        _stop_on_mismatch(recipe, step, values)
        if step % recipe.run.checkpoint_every == 0 or step == recipe.train.steps or interrupt.requested:
            failpoint("step:before-checkpoint")
            tensors, state = learner.state()
            whole = {"step": step, "teacher": digest, "learner": state}
            checkpoint.save(store.folder, step, tensors, whole, recipe.run.keep)
            failpoint("step:after-checkpoint")
    if step < recipe.train.steps:
        return None
    before, after = store.at(0), store.at(step)
    return {"steps": step, "before": before, "after": after, "weights": checkpoint.weights_digest(learner.weights())}


def _events(values: dict[str, float]) -> list[Event]:
    """What a person should know about this step."""
    unscored = values["unscored"]
    return [Event("warning", "unscored", f"{unscored:.0f} attempts could not be scored.")] if unscored else []


def _stop_on_mismatch(recipe: DistillRecipe, step: int, values: dict[str, float]) -> None:
    """Raises TrainingDiverged when sampler and learner disagree."""
    if values["mismatch"] > recipe.algo.max_mismatch:
        raise TrainingDiverged(
            f"step {step}: sampler and learner differ by {values['mismatch']:.3g} in a token's log-probability "
            f"(allowed: algo.max_mismatch={recipe.algo.max_mismatch}). The rollouts are not from this policy."
        )
