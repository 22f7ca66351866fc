"""PPO with a critic (Schulman et al., arXiv 1707.06347) for RLHF, as in InstructGPT (arXiv 2203.02155).

Each completion gets one score, at its last token, and a KL penalty against the starting model at every token. A critic
predicts the remaining return before each token, and generalised advantage estimation (GAE) computes token advantages
from the values and rewards. The clipped policy gradient increases the probability of tokens with a positive advantage.
A new value head predicts 0, so the first advantages are returns discounted by γλ.

Choices made here, where implementations differ:
- The KL penalty is part of the token rewards (InstructGPT, TRL, OpenRLHF), not a loss term (GRPO). The score is added
  at the last trained token, the stop token if there is one.
- Only trained tokens count as time steps. GAE skips tokens the policy did not generate, so a tool result adds no
  discount and does not end the trajectory (verl, NeMo-RL); TRL's experimental PPO and SkyRL treat such tokens as the
  policy's own.
- Advantages are whitened over the whole step, before the split into minibatches, with variance over n − 1 (TRL, verl;
  NeMo-RL and OpenRLHF divide by n). Returns are computed from the unwhitened advantages.
- The value loss has a factor ½ (OpenRLHF, NeMo-RL; TRL has it too and multiplies by `vf_coef`, as a shared critic does
  here). Values are clipped around those at sampling time, as in OpenAI's code.
- In both losses every token of the optimizer batch has the same weight (token-mean), whatever its micro-batch.
- The rollout buffer is fixed: `old_logp`, `old_values`, advantages and returns are computed once, with the same
  micro-batches as the first epoch, so the first ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.config.ppo import PPOConfig, PPORecipe
from posttrain.data import batching
from posttrain.data.conversations import load_conversations
from posttrain.data.demonstrations import demonstration_rows
from posttrain.evaluation.accuracy import Evaluator
from posttrain.models.load import Policy
from posttrain.objectives.policy import clip
from posttrain.objectives.tokens import kl, kl_k3, masked_mean, masked_var, whiten
from posttrain.objectives.values import adaptive_kl, gae, token_rewards, value_loss
from posttrain.rollout import collector as collect
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import Collector
from posttrain.rollout.journal import journaled
from posttrain.rollout.tasks import judged_tasks
from posttrain.train import forward as passes
from posttrain.train import health
from posttrain.train.critic import ReturnScale, make_critic
from posttrain.train.forward import Forward
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import Learner, Loss
from posttrain.train.reference import PerRow, frozen_reference
from posttrain.types import Batch, Episode, Sample, Stat, Task, add_stats, stat_values

Rows = Sequence[Sample]
FLAT = "All scores were equal for {steps} steps in a row."


@dataclass
class Progress:
    """State of a run besides weights and optimizers; saved in every checkpoint."""

    kl_coef: float
    step: int = 0
    flat_steps: int = 0
    solved_steps: int = 0
    ptx_rows: int = 0  # demonstrations used so far: position in their shuffled order
    scale: ReturnScale = field(default_factory=ReturnScale)  # updated only with whiten_returns


def prepare(setup: Setup[PPORecipe]) -> Job:
    """Loads tasks, verifier, critic and the demonstrations of the ptx term; makes the collector and the evaluator."""
    recipe, policy, cfg = setup.recipe, setup.policy, setup.recipe.algo
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    critic = make_critic(recipe.model, policy, cfg.critic == "shared", cfg.critic_init, recipe.run.seed)
    collector = journaled(make_collector(policy, setup.chat, verify, recipe, workers=setup.workers), setup)
    data_hash, notes, demonstrations = sets.hash, list(sets.notes), list[Sample]()
    if cfg.ptx_coef:
        data = replace(recipe.data, tasks=cfg.ptx_data, eval_tasks="", holdout=0.0)
        loaded = load_conversations(data, recipe.run.seed)
        demonstrations, cut = demonstration_rows(loaded.train, setup.chat, cfg.ptx_max_tokens)
        data_hash += f"+{loaded.hash}"
        notes += [f"{cut} rows of algo.ptx_data were cut at algo.ptx_max_tokens={cfg.ptx_max_tokens}."] * bool(cut)
    notes += critic.notes_as("critic") if cfg.critic_init and critic is not policy else []
    evaluator = Evaluator(collector, sets.test, recipe.eval)
    parts = (recipe, policy, critic, collector, sets.train, demonstrations, evaluator)
    return Job(policy, data_hash, notes, lambda loop: run(*parts, loop))


def policy_loss(cfg: PPOConfig) -> Loss:
    """Clipped policy loss minus the entropy bonus; (logp (B, T), entropy (B, T), batch) → (scalar, stats)."""

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
        mask = b.mask
        assert b.old_logp is not None
        per_token, clipped = clip(logp, b.old_logp, b.advantages, mask, cfg.clip_low, cfg.clip_high)
        per_token = per_token - cfg.entropy_coef * entropy
        moved = kl_k3(torch.where(mask, b.old_logp, 0), torch.where(mask, logp.detach(), 0))
        stats = {"clipped": clipped.float(), "entropy": entropy.detach(), "approx_kl": moved}
        return (b.weights * per_token).sum(), {name: Stat.over(values, mask) for name, values in stats.items()}

    return loss


def critic_loss(cfg: PPOConfig) -> Loss:
    """Clipped value loss; (values (B, T), batch) → (scalar, stats)."""

    def loss(values: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
        assert b.old_values is not None and b.returns is not None
        per_token, clipped = value_loss(values, b.old_values, b.returns, b.mask, cfg.value_clip)
        stats = {
            "value_loss": Stat.over(per_token.detach(), b.mask),
            "value_clipped": Stat.over(clipped.float(), b.mask),
        }
        return (b.weights * per_token).sum(), stats

    return loss


def shared_loss(cfg: PPOConfig, only_critic: bool) -> Loss:
    """Policy loss + vf_coef · value loss, for a critic head on the policy; `only_critic` drops the policy loss."""
    of_policy, of_critic = policy_loss(cfg), critic_loss(cfg)

    def loss(logp: torch.Tensor, entropy: torch.Tensor, values: torch.Tensor, b: Batch) -> Any:
        value, stats = of_critic(values, b)
        if only_critic:
            return cfg.vf_coef * value, stats
        surrogate, more = of_policy(logp, entropy, b)
        return surrogate + cfg.vf_coef * value, {**stats, **more}

    return loss


def ptx_loss(coef: float) -> Loss:
    """coef · mean negative log-probability of the demonstration tokens (InstructGPT's ptx term)."""

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
        imitate = -(b.weights * torch.where(b.mask, logp, 0)).sum()
        return coef * imitate, {"ptx_nll": Stat.over(-logp.detach(), b.mask)}

    return loss


def make_forward(cfg: PPOConfig) -> Forward:
    """The forward pass of the policy's learner; it includes values if the critic is shared."""
    base: Forward = passes.token_stats_with_entropy if cfg.entropy_coef else passes.token_stats
    if cfg.critic == "shared":
        base = passes.actor_critic

    def forward(policy: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, ...]:
        if batch.returns is None:  # demonstrations: temperature 1 as in sft, no values
            return passes.token_stats(policy, batch, 1.0)
        return base(policy, batch, temperature)

    return forward


def run(
    recipe: PPORecipe,
    policy: Policy,
    critic_policy: Policy,
    collector: Collector,
    tasks: Sequence[Task],
    demonstrations: Rows,
    evaluator: Evaluator,
    loop: Loop,
) -> Summary | None:
    """Trains until `train.steps`. Everything random is a function of (run.seed, step, task, completion)."""
    cfg, train, temperature = recipe.algo, recipe.train, recipe.rollout.temperature
    learner, critic = make_learners(recipe, policy, critic_policy, loop)
    valuer = critic or learner
    token_budget, progress = train.micro_batch_tokens, Progress(kl_coef=cfg.kl_coef)
    reference = frozen_reference(recipe.model, policy, token_budget, temperature) if cfg.kl_coef else None
    if saved := loop.restore(learner):
        progress = Progress(**{**saved["progress"], "scale": ReturnScale(**saved["progress"]["scale"])})
        progress.solved_steps = 0 if loop.extended else progress.solved_steps
        if critic:
            critic_tensors = saved["tensors"]
            critic.load({"model": critic_tensors["critic"], "optim": critic_tensors["critic_optim"]}, saved["critic"])

    for step in loop.steps(train.steps, lambda n: evaluator(n, learner.weights()), recipe.eval.every):
        batch_tasks, groups = collect.sample_step(collector, tasks, recipe, learner.weights(), step)
        loop.sampled(collect.sampled_tokens(groups))

        scores = terminal_scores([e for group in groups for e in group], cfg)  # (B,)
        samples = [collect.to_sample(e, 0.0) for group in groups for e in group]
        first = minibatch_rows(recipe, step, 0)
        samples = fill(samples, first, "old_logp", learner.logprobs)
        if reference is not None:
            samples = fill(samples, first, "ref_logp", reference)
        samples = fill(
            samples,
            first,
            "old_values",
            lambda part: passes.per_token(part, lambda rows: valuer.outputs(rows, passes.token_values)),
        )
        samples, frozen = freeze(samples, scores, cfg, progress, valuer)

        rng.seed_global(recipe.run.seed, "update", step)  # whatever the model draws
        stats = [collect.episode_stats(groups, 0, batch_tasks), frozen]
        stats += improve(recipe, progress, learner, critic, samples, demonstrations)
        values = {name: value for name, value in stat_values(stats).items() if name != "flat_groups"}
        known = scores[scores.isfinite()]
        if cfg.kl_controller == "adaptive" and len(known) and step >= cfg.critic_warmup:
            measured = values["kl_episode"]
            progress.kl_coef = adaptive_kl(progress.kl_coef, measured, cfg.kl_target, cfg.kl_horizon, len(known))
        flat = len(known.unique()) < 2
        progress.flat_steps = progress.flat_steps + 1 if flat else 0
        progress.solved_steps = health.solved_steps(progress.solved_steps, flat, values)
        progress.step = step + 1
        advantages = mean_advantages(samples).view(len(groups), -1)
        tensors, state = {}, {"progress": asdict(progress)}
        if critic:
            learned, state["critic"] = critic.state()
            tensors = {"critic": learned["model"], "critic_optim": learned["optim"]}
        loop.end(
            learner,
            values,
            collect.episode_rows("train", step + 1, groups, batch_tasks, advantages),
            events=health.unscored(values) + health.repeated("flat", FLAT, progress.flat_steps),
            hopeless=hopeless(cfg, values, 0 if progress.solved_steps else progress.flat_steps),
            solved=health.solved(progress.solved_steps, cfg.max_flat_steps),
            state=state,
            tensors=tensors,
        )
    return loop.summary(learner)


def improve(
    recipe: PPORecipe, at: Progress, learner: Learner, critic: Learner | None, samples: Rows, demonstrations: Rows
) -> list[dict[str, Stat]]:
    """Updates the policy and critic: epochs × minibatches over the rollout buffer, one optimizer step each."""
    cfg, token_budget, device = recipe.algo, recipe.train.micro_batch_tokens, learner.policy.device
    warming, per_step, waits = at.step < cfg.critic_warmup, cfg.epochs * cfg.minibatches, _waits(cfg, critic)
    policy_objective = policy_loss(cfg) if critic else shared_loss(cfg, only_critic=warming)
    out: list[dict[str, Stat]] = []
    for epoch in range(cfg.epochs):
        stats: list[dict[str, Stat]] = []  # of the latest minibatch
        for update, part in enumerate(minibatch_rows(recipe, at.step, epoch), epoch * cfg.minibatches):
            rows = [samples[i] for i in part]
            if not any(row.loss_mask.any() for row in rows):
                continue  # with nothing to train on the optimizer takes no step, not even from momentum
            stats = []
            batches = batching.micro(rows, token_budget, "token-mean", device=device)
            if critic:
                stats += map(_of_critic, critic.forward_backward(batches, critic_loss(cfg)))
            if not (critic and warming):
                stats += learner.forward_backward(batches, policy_objective)
            if demonstrations and not warming:
                order = rng.draw_order(len(demonstrations), at.ptx_rows, cfg.ptx_rows, rng.key(recipe.run.seed, "ptx"))
                ptx_batches = batching.micro(
                    [demonstrations[i] for i in order], token_budget, "token-mean", device=device
                )
                stats += learner.forward_backward(ptx_batches, ptx_loss(cfg.ptx_coef))
                at.ptx_rows += cfg.ptx_rows
            if critic:
                stats.append(_of_critic(critic.step(update=at.step * per_step + update)))
            if not (critic and warming):  # warming up a shared critic trains only its head
                planned = (at.step - waits) * per_step + update
                stats.append(learner.step(only="scalar." if warming else "", update=planned))
            out += stats
        approx_kl = add_stats(stats).get("approx_kl")
        if cfg.target_kl and approx_kl is not None and approx_kl.value > cfg.target_kl:
            break
    return out


def freeze(
    samples: Rows, scores: torch.Tensor, cfg: PPOConfig, at: Progress, critic: Learner
) -> tuple[list[Sample], dict[str, Stat]]:
    """Completes the rollout buffer: adds advantages and returns to samples with `old_logp`, `old_values`, `ref_logp`.

    `ref_logp` is optional. scores (B,) are NaN where unscored; such a row has no trained token and is left out of all
    statistics. `whiten_returns` updates the running statistics in `at` and rescales the critic's head to preserve its
    values.
    """
    b = batching.pad(samples, batching.loss_masks(samples).float())
    mask = b.mask
    assert b.old_logp is not None and b.old_values is not None
    ref_logp = b.old_logp if b.ref_logp is None else b.ref_logp
    distance = torch.where(mask, kl(b.old_logp, ref_logp, cfg.kl_estimator), 0)
    rewards = token_rewards(scores, distance, mask, at.kl_coef)
    total = rewards.sum()
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    values = torch.where(mask, at.scale.restore(b.old_values), 0)
    advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)

    tokens, scored = int(mask.sum()), scores.isfinite()
    gap, spread = (b.old_logp - b.behaviour_logp).abs()[mask], masked_var(returns, mask, bessel=False)
    stats = {
        "score": Stat(scores[scored].sum().item(), int(scored.sum())),
        "returns": Stat(masked_mean(returns, mask).item()),
        "advantages_std": Stat(masked_var(advantages, mask).sqrt().item()),
        "mismatch": Stat(gap.max().item() if tokens else 0.0, 1, "max"),
        "mismatch_mean": Stat(gap.sum().item(), tokens),
    }
    if b.ref_logp is not None:
        stats["score_less_kl"] = Stat(total.item(), int(scored.sum()))
        stats["kl"] = Stat(distance.sum().item(), tokens)
        stats["kl_episode"] = Stat(distance.sum().item(), int(scored.sum()))
        stats["kl_coef"] = Stat(at.kl_coef)
    if spread > 0:
        stats["explained_variance"] = Stat(1 - (masked_var(returns - values, mask, bessel=False) / spread).item())

    if cfg.whiten_advantages:
        advantages = whiten(advantages, mask)
    if cfg.whiten_returns and tokens:
        at.scale.update(critic, returns[mask])
        values, returns = (torch.where(mask, at.scale.normalise(x), 0) for x in (values, returns))
    columns = zip(samples, advantages.numpy(), values.numpy(), returns.numpy(), strict=True)
    trimmed = ((s, a[: len(s.tokens)], v[: len(s.tokens)], r[: len(s.tokens)]) for s, a, v, r in columns)
    return [replace(s, advantages=a, old_values=v, returns=r) for s, a, v, r in trimmed], stats


