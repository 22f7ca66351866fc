"""Reward model: scores whole completions, trained on preference pairs.

The model reads a conversation, and a linear head maps the last hidden state at the token that ends the completion to
one score. The loss of a pair is −log σ(chosen − rejected), the Bradley-Terry preference model (InstructGPT, arXiv
2203.02155, eq. 1), so only score differences carry meaning.

Choices made here, where implementations differ: every pair has the same weight, whatever its prompt; the score is read
at the end-of-turn token; a pair longer than `pairs.max_tokens` is dropped rather than truncated, because a truncated
completion has no end to read the score at; the default is one pass over the pairs (a second pass overfits, as
InstructGPT found); margins and centring are off; after training, the head biases are shifted so that the training
completions have mean score 0. With `heads` = K, head k weights each pair by its own Poisson(1) count, an online
bootstrap (Oza and Russell, 2001) that the seed fixes for the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from posttrain import rng
from posttrain.config.reward import RewardModelConfig, RewardModelRecipe
from posttrain.data import batching
from posttrain.data.chat import ChatFormat
from posttrain.data.epochs import Epochs
from posttrain.data.pairs import pair_rows
from posttrain.evaluation.accuracy import wilson
from posttrain.evaluation.calibration import Bin, calibration
from posttrain.models.heads import as_critic, attach_scalar
from posttrain.models.load import Policy
from posttrain.objectives.reward import bradley_terry, centring
from posttrain.rollout.sample_pairs import load_pairs
from posttrain.store.run import EpisodeRow
from posttrain.train.forward import row_scores
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import Learner, Loss
from posttrain.types import Batch, DataError, Preference, Sample, Stat, stat_values

BINS = 20  # over predicted probabilities in [0, 1]; confidences fall into the upper half

Pair = tuple[Sample, Sample]
"""The rows of a preference pair: (chosen, rejected)."""


def prepare(setup: Setup[RewardModelRecipe]) -> Job:
    """Tokenizes the pairs, holds out a share of them and attaches a scalar head to the model."""
    recipe, policy = setup.recipe, setup.policy
    sets = load_pairs(setup)
    train, notes = whole_pairs(sets.train, setup.chat, recipe.pairs.max_tokens)
    test, _ = whole_pairs(sets.test, setup.chat, recipe.pairs.max_tokens)
    about = {"kind": "reward", "format": recipe.data.format, **setup.chat.about()}
    as_critic(attach_scalar(policy, recipe.algo.heads, recipe.run.seed, about=about))
    return Job(policy, sets.hash, sets.notes + notes, lambda loop: run(recipe, policy, train, test, loop))


def whole_pairs(preferences: Sequence[Preference], chat: ChatFormat, max_tokens: int) -> tuple[list[Pair], list[str]]:
    """Tokenizes preferences into rows that end with the end-of-turn token; also notes on dropped pairs."""
    rows, notes = pair_rows(preferences, chat, np.iinfo(np.int32).max)
    ended = [_ended(row) for row in rows]
    pairs = list(zip(ended[::2], ended[1::2], strict=True))
    kept = [pair for pair in pairs if max(len(row.tokens) for row in pair) <= max_tokens]
    if len(kept) < len(pairs):
        notes.append(f"{len(pairs) - len(kept)} pairs longer than pairs.max_tokens={max_tokens} were left out.")
    if preferences and not kept:
        raise DataError(f"none of {len(preferences)} pairs fits pairs.max_tokens={max_tokens}; raise it.")
    return kept, notes


def make_loss(cfg: RewardModelConfig, weights: torch.Tensor) -> Loss:
    """The Bradley-Terry loss over an optimizer batch of N pairs; weights (N, K) of each pair for each head."""

    def loss(scores: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:  # (2n, K): chosen, rejected, …
        assert b.labels is not None and b.margins is not None
        chosen, rejected = scores[0::2], scores[1::2]
        label, margin = b.labels[0::2, None], b.margins[0::2, None] * cfg.margin
        per_pair = bradley_terry(chosen, rejected, label, margin)  # (n, K)
        if cfg.centre_coef:
            per_pair = per_pair + cfg.centre_coef * centring(chosen, rejected)
        gap = ((chosen - rejected) * (label - 0.5).sign()).detach().mean(1)  # (n,) over heads; 0 for a tie
        untied = label[:, 0] != 0.5
        stats = {
            "pair_accuracy": Stat(float((gap > 0)[untied].sum()), int(untied.sum())),
            "score_gap": Stat(float(gap.sum()), int(untied.sum())),
            "score_mean": Stat(float(scores.detach().sum()), scores.numel()),
        }
        rows = b.rows or tuple(range(len(scores)))
        part = weights[[row // 2 for row in rows[0::2]]]  # (n, K)
        return (part.to(per_pair) * per_pair).sum(), stats

    return loss


def run(
    recipe: RewardModelRecipe, policy: Policy, train: Sequence[Pair], test: Sequence[Pair], loop: Loop
) -> Summary | None:
    """Trains for `train.steps` steps (0: `train.epochs` passes over the pairs).

    The summary includes the calibration table.
    """
    cfg, seed, micro_batch_tokens = recipe.algo, recipe.run.seed, recipe.train.micro_batch_tokens
    counts = bootstrap_counts(len(train), cfg.heads, seed)
    epochs = Epochs(len(train), cfg.batch_pairs, recipe.train, seed, recipe.data.shuffle)
    learner = loop.learner(policy, recipe.train, epochs.steps, forward=row_scores)
    loop.restore(learner)

    def evaluate(step: int) -> tuple[Metrics, list[EpisodeRow]]:
        return held_out(learner, test)[0], []

    for step in loop.steps(epochs.steps, evaluate, recipe.eval.every):
        order = epochs.rows(step)
        pairs, weights = [train[i] for i in order], counts[list(order)] / (len(order) * cfg.heads)
        rng.seed_global(seed, "update", step)  # whatever the model draws
        stats = learner.forward_backward(
            pair_batches(pairs, micro_batch_tokens, policy.device), make_loss(cfg, weights)
        )
        values = stat_values([*stats, learner.step()])
        if cfg.normalise and loop.is_exported(step + 1):
            shift_to_zero(learner, train)
        loop.end(learner, values, tokens=sum(len(row.tokens) for pair in pairs for row in pair))
    summary = loop.summary(learner)
    return summary and summary | {"calibration": held_out(learner, test)[1]}


def bootstrap_counts(pairs: int, heads: int, seed: int) -> torch.Tensor:
    """Bootstrap count of each pair for each head (pairs, heads): Poisson(1), or 1 with a single head."""
    if heads == 1:
        return torch.ones(pairs, 1)
    uniforms = np.stack([rng.uniforms(rng.key("bootstrap", seed, k), pairs) for k in range(heads)], axis=1)
    below = np.cumsum([math.exp(-1) / math.factorial(n) for n in range(16)])  # P(count ≤ n)
    return torch.from_numpy(np.searchsorted(below, uniforms, side="right").astype(np.float32))


def pair_batches(pairs: Sequence[Pair], micro_batch_tokens: int, device: torch.device) -> list[Batch]:
    """Micro-batches of at most `micro_batch_tokens` tokens with chosen and rejected rows adjacent; `rows` 2i and 2i + 1
    are pair i."""
    batches: list[Batch] = []
    for part in batching.passes([sum(len(row.tokens) for row in pair) for pair in pairs], micro_batch_tokens):
        rows = [row for i in part for row in pairs[i]]
        batch = batching.pad(rows, batching.loss_masks(rows).float(), device)
        batches.append(replace(batch, rows=tuple(2 * i + k for i in part for k in (0, 1))))
    return batches


def shift_to_zero(learner: Learner, train: Sequence[Pair]) -> None:
    """Shifts each head's bias so that its mean score over the training completions is 0; differences do not change."""
    scores = np.stack(learner.outputs([row for pair in train for row in pair], row_scores))
    bias = learner.weights()["scalar.bias"]
    learner.assign({"scalar.bias": bias - torch.from_numpy(scores.mean(0, dtype=np.float64)).to(bias)})


