"""DPO and its variants: offline preference optimization from pairs, or from single labelled completions (KTO).

The implicit reward of a completion is β log π/π_ref; the losses (objectives/preference.py) raise the reward of the
chosen completion relative to the rejected one. The log-probability of a completion is the sum over its tokens, stop
token included, or the mean where the paper of the loss uses it (SimPO, ORPO); `length_normalise` overrides this.

Choices made here, where implementations differ: every pair has weight 1/N in an optimizer batch of N, whatever its
length, so gradients of micro-batches add up. The negative log-likelihood that ORPO and CPO add is that of the chosen
completion in the form the loss itself uses: the mean over its tokens for ORPO, the sum for CPO (elsewhere it is often
one mean over all tokens of a batch). Reference log-probabilities are computed once, before the first update, from the
starting weights (or `algo.reference`). KTO's baseline is one number per optimizer batch, from each row's prompt paired
with a completion of another prompt, so it does not depend on the split into micro-batches; elsewhere each micro-batch
has its own. Dropout follows the model's setting during training and is off in the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.config.dpo import DPOConfig, DPORecipe
from posttrain.data import batching
from posttrain.data.epochs import Epochs
from posttrain.data.pairs import judgement_rows, pair_rows
from posttrain.evaluation.accuracy import Evaluator, bootstrap
from posttrain.models.load import Policy, load_policy
from posttrain.objectives.preference import PAIR_LOSSES, implicit_rewards, kto, kto_baseline, sequence_logp
from posttrain.objectives.tokens import kl_k2
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import with_logp
from posttrain.rollout.sample_pairs import ComparedSets, load_judgements, load_pairs
from posttrain.store.run import EpisodeRow
from posttrain.train.device import model_hash
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import Learner, Loss
from posttrain.train.reference_cache import reference_logprobs
from posttrain.types import Batch, ConfigError, DataError, Judgement, Preference, Sample, Stat, stat_values


@dataclass(frozen=True)
class Feedback:
    """Training rows. For pairs, rows 2i and 2i + 1 are the chosen and the rejected completion of one prompt.

    For judgements (KTO), each row is one completion, and `mismatched` has its prompt with a completion of another one.
    """

    rows: list[Sample]
    together: int  # rows per item: 2 for pairs, 1 for judgements
    mismatched: list[Sample] = field(default_factory=list[Sample])

    def __post_init__(self) -> None:
        if len(self.rows) % self.together:
            raise DataError(f"{len(self.rows)} rows do not form pairs: a chosen or rejected completion is missing.")

    def __len__(self) -> int:
        return len(self.rows) // self.together

    def subset(self, order: Sequence[int]) -> Feedback:
        """The items with these indices."""
        rows = [self.rows[i * self.together + k] for i in order for k in range(self.together)]
        return Feedback(rows, self.together, [self.mismatched[i] for i in order] if self.mismatched else [])


def prepare(setup: Setup[DPORecipe]) -> Job:
    """Tokenizes the feedback, computes reference log-probabilities and holds out a share."""
    recipe, policy = setup.recipe, setup.policy
    unpaired = recipe.algo.loss == "kto"
    sets = load_judgements(setup) if unpaired else load_pairs(setup)
    (train, notes), (test, _) = (feedback(part, setup, unpaired) for part in (sets.train, sets.test))
    check(train, recipe.algo)
    if recipe.algo.referenced:
        train, test, more = with_reference(train, test, recipe, policy)
        notes += more
    evaluator = make_evaluator(setup, sets)
    content = f"{sets.hash}+{model_hash(recipe.algo.reference)}" if recipe.algo.reference else sets.hash
    return Job(policy, content, sets.notes + notes, lambda loop: run(recipe, policy, train, test, evaluator, loop))


def make_loss(cfg: DPOConfig, beta: float, baseline: torch.Tensor | None = None) -> Loss:
    """The loss of one micro-batch, weighted per pair or judgement over the optimizer batch; `baseline` is KTO's z₀."""

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:  # (B, T)
        mask = b.mask
        assert b.labels is not None and b.margins is not None
        logps = sequence_logp(logp, mask, cfg.normalised)  # (B,)
        refs = torch.zeros_like(logps) if b.ref_logp is None else sequence_logp(b.ref_logp, mask, cfg.normalised)
        each, right, stats = compare(cfg, beta, logps, refs, b.labels, b.margins, baseline)  # (N,)
        weights = b.row_weights.view(len(each), -1).sum(1)  # the weight of a pair is that of its two rows
        stats["preference_accuracy"] = Stat(right.nansum().item(), int((~right.isnan()).sum()))
        stats["entropy"] = Stat(entropy[mask].sum().item(), int(mask.sum()))
        if b.ref_logp is not None:
            stats["data_kl"] = Stat(kl_k2(logp.detach()[mask], b.ref_logp[mask]).sum().item(), int(mask.sum()))
        return (weights * each).sum(), stats

    return loss