def terminal_scores(episodes: Sequence[Episode], cfg: PPOConfig) -> torch.Tensor:
    """Scores (B,) float32, NaN where unscored; `truncated` sets how truncated completions are scored."""
    scores = collect.rewards_tensor([episodes])[0]
    cut = torch.tensor([e.stop == "length" for e in episodes])
    if cfg.truncated == "penalise":
        return torch.where(cut, scores + cfg.truncated_value, scores)
    if cfg.truncated == "replace":
        return torch.where(cut & scores.isfinite(), cfg.truncated_value, scores)
    return scores


def minibatch_rows(recipe: PPORecipe, step: int, epoch: int) -> list[np.ndarray]:
    """Row indices of each minibatch of an epoch."""
    count = recipe.algo.prompts * recipe.algo.group_size
    order = rng.permutation(count, recipe.run.seed, "minibatch", step, epoch)
    return [np.sort(part) for part in np.array_split(order, recipe.algo.minibatches)]


def fill(samples: Rows, parts: Sequence[np.ndarray], name: str, of: PerRow) -> list[Sample]:
    """Fills in the field `name`, part by part, with the same micro-batches that the update on that part will use."""
    out = list(samples)
    for part in parts:
        for i, sample in zip(part, collect.with_logp([samples[i] for i in part], name, of), strict=True):
            out[i] = sample
    return out


