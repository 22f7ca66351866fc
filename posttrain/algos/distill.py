"""On-policy distillation: matches a student to a teacher on the student's own samples.

The student generates completions; at every generated token the loss is a divergence between the student's and the
teacher's next-token distributions, so the student trains on the states it actually visits (GKD, arXiv 2306.13649;
MiniLLM, arXiv 2306.08543). Every token has a training signal. The reward is only a metric.

Choices made here, where implementations differ: `full` computes the divergence exactly over the whole vocabulary;
`sampled` is the policy gradient with the per-token advantage log τ − log π of the sampled token (τ: teacher), without
discount or baseline: the same expected gradient in each visited state, with more variance. Neither propagates gradients
through the distribution of visited states. Both distributions are taken at `rollout.temperature`. There is one update
per batch of completions, so training is strictly on-policy; completions of the teacher or from a dataset are not mixed
in (GKD's λ is 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint as recompute

from posttrain import rng
from posttrain.config import ModelConfig
from posttrain.config.distill import DistillConfig, DistillRecipe
from posttrain.data import batching
from posttrain.evaluation.accuracy import Evaluator
from posttrain.models.load import Policy, load_policy
from posttrain.objectives.advantages import flat_groups
from posttrain.objectives.distill import DIVERGENCES, reverse_kl, sampled_reverse_kl
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
from posttrain.store.checkpoint import weights_digest
from posttrain.train import forward, health
from posttrain.train.job import Job, Loop, Setup, Summary
from posttrain.types import Batch, ConfigError, JsonView, ResumeError, Stat, Task, stat_values

Models = tuple[Policy, Policy]
"""(student, teacher)."""


def prepare(setup: Setup[DistillRecipe]) -> Job:
    """Loads the teacher, the tasks and their verifier; makes a collector on the student and a held-out evaluator."""
    recipe, policy = setup.recipe, setup.policy
    teacher = load_teacher(recipe, policy)
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    collector = journaled(make_collector(policy, setup.chat, verify, recipe, workers=setup.workers), setup)
    parts = (recipe, (policy, teacher), collector, sets.train, Evaluator(collector, sets.test, recipe.eval))
    return Job(policy, sets.hash, [*sets.notes, *teacher.notes_as("teacher")], lambda loop: run(*parts, loop))


def load_teacher(recipe: DistillRecipe, student: Policy) -> Policy:
    """Loads the frozen teacher on the student's device and in its precision.

    Raises ConfigError if no teacher is set, or if its vocabulary differs from the student's.
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
    """Makes the forward pass of student and teacher over the same batch.

    It returns (B, T) tensors, 0 at untrained positions: the per-token loss, the only one with a gradient; the student's
    and the teacher's log-probability of the sampled token; the student's entropy; the exact reverse KL; and whether
    both models have the same most likely token. Logits of both models exist for a chunk of positions at a time, in the
    backward pass too.
    """

    def compare(
        hidden: torch.Tensor, expert: torch.Tensor, targets: torch.Tensor, student: Policy, temperature: float
    ) -> tuple[torch.Tensor, ...]:
        """hidden, expert (n, width), targets (n,) → six tensors (n,)."""
        ours = torch.log_softmax(student.logits(hidden).float() / temperature, -1)  # (n, V)
        with torch.no_grad():
            rows = teacher.logits(expert)[:, : student.vocab]  # a larger teacher may have more padding rows
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
    """The weighted sum of the per-token losses of `make_forward`; all inputs (B, T)."""
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
    recipe: DistillRecipe, models: Models, collector: Collector, tasks: Sequence[Task], evaluator: Evaluator, loop: Loop
) -> Summary | None:
    """Trains until `train.steps`. Everything random is a function of (run.seed, step, task, completion).

    Raises ResumeError if the teacher's weights are not those the run was saved with.
    """
    cfg, train, (policy, teacher) = recipe.algo, recipe.train, models
    learner = loop.learner(policy, train, train.steps, recipe.rollout.temperature, make_forward(teacher, cfg))
    digest = weights_digest(dict(teacher.model.named_parameters()))

    def check(state: JsonView) -> None:
        if state["teacher"] != digest:
            raise ResumeError(
                f"the teacher {cfg.teacher!r} of {loop.store.folder} has other weights than when the run was saved. "
                "Restore it, or start a new run."
            )

    loop.restore(learner, check)
    for step in loop.steps(train.steps, lambda n: evaluator(n, learner.weights()), recipe.eval.every):
        batch_tasks, groups = sample_step(collector, tasks, recipe, learner.weights(), step)
        loop.sampled(sampled_tokens(groups))
        samples = [to_sample(e, 0.0) for g in groups for e in g]
        rng.seed_global(recipe.run.seed, "update", step)  # whatever the model draws
        batches = batching.micro(
            samples, train.micro_batch_tokens, cfg.aggregate, recipe.rollout.max_tokens, policy.device
        )
        stats = [episode_stats(groups, int(flat_groups(rewards_tensor(groups)).sum()), batch_tasks)]
        stats += [*learner.forward_backward(batches, loss), learner.step()]
        values = stat_values(stats)
        loop.end(
            learner,
            values,
            episode_rows("train", step + 1, groups, batch_tasks),
            events=health.unscored(values),
            hopeless=health.mismatch(values, cfg.max_mismatch),
            state={"teacher": digest},
        )
    return loop.summary(learner)