def held_out(learner: Learner, pairs: Sequence[Pair]) -> tuple[dict[str, float], list[Bin]]:
    """Metrics `eval/…` on held-out pairs, and the calibration table; both empty without held-out pairs.

    Several heads are evaluated by their mean score. Ties (label 0.5) do not count towards accuracy and score gap. The
    confidence of a prediction is σ(|difference|); it is correct if the higher-scored completion is the preferred one.
    """
    if not pairs:
        return {}, []
    heads = np.stack(learner.outputs([row for pair in pairs for row in pair], row_scores)).astype(np.float64)
    scores = heads.mean(1)
    label = np.array([chosen.label for chosen, _ in pairs])
    gap = scores[0::2] - scores[1::2]
    better, untied = gap * np.sign(label - 0.5), label != 0.5
    error, table = calibration(1 / (1 + np.exp(-np.abs(gap))), np.where(gap >= 0, label, 1 - label), BINS)
    accuracy = wilson(int((better[untied] > 0).sum()), int(untied.sum()))
    loss = bradley_terry(*(torch.from_numpy(x) for x in (scores[0::2], scores[1::2], label, np.zeros_like(label))))
    values = {
        "eval/pair_accuracy": accuracy.value,
        "eval/pair_accuracy_low": accuracy.low,
        "eval/pair_accuracy_high": accuracy.high,
        "eval/pair_loss": float(loss.mean()),
        "eval/score_gap": float(better[untied].mean()) if untied.any() else math.nan,
        "eval/score_mean": float(scores.mean()),
        "eval/score_std": float(scores.std()),
        "eval/ece": error,
    }
    if heads.shape[1] > 1:
        values["eval/uncertainty"] = float(heads.std(1).mean())
    return values, table


def _ended(row: Sample) -> Sample:
    """The row up to the end-of-turn token of the completion, where the score is read."""
    end = int(np.flatnonzero(row.loss_mask)[-1]) + 1
    parts = (row.tokens, row.loss_mask, row.behaviour_logp, row.advantages)
    return Sample(*(part[:end] for part in parts), label=row.label, margin=row.margin)
