"""Supervised fine-tuning: make the demonstrated tokens likelier. The whole algorithm in one file.

The loss of a step is the mean negative log-probability over all trained tokens of its rows (every token counts the
same, whatever row or pass it is in). With `train_on = "assistant"` only what the assistant wrote is trained, in every
turn, its stop token and its calls of tools included; prompts, tool results and template text are context. Rows run
packed, so no padding is computed, and none sees another. Several sources are drawn by their weights on an exact
schedule (data/mixing.py).
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from posttrain import rng
from posttrain.config import SFTConfig, SFTRecipe
from posttrain.data import batching
from posttrain.data.chat import ChatFormat
from posttrain.data.conversations import Conversation, Source, load_conversations
from posttrain.data.mixing import Mixture
from posttrain.models import lora
from posttrain.models.load import Policy
from posttrain.rollout.build import Job, OnStep, Setup
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.store.run import Run
from posttrain.train.interrupt import Interrupt
from posttrain.train.learner import Learner
from posttrain.types import Batch, DataError, Message, Sample, Stat, TemplateError, add_stats

Rows = Mapping[str, Sequence[Sample]]
"""Source → its rows."""


def prepare(setup: Setup) -> Job:
    """The job of a recipe: conversations or texts as token rows, source by source, a share of them held out."""
    recipe, policy = setup.recipe, setup.policy
    sets = load_conversations(recipe.data, recipe.run.seed)
    notes = list(sets.notes)
    train = {s.name: training_rows(s, setup.chat, recipe.algo, notes) for s in sets.sources}
    test = {s.name: training_rows(s, setup.chat, recipe.algo, notes, "held-out ") for s in sets.held_out}
    for name, rows in train.items():
        if not rows:
            raise DataError(f"{name}: no row fits algo.max_tokens={recipe.algo.max_tokens}. Raise it.")
    mixture = Mixture([len(rows) for rows in train.values()], [s.weight for s in sets.sources], recipe.run.seed)
    if len(train) > 1 and not recipe.train.steps:
        rows, drawn = one_pass(mixture), mixture.drawn(one_pass(mixture))
        parts = [f"{n} of {len(train[name])} from {name}" for name, n in zip(train, drawn, strict=True)]
        notes.append(f"One pass is {rows} rows, until the first source is used up: {', '.join(parts)}.")
    return Job(policy, sets.hash, notes, lambda *rest: run(recipe, policy, mixture, train, test, *rest))


def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
    """−log π of the trained tokens, weighted over the optimizer batch; logp, entropy (B, T)."""
    mask = b.mask
    stats = {
        "nll": Stat(-logp[mask].sum().item(), int(mask.sum())),
        "entropy": Stat(entropy[mask].sum().item(), int(mask.sum())),
    }
    return -(b.weights * torch.where(mask, logp, 0)).sum(), stats


def training_rows(source: Source, chat: ChatFormat, cfg: SFTConfig, notes: list[str], kind: str = "") -> list[Sample]:
    """A source's rows as tokens and loss masks; what was cut or dropped at `max_tokens` is added to `notes`.

    A row in which nothing would be trained is refused with a DataError that names it: its loss would be reported as 0.
    So no batch can have all its labels masked.
    """
    samples: list[Sample] = []
    lengths: list[int] = []
    for where, row in source.rows:
        try:
            tokens, mask = trained_tokens(row, chat, cfg.train_on)
        except (DataError, TemplateError) as error:
            raise type(error)(f"{where}: {error}") from None
        lengths.append(len(tokens))
        if len(tokens) > cfg.max_tokens and cfg.overlong == "drop":
            continue
        if not mask[1 : cfg.max_tokens].any():
            late = f"none of its trained tokens is among the first {cfg.max_tokens}; raise algo.max_tokens, or set "
            why = late + 'algo.overlong = "drop"' if mask[1:].any() else "no token of this row would be trained"
            raise DataError(f"{where}: {why}.")
        tokens, mask = tokens[: cfg.max_tokens], mask[: cfg.max_tokens]
        blank = np.zeros(len(tokens), np.float32)
        samples.append(Sample(tokens, mask, blank, blank + 1))
    if over := sum(length > cfg.max_tokens for length in lengths):
        lost, done = sum(lengths) - sum(len(s.tokens) for s in samples), "cut" if cfg.overlong == "cut" else "dropped"
        notes.append(
            f"{source.name}: {over} of {len(lengths)} {kind}rows were over algo.max_tokens={cfg.max_tokens} "
            f"and {done}, losing {lost} of {sum(lengths)} tokens."
        )
    return samples


def trained_tokens(row: Conversation, chat: ChatFormat, train_on: str) -> tuple[np.ndarray, np.ndarray]:
    """A row's ids [L] int32 and a mask [L] of the tokens that `train_on` trains, never the first.

    `assistant` is every assistant turn, `completion` the last of them, `all` everything; of a text, all three are all
    of it.
    """
    if isinstance(row, str):
        return chat.text_tokens(row)
    tokens, mask = chat.conversation_tokens(row)
    require_tools_shown(row, tokens, chat)
    if train_on == "all":
        return tokens, np.arange(len(tokens)) > 0
    turns = [i for i, message in enumerate(row) if message.role == "assistant"]
    if train_on == "completion" and len(turns) > 1:
        # The conversation up to the turn before the last one begins with the same tokens.
        _, earlier = chat.conversation_tokens(row[: turns[-2] + 1])
        mask[np.flatnonzero(earlier)] = False
    return tokens, mask


def require_tools_shown(row: tuple[Message, ...], tokens: np.ndarray, chat: ChatFormat) -> None:
    """Raises TemplateError where the chat template leaves out which tools were called, or what they returned."""
    uncalled = tuple(replace(m, tool_calls=()) for m in row)
    answered = tuple(replace(m, content=m.content + ".") if m.role == "tool" else m for m in row)
    for other, what in ((uncalled, "the assistant's tool_calls"), (answered, "what a tool returned")):
        if other == row:
            continue
        try:
            same = np.array_equal(chat.conversation_tokens(other)[0], tokens)
        except TemplateError:
            continue  # it noticed the difference
        if same:
            raise TemplateError(
                f"the chat template has no place for tools: it leaves out {what}, so the model would learn to answer "
                "without. Use a tokenizer whose template writes tool turns, or write them as text."
            )


def one_pass(mixture: Mixture) -> int:
    """How many draws there are before any row comes a second time: one source is drawn whole, of several the first to
    be used up."""

    def repeats(draws: int) -> bool:
        return any(n > size for n, size in zip(mixture.drawn(draws), mixture.sizes, strict=True))

    return bisect_right(range(sum(mixture.sizes) + 1), False, key=repeats) - 1


@contextmanager
def noisy_embeddings(policy: Policy, batch: Batch, keys: Sequence[int], alpha: float) -> Iterator[None]:
    """Within the block the input embeddings carry NEFTune's noise (Jain et al., "NEFTune: Noisy Embeddings Improve
    Instruction Finetuning", arXiv 2310.05914, algorithm 1): uniform in (−1, 1), times alpha / sqrt(L·d).

    L is a row's own length and d the width, so that neither padding nor the rows beside it change a row's noise; `keys`
    has a seed for each row of the batch. With alpha = 0 nothing is touched.
    """
    if not alpha:
        yield
        return

    def add(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for key, length in zip(keys, batch.real.sum(1).tolist(), strict=True):
            draws = torch.rand(length, embedded.shape[-1], generator=torch.Generator().manual_seed(key))
            parts.append((2 * draws - 1) * (alpha / math.sqrt(draws.numel())))
        return embedded + torch.cat(parts).unsqueeze(0).to(embedded)

    hook = lora.unwrap(policy.model).get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def run(
    recipe: SFTRecipe,
    policy: Policy,
    mixture: Mixture,
    train: Rows,
    test: Rows,
    store: Run,
    on_step: OnStep,
    interrupt: Interrupt,
) -> dict[str, Any] | None:
    """Trains for `train.steps` steps (0: one pass over the rows), from the newest checkpoint if there is one.

    Row n of the run is draw n of the mixture, so a resumed run needs no other cursor than its step. Returns the
    summary, or None when `interrupt` asked it to stop (then it is saved and resumable).
    """
    cfg, seed = recipe.algo, recipe.run.seed
    sources = list(train.values())
    steps = recipe.train.steps or math.ceil(one_pass(mixture) / cfg.batch_rows)
    last_row = steps * cfg.batch_rows if recipe.train.steps else one_pass(mixture)
    learner = Learner(policy, recipe.train, steps)
    step = 0
    if saved := checkpoint.latest(store.folder):
        tensors, state = checkpoint.load(saved)
        learner.load(tensors, state["learner"])
        step = state["step"]
    if step == 0:
        values = held_out_loss(learner, test)
        store.write(0, values, {})
        on_step(0, values)
    while step < steps and not interrupt.requested:
        failpoint("step:start")
        start = time.monotonic()
        begun = step * cfg.batch_rows
        drawn = mixture.draw(begun, min(cfg.batch_rows, last_row - begun))  # a pass's last step takes what is left
        rows = [sources[source][row] for source, row in drawn]
        rng.seed_global(seed, "update", step)
        share = not cfg.neftune_alpha  # noise is drawn for each row, so then no two rows begin alike
        room = recipe.train.tokens_per_pass
        batches = batching.micro(rows, room, "token-mean", device=policy.device, share=share)
        stats: list[dict[str, Stat]] = []
        for batch in batches:
            keys = [rng.key("neftune", seed, step, row) for row in batch.rows]
            with noisy_embeddings(policy, batch, keys, cfg.neftune_alpha):
                stats.append(learner.forward_backward(batch, loss))
        stats.append(learner.step())
        step += 1
        failpoint("step:updated")
        values = {name: stat.value for name, stat in add_stats(stats).items()}
        if len(train) > 1:
            counts = mixture.drawn(begun + len(rows))
            values |= {f"rows/{name}": float(count) for name, count in zip(train, counts, strict=True)}
        tokens, seconds = sum(len(r.tokens) for r in rows), time.monotonic() - start
        timings = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if step == steps:
            values |= held_out_loss(learner, test)
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
    before, after = store.at(0), store.at(step)
    return {"steps": step, "before": before, "after": after, "weights": checkpoint.weights_digest(learner.weights())}


def held_out_loss(learner: Learner, rows: Rows) -> dict[str, float]:
    """Mean negative log-probability per trained token of rows that are not trained on, in all and of each of several
    sources; empty without such rows."""
    totals: dict[str, tuple[float, int]] = {}
    for name, mine in rows.items():
        if mine:
            logp = [row[s.loss_mask] for row, s in zip(learner.sample_logprobs(mine), mine, strict=True)]
            totals[name] = -sum(float(row.sum(dtype=np.float64)) for row in logp), sum(len(row) for row in logp)
    if not totals:
        return {}
    values = {"eval/nll": sum(t for t, _ in totals.values()) / sum(n for _, n in totals.values())}
    if len(rows) > 1:
        values |= {f"eval/nll/{name}": total / count for name, (total, count) in totals.items()}
    return values
