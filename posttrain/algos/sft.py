"""Supervised fine-tuning (SFT): next-token cross-entropy on demonstrations.

The loss of a step is the mean negative log-probability over all trained tokens of its rows; every token has the same
weight, whatever its row or micro-batch. With `train_on = "assistant"` the loss covers the assistant's tokens only, in
every turn, including stop tokens and tool calls; prompts, tool results and template text are context. Rows are packed
without padding, and rows do not attend to each other. Several sources are mixed by weight on an exact schedule
(data/mixing.py).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.config import SFTRecipe
from posttrain.data import batching
from posttrain.data.conversation_rows import training_rows
from posttrain.data.conversations import load_conversations
from posttrain.data.epochs import Epochs
from posttrain.data.mixing import Mixture
from posttrain.models import lora
from posttrain.models.load import Policy
from posttrain.store.run import EpisodeRow
from posttrain.train.forward import Forward, token_stats
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import Learner
from posttrain.types import Batch, DataError, Sample, Stat, stat_values

Rows = Mapping[str, Sequence[Sample]]
"""Rows by source name."""


def prepare(setup: Setup[SFTRecipe]) -> Job:
    """Tokenizes conversations or texts, source by source, and holds out a share of them."""
    recipe, policy = setup.recipe, setup.policy
    sets = load_conversations(recipe.data, recipe.run.seed)
    notes = list(sets.notes)
    train = {s.name: training_rows(s, setup.chat, recipe.algo, notes) for s in sets.sources}
    test = {s.name: training_rows(s, setup.chat, recipe.algo, notes, "held-out ") for s in sets.held_out}
    for name, rows in train.items():
        if not rows:
            raise DataError(f"{name}: no row fits algo.max_tokens={recipe.algo.max_tokens}. Raise it.")
    weights = [source.weight for source in sets.sources]
    mixture = Mixture([*map(len, train.values())], weights, recipe.run.seed, recipe.data.shuffle)
    if len(train) > 1 and not recipe.train.steps:
        rows, drawn = one_pass(mixture), mixture.drawn(one_pass(mixture))
        parts = [f"{n} of {len(train[name])} from {name}" for name, n in zip(train, drawn, strict=True)]
        notes.append(f"One pass is {rows} rows, until the first source is used up: {', '.join(parts)}.")
    return Job(policy, sets.hash, notes, lambda loop: run(recipe, policy, mixture, train, test, loop))


def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
    """Negative log-likelihood of the trained tokens, weighted over the optimizer batch; logp, entropy (B, T)."""
    mask = b.mask
    stats = {
        "nll": Stat(-logp[mask].sum().item(), int(mask.sum())),
        "entropy": Stat(entropy[mask].sum().item(), int(mask.sum())),
    }
    return -(b.weights * torch.where(mask, logp, 0)).sum(), stats


def one_pass(mixture: Mixture) -> int:
    """Number of draws before any row repeats: all rows of a single source, or until the first of several sources is
    used up."""

    def repeats(draws: int) -> bool:
        return any(n > size for n, size in zip(mixture.drawn(draws), mixture.sizes, strict=True))

    return bisect_right(range(sum(mixture.sizes) + 1), False, key=repeats) - 1


@contextmanager
def noisy_embeddings(policy: Policy, batch: Batch, keys: Sequence[int], alpha: float) -> Iterator[None]:
    """Adds NEFTune noise to the input embeddings within the block (Jain et al., "NEFTune: Noisy Embeddings Improve
    Instruction Finetuning", arXiv 2310.05914, algorithm 1): uniform in (−1, 1), times alpha / sqrt(L·d).

    L is the length of the row itself and d the width, so a row's noise does not depend on padding or on the other rows.
    `keys` has one seed per row of the batch. alpha = 0 adds no noise.
    """
    if not alpha:
        yield
        return

    rows = zip(keys, batch.real.sum(1).tolist(), strict=True)

    def add(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        while sum(len(part) for part in parts) < embedded.shape[1]:  # a call has all rows, or one (models/policy.py)
            key, length = next(rows)
            draws = torch.rand(length, embedded.shape[-1], generator=torch.Generator().manual_seed(key))
            parts.append((2 * draws - 1) * (alpha / math.sqrt(draws.numel())))
        return embedded + torch.cat(parts).unsqueeze(0).to(embedded)

    hook = lora.unwrap(policy.model).get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def noisy_forward(alpha: float) -> Forward:
    """The learner's forward pass with NEFTune noise on the input embeddings; alpha = 0 adds none.

    `rows` of its batches are the seeds of the rows' noise (`seeded`).
    """

    def forward(policy: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, ...]:
        with noisy_embeddings(policy, batch, batch.rows, alpha):
            return token_stats(policy, batch, temperature)

    return forward if alpha else token_stats


def seeded(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with the seeds of its rows' noise in a step as its `rows`."""
    return replace(batch, rows=tuple(rng.key("neftune", seed, step, row) for row in batch.rows))


def run(recipe: SFTRecipe, policy: Policy, mixture: Mixture, train: Rows, test: Rows, loop: Loop) -> Summary | None:
    """Trains for `train.steps` steps (0: `train.epochs` passes over the rows).

    Row n of the run is draw n of the mixture, so the step is the only data cursor a resumed run needs.
    """
    cfg, seed = recipe.algo, recipe.run.seed
    sources = list(train.values())
    epochs = Epochs(one_pass(mixture), cfg.batch_rows, recipe.train, seed, recipe.data.shuffle)
    learner = loop.learner(policy, recipe.train, epochs.steps, forward=noisy_forward(cfg.neftune_alpha))
    loop.restore(learner)

    def evaluate(step: int) -> tuple[Metrics, list[EpisodeRow]]:
        return held_out_loss(learner, test), []

    for step in loop.steps(epochs.steps, evaluate, recipe.eval.every):
        start, size = epochs.span(step)
        rows = [sources[source][row] for source, row in mixture.draw(start, size)]
        rng.seed_global(seed, "update", step)  # whatever the model draws
        share = not cfg.neftune_alpha  # noise differs per row, so rows have no prefix to share
        batches = batching.micro(rows, recipe.train.micro_batch_tokens, "token-mean", device=policy.device, share=share)
        batches = batches if share else [seeded(batch, seed, step) for batch in batches]
        values = stat_values([*learner.forward_backward(batches, loss), learner.step()])
        if len(train) > 1:
            counts = mixture.drawn(start + size)
            values |= {f"rows/{name}": float(count) for name, count in zip(train, counts, strict=True)}
        loop.end(learner, values, tokens=sum(len(r.tokens) for r in rows))
    return loop.summary(learner)


def held_out_loss(learner: Learner, rows: Rows) -> dict[str, float]:
    """Mean negative log-probability per token on held-out rows, overall and, with several sources, per source; empty
    without held-out rows."""
    totals: dict[str, tuple[float, int]] = {}
    for name, part in rows.items():
        if part:
            logp = [row[s.loss_mask] for row, s in zip(learner.logprobs(part), part, strict=True)]
            totals[name] = -sum(float(row.sum(dtype=np.float64)) for row in logp), sum(len(row) for row in logp)
    if not totals:
        return {}
    values = {"eval/nll": sum(t for t, _ in totals.values()) / sum(n for _, n in totals.values())}
    if len(rows) > 1:
        values |= {f"eval/nll/{name}": total / count for name, (total, count) in totals.items()}
    return values