def compare(
    cfg: DPOConfig,
    beta: float,
    answers: torch.Tensor,  # (B,) log-probabilities under the policy
    refs: torch.Tensor,  # (B,) the same under the reference
    labels: torch.Tensor,  # (B,)
    margins: torch.Tensor,  # (B,)
    baseline: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Stat]]:
    """(loss, right, stats) of pairs (B = 2N) or judgements (B = N), the first two (N,).

    `right` is 1 where the implicit reward agrees with the label: it orders the pair correctly (for KTO, it is on the
    right side of the baseline). It is 0.5 for equal rewards and NaN for pairs labelled as ties.
    """
    if cfg.loss == "kto":
        assert baseline is not None
        desirable = labels > 0.5
        each = kto(answers, refs, desirable, baseline, beta, cfg.desirable_weight, cfg.undesirable_weight)
        rewards = beta * (answers - refs).detach()
        right = _right(rewards - beta * baseline.clamp_min(0), labels)
        return each, right, _summary(rewards[desirable], rewards[~desirable], answers[desirable], answers[~desirable])
    chosen, rejected, ref_chosen, ref_rejected = answers[0::2], answers[1::2], refs[0::2], refs[1::2]
    label = labels[0::2] * (1 - cfg.label_smoothing) + (1 - labels[0::2]) * cfg.label_smoothing
    margin = cfg.margin + cfg.margin_coef * margins[0::2]
    each = PAIR_LOSSES[cfg.loss](chosen, rejected, ref_chosen, ref_rejected, beta, label, margin)
    each = each - cfg.nll_weight * chosen
    good, bad = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    stats = _summary(good, bad, chosen, rejected)
    stats["reward_margin"] = Stat((good - bad).sum().item(), len(good))
    return each, _right(good - bad, labels[0::2]), stats


def beta_at(cfg: DPOConfig, step: int, steps: int) -> float:
    """β of update `step` (from 0) of `steps`: from beta at the first to, if scheduled, beta_end at the last."""
    if cfg.beta_schedule == "constant":
        return cfg.beta
    done = step / max(1, steps - 1)
    share = done if cfg.beta_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return cfg.beta * (1 - share) + cfg.beta_end * share


def run(
    recipe: DPORecipe, policy: Policy, train: Feedback, test: Feedback, evaluator: Evaluator | None, loop: Loop
) -> Summary | None:
    """Trains for `train.steps` steps (0: `train.epochs` passes over the feedback)."""
    cfg, token_budget, seed = recipe.algo, recipe.train.micro_batch_tokens, recipe.run.seed
    epochs = Epochs(len(train), cfg.batch_pairs, recipe.train, seed, recipe.data.shuffle)
    learner = loop.learner(policy, recipe.train, epochs.steps)
    loop.restore(learner)

    def evaluate(step: int) -> tuple[Metrics, list[EpisodeRow]]:
        values = held_out(learner, test, cfg)
        if evaluator is None:
            return values, []
        sampled, episodes = evaluator(step, learner.weights())
        return values | sampled, episodes

    for step in loop.steps(epochs.steps, evaluate, recipe.eval.every):
        part, beta = train.subset(epochs.rows(step)), beta_at(cfg, step, epochs.steps)
        baseline = mismatch_kl(learner, part, cfg)  # over the whole optimizer batch
        rng.seed_global(seed, "update", step)  # whatever the model draws
        batches = batching.micro(
            part.rows, token_budget, "seq-mean-token-sum", device=policy.device, together=part.together
        )  # each token of a row has weight 1 / rows
        stats = learner.forward_backward(batches, make_loss(cfg, beta, baseline))
        stats += [learner.step(), {"beta": Stat(beta)}]
        if baseline is not None:
            stats.append({"kl_baseline": Stat(baseline.item())})
        loop.end(learner, stat_values(stats), tokens=sum(len(r.tokens) for r in part.rows))
    return loop.summary(learner)