def make_learners(recipe: PPORecipe, policy: Policy, critic: Policy, loop: Loop) -> tuple[Learner, Learner | None]:
    """The policy's learner, and the critic's if it is separate."""
    cfg, train = recipe.algo, recipe.train
    per_step = cfg.epochs * cfg.minibatches
    waits = _waits(cfg, None if critic is policy else critic)
    total, temperature = (train.steps - waits) * per_step, recipe.rollout.temperature
    learner = loop.learner(policy, train, total, temperature, make_forward(cfg))
    if critic is policy:
        return learner, None
    critic_cfg = replace(train, lr=cfg.critic_lr)
    return learner, loop.learner(critic, critic_cfg, train.steps * per_step, forward=passes.token_values)


def _waits(cfg: PPOConfig, critic: object) -> int:
    """Steps before the policy's first update: a separate critic is trained alone for `critic_warmup` steps."""
    return 0 if critic is None else cfg.critic_warmup


def mean_advantages(samples: Rows) -> torch.Tensor:
    """Mean advantage (B,) over each row's trained tokens; 0 for a row without trained tokens."""
    return torch.tensor([s.advantages[s.loss_mask].mean() if s.loss_mask.any() else 0.0 for s in samples])


def _of_critic(stats: dict[str, Stat]) -> dict[str, Stat]:
    """Renames a separate critic's stats so that they do not clash with the policy's; its loss is `value_loss`."""
    names = {"grad_norm": "critic_grad_norm", "lr": "critic_lr"}
    return {names.get(name, name): stat for name, stat in stats.items() if name != "loss"}


def hopeless(cfg: PPOConfig, values: Metrics, flat_steps: int) -> str:
    """Reason to stop: sampler and learner disagree, or all scores were equal for long. Empty to continue."""
    disagreement = health.mismatch(values, cfg.max_mismatch)
    if disagreement or flat_steps < cfg.max_flat_steps:
        return disagreement
    return (
        f"in the last {flat_steps} steps all completions had the same score (now {values['score']:.3g}). Use easier or "
        "harder tasks, or a reward that tells completions apart."
    )
