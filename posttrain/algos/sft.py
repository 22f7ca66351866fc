"""Supervised fine-tuning: make the demonstrated tokens likelier. The whole algorithm in one file.

The loss of a step is the mean negative log-probability over all trained tokens of its rows (every token counts the
same, whatever row or pass it is in). With `train_on = "assistant"` only what the assistant wrote is trained, its stop
token included; prompts and template text are context. Rows run packed, so no padding is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.config import SFTConfig, SFTRecipe
from posttrain.data import batching
from posttrain.data.chat import ChatFormat
from posttrain.envs.prepare import Conversation, load_conversations
from posttrain.models.load import Policy
from posttrain.prepare import Job, OnStep, Setup
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import Run
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner
from posttrain.types import Batch, DataError, Sample, Stat, TemplateError, add_stats


def prepare(setup: Setup) -> Job:
    """The job of a recipe: conversations or texts as token rows, a share of them held out."""
    recipe, policy = setup.recipe, setup.policy
    sets = load_conversations(recipe.data, recipe.run.seed)
    train, notes = training_rows(sets.train, setup.chat, recipe.algo)
    test, _ = training_rows(sets.test, setup.chat, recipe.algo)
    return Job(policy, sets.hash, sets.notes + notes, lambda *rest: run(recipe, policy, train, test, *rest))


def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
    """−log π of the trained tokens, weighted over the optimizer batch; logp, entropy (B, T)."""
    mask = b.mask
    stats = {
        "nll": Stat(-logp[mask].sum().item(), int(mask.sum())),
        "entropy": Stat(entropy[mask].sum().item(), int(mask.sum())),
    }
    return -(b.weights * torch.where(mask, logp, 0)).sum(), stats


def training_rows(
    rows: Sequence[tuple[str, Conversation]], chat: ChatFormat, cfg: SFTConfig
) -> tuple[list[Sample], list[str]]:
    """Tokens and loss masks of rows (where, text or messages), and notes on what was cut at `max_tokens`.

    A row in which nothing would be trained is refused with a DataError that names it: its loss would be reported as 0.
    """
    samples: list[Sample] = []
    cut_rows = cut_tokens = 0
    for where, row in rows:
        try:
            tokens, mask = chat.text_tokens(row) if isinstance(row, str) else chat.conversation_tokens(row)
        except (DataError, TemplateError) as error:
            raise type(error)(f"{where}: {error}") from None
        if cfg.train_on == "all":
            mask = np.arange(len(tokens)) > 0
        cut_rows += len(tokens) > cfg.max_tokens
        cut_tokens += max(0, len(tokens) - cfg.max_tokens)
        if not mask[1 : cfg.max_tokens].any():
            why = f"none of its trained tokens is among the first {cfg.max_tokens}; raise algo.max_tokens"
            raise DataError(f"{where}: {why if mask[1:].any() else 'no token of this row would be trained'}.")
        tokens, mask = tokens[: cfg.max_tokens], mask[: cfg.max_tokens]
        blank = np.zeros(len(tokens), np.float32)
        samples.append(Sample(tokens, mask, blank, blank + 1))
    cut = f"{cut_rows} rows were cut at algo.max_tokens={cfg.max_tokens}, losing {cut_tokens} tokens in all."
    return samples, [cut] if cut_rows else []


def run(
    recipe: SFTRecipe,
    policy: Policy,
    train_rows: Sequence[Sample],
    test_rows: Sequence[Sample],
    store: Run,
    on_step: OnStep,
    interrupt: Interrupt,
) -> dict[str, Any] | None:
    """Trains for `train.steps` steps (0: one pass over the rows), from the newest checkpoint if there is one.

    Returns the summary, or None when `interrupt` asked it to stop (then it is saved and resumable).
    """
    rows_per_step = recipe.algo.batch_rows
    steps = recipe.train.steps or math.ceil(len(train_rows) / rows_per_step)
    learner = Learner(policy, recipe.train, steps)
    step = 0
    if saved := checkpoint.latest(store.folder):
        tensors, state = checkpoint.load(saved)
        learner.load(tensors, state["learner"])
        step = state["step"]
    if step == 0:
        values = held_out_loss(learner, test_rows)
        store.write(0, values, {})
        on_step(0, values)
    while step < steps and not interrupt.requested:
        failpoint("step:start")
        start = time.monotonic()
        order = rng.draw_order(len(train_rows), step * rows_per_step, rows_per_step, recipe.run.seed)
        if not recipe.train.steps:  # one pass: the last step takes what is left
            order = order[: len(train_rows) - step * rows_per_step]
        rows = [train_rows[i] for i in order]
        rng.seed_global(recipe.run.seed, "update", step)
        batches = batching.micro(rows, recipe.train.tokens_per_pass, "token-mean", device=policy.device)
        stats = [learner.forward_backward(batch, loss) for batch in batches]
        stats.append(learner.step())
        step += 1
        failpoint("step:updated")
        values = {name: stat.value for name, stat in add_stats(stats).items()}
        tokens, seconds = sum(len(r.tokens) for r in rows), time.monotonic() - start
        timings = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if step == steps:
            values |= held_out_loss(learner, test_rows)
        failpoint("step:before-store")
        store.write(step, values, timings)
        failpoint("step:after-store")
        on_step(step, values | timings)
        if step % recipe.run.checkpoint_every == 0 or step == steps or interrupt.requested:
            failpoint("step:before-checkpoint")
            tensors, state = learner.state()
            checkpoint.save(store.folder, step, tensors, {"step": step, "learner": state}, recipe.run.keep)
            failpoint("step:after-checkpoint")
    if step < steps:
        return None
    before, after = ({name: v for at, name, v in store.metrics() if at == which} for which in (0, step))
    return {"steps": step, "before": before, "after": after, "weights": checkpoint.weights_digest(learner.weights())}


def held_out_loss(learner: Learner, rows: Sequence[Sample]) -> dict[str, float]:
    """Mean negative log-probability per trained token of rows that are not trained on; empty without such rows."""
    if not rows:
        return {}
    per_row = learner.sample_logprobs(rows)
    total = -sum(float(row[sample.loss_mask].sum(dtype=np.float64)) for row, sample in zip(per_row, rows, strict=True))
    return {"eval/nll": total / sum(int(sample.loss_mask.sum()) for sample in rows)}