def feedback(items: Sequence[Any], setup: Setup[DPORecipe], unpaired: bool) -> tuple[Feedback, list[str]]:
    """Token rows of preferences or judgements, and notes on truncated rows."""
    max_tokens = setup.recipe.pairs.max_tokens
    if not unpaired:
        rows, notes = pair_rows(items, setup.chat, max_tokens)
        return Feedback(rows, 2), notes
    rows, notes = judgement_rows(items, setup.chat, max_tokens)
    return Feedback(rows, 1, mismatch(rows, setup.recipe.run.seed, max_tokens)), notes


def mismatch(rows: Sequence[Sample], seed: int, max_tokens: int) -> list[Sample]:
    """Pairs each prompt with the completion of the next row, in a seeded order, that has another prompt (KTO's z₀).

    Raises DataError if all rows have the same prompt.
    """
    starts = [int(np.flatnonzero(row.loss_mask)[0]) for row in rows]
    prompts = [row.tokens[:start].tobytes() for row, start in zip(rows, starts, strict=True)]
    if rows and len(set(prompts)) < 2:
        raise DataError(
            f"all {len(rows)} training or held-out judgements have the same prompt, but kto's baseline needs "
            "completions of other prompts. Give two or more prompts on each side, or set data.holdout = 0."
        )
    order = rng.permutation(len(rows), seed, "mismatch")
    out: list[Sample] = [row for row in rows]
    for position, i in enumerate(order):
        other = next(
            j for j in (order[(position + k) % len(order)] for k in range(1, len(order))) if prompts[j] != prompts[i]
        )
        answer = rows[other].tokens[rows[other].loss_mask]
        tokens = np.concatenate([rows[i].tokens[: starts[i]], answer])[:max_tokens]
        blank = np.zeros(len(tokens), np.float32)
        out[i] = Sample(tokens, np.arange(len(tokens)) >= starts[i], blank, blank + 1)
    return out


def mismatch_kl(learner: Learner, part: Feedback, cfg: DPOConfig) -> torch.Tensor | None:
    """KTO's baseline z₀ for one optimizer batch under the current weights, a scalar; None for pairs."""
    if not part.mismatched:
        return None
    now = learner.logprobs(part.mismatched)
    return kto_baseline(answer_logp(now, part.mismatched, cfg), answer_logp(None, part.mismatched, cfg))


def answer_logp(logp: Sequence[np.ndarray] | None, rows: Sequence[Sample], cfg: DPOConfig) -> torch.Tensor:
    """Log-probabilities (B,) of whole completions from per-token ones; None: the reference's, or 0 without one."""
    totals: list[float] = []
    for row, values in zip(rows, [r.ref_logp for r in rows] if logp is None else logp, strict=True):
        total = 0.0 if values is None else float(values[row.loss_mask].sum(dtype=np.float64))
        totals.append(total / int(row.loss_mask.sum()) if cfg.normalised else total)
    return torch.tensor(totals)


def held_out(learner: Learner, test: Feedback, cfg: DPOConfig) -> dict[str, float]:
    """Loss and accuracy on held-out feedback, at `algo.beta`; empty without held-out feedback.

    The accuracy is a mean over prompts with a bootstrap interval over prompts, because pairs of one prompt are not
    independent.
    """
    if not len(test):
        return {}
    labels, margins = (torch.tensor([getattr(row, name) for row in test.rows]) for name in ("label", "margin"))
    logps = answer_logp(learner.logprobs(test.rows), test.rows, cfg)
    refs = answer_logp(None, test.rows, cfg)
    each, right, stats = compare(cfg, cfg.beta, logps, refs, labels, margins, mismatch_kl(learner, test, cfg))
    by_prompt: dict[bytes, list[float]] = {}
    for row, value in zip(test.rows[:: test.together], right.tolist(), strict=True):
        if not math.isnan(value):
            by_prompt.setdefault(row.tokens[: int(np.flatnonzero(row.loss_mask)[0])].tobytes(), []).append(value)
    accuracy = bootstrap([sum(values) / len(values) for values in by_prompt.values()])
    return {
        "eval/loss": float(each.mean()),
        "eval/preference_accuracy": accuracy.value,
        "eval/preference_accuracy_low": accuracy.low,
        "eval/preference_accuracy_high": accuracy.high,
        **{f"eval/{name}": stat.value for name, stat in stats.items()},
    }


def with_reference(
    train: Feedback, test: Feedback, recipe: DPORecipe, policy: Policy
) -> tuple[Feedback, Feedback, list[str]]:
    """Adds reference log-probabilities, by default those of the weights before training; also returns notes."""
    model = load_reference(recipe, policy) if recipe.algo.reference else policy
    parts = (train.rows, train.mismatched, test.rows, test.mismatched)
    values, notes = reference_logprobs(model, [row for part in parts for row in part], recipe.train.micro_batch_tokens)
    notes += model.notes_as("reference") if model is not policy else []
    remaining = iter(values)
    filled = [with_logp(part, "ref_logp", lambda rows: [next(remaining) for _ in rows]) for part in parts]
    return Feedback(filled[0], train.together, filled[1]), Feedback(filled[2], test.together, filled[3]), notes


def load_reference(recipe: DPORecipe, policy: Policy) -> Policy:
    """Loads the model in `algo.reference`. Raises ConfigError if it is missing or has another vocabulary."""
    name = recipe.algo.reference
    try:
        model = load_policy(replace(recipe.model, path=name, lora_rank=0, continue_adapter=False), str(policy.device))
    except ConfigError as error:
        raise ConfigError(
            f"cannot load the reference model: {error} Or set algo.reference_free to train without one."
        ) from None
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigError(
            f"the reference model {name!r} has another vocabulary ({model.vocab} tokens) than {policy.source!r} "
            f"({policy.vocab}), so it cannot score the same tokens. Use a reference of the same model family."
        )
    return model


def check(train: Feedback, cfg: DPOConfig) -> None:
    """Raises DataError for feedback that the loss cannot use."""
    labels = [row.label for row in train.rows[:: train.together]]
    if cfg.loss == "kto" and len({label > 0.5 for label in labels}) < 2:
        kind = "desirable" if labels[0] > 0.5 else "undesirable"
        raise DataError(
            f"all {len(labels)} judgements are {kind}, but kto needs both kinds. Add the other kind, or use sft."
        )
    if cfg.loss == "robust" and 0.5 in labels:
        raise DataError(
            f"{labels.count(0.5)} pairs are ties (label 0.5), for which the robust loss divides by 0. Remove them."
        )


def make_evaluator(
    setup: Setup[DPORecipe], sets: ComparedSets[Preference] | ComparedSets[Judgement]
) -> Evaluator | None:
    """Evaluates sampled completions on held-out tasks, if the feedback was sampled on tasks with a reward."""
    if sets.tasks is None or sets.verify is None:
        return None
    collector = make_collector(setup.policy, setup.chat, sets.verify, setup.recipe, workers=setup.workers)
    return Evaluator(collector, sets.tasks.test, setup.recipe.eval)


def _right(gap: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    agrees = gap * (labels - 0.5).sign()
    return torch.where(labels == 0.5, torch.nan, (agrees > 0).float() + 0.5 * (agrees == 0).float())


def _summary(good: torch.Tensor, bad: torch.Tensor, good_logp: torch.Tensor, bad_logp: torch.Tensor) -> dict[str, Stat]:
    parts = {"chosen_reward": good, "rejected_reward": bad, "chosen_logp": good_logp, "rejected_logp": bad_logp}
    return {name: Stat(values.sum().item(), len(values)) for name, values in parts.items()}
