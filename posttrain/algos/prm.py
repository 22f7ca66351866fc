"""Process and outcome verifiers: which steps of an answer are right, or whether it is. The whole algorithm in one file.

A linear head reads the model's hidden state at the last token of each step (PRM, arXiv 2305.20050 and 2312.08935) or
at the token that ends the answer (ORM, arXiv 2110.14168), and σ of what it gives is the probability of being right.
The loss is the cross-entropy with the label, which may be soft; every labelled step counts the same.

What this file decides, and where implementations differ: the head has one output, where Math-Shepherd's code trains
two tokens of the vocabulary; nothing but the head's loss is trained, where Cobbe et al. add a language modelling loss;
a step is read at the last token of its own words, not at a special token after it, so the text of an answer is never
changed to score it; an ORM is read at the end of the answer, not at every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from posttrain import rng
from posttrain.config.prm import PRMConfig, PRMRecipe
from posttrain.data import batching
from posttrain.data.chat import ChatFormat
from posttrain.data.solutions import Graded
from posttrain.data.steps import step_ends, step_row
from posttrain.evaluation.accuracy import Estimate, wilson
from posttrain.evaluation.calibration import Bin, calibration
from posttrain.models.heads import as_critic, attach_scalar
from posttrain.models.load import Policy
from posttrain.objectives.reward import binary
from posttrain.rewards.models import joined_steps
from posttrain.rollout.sample_solutions import load_solutions
from posttrain.store.run import EpisodeRow
from posttrain.train.forward import sample_step_scores, step_scores
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import make_learner
from posttrain.types import Batch, DataError, Message, Sample, Stat, stat_values

BINS = 10  # of predicted probability
RESAMPLES = 1000  # of the bootstrap over solutions


def prepare(setup: Setup[PRMRecipe]) -> Job:
    """Labelled solutions as token rows, a share of them held out, and a scalar head on the model."""
    recipe, policy, cfg = setup.recipe, setup.policy, setup.recipe.algo
    sets = load_solutions(setup)
    train, notes = labelled_rows(sets.train, setup.chat, cfg)
    test, _ = labelled_rows(sets.test, setup.chat, cfg, whole=True)
    about = {"kind": cfg.level, "format": recipe.data.format, "separator": cfg.separator, "aggregate": cfg.aggregate}
    as_critic(attach_scalar(policy, 1, recipe.run.seed, about=about))
    rows = [row for _, row in train]
    return Job(policy, sets.hash, sets.notes + notes, lambda loop: run(recipe, policy, rows, test, loop))


def labelled_rows(
    solutions: Sequence[Graded], chat: ChatFormat, cfg: PRMConfig, whole: bool = False
) -> tuple[list[tuple[Graded, Sample]], list[str]]:
    """Solutions with their token rows, whose loss masks are the tokens to be judged; and notes on what was left out.

    With `whole` the steps after a first mistake are judged, too, as they are when an answer is scored.
    """
    kept: list[tuple[Graded, Sample]] = []
    for one in solutions:
        solution = one.solution
        text, count = cfg.separator.join(solution.steps), len(solution.steps) if whole else one.known
        if cfg.level == "step":
            ends = step_ends(solution.steps, cfg.separator)[:count]
            row = step_row(chat, solution.prompt, text, ends, solution.labels[:count])
        else:
            row = _whole(chat, solution.prompt, text, solution.labels[0])
        if len(row.tokens) <= cfg.max_tokens:
            kept.append((one, row))
    if solutions and not kept:
        raise DataError(f"none of {len(solutions)} solutions fits algo.max_tokens={cfg.max_tokens}; raise it.")
    out = len(solutions) - len(kept)
    return kept, [f"{out} solutions longer than algo.max_tokens={cfg.max_tokens} were left out."] if out else []


def loss(logits: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
    """Cross-entropy of the judged tokens with their labels, weighted over the optimizer batch; logits (B, T)."""
    assert b.returns is not None
    mask = b.mask
    per_token = binary(torch.where(mask, logits, 0), b.returns)
    hit = (logits >= 0) == (b.returns >= 0.5)
    return (b.weights * per_token).sum(), {"step_accuracy": Stat(float((hit & mask).sum()), int(mask.sum()))}


def run(
    recipe: PRMRecipe, policy: Policy, train: Sequence[Sample], test: Sequence[tuple[Graded, Sample]], loop: Loop
) -> Summary | None:
    """Trains for `train.steps` steps (0: one pass over the solutions). The summary has the calibration table, too."""
    cfg, seed, room = recipe.algo, recipe.run.seed, recipe.train.micro_batch_tokens
    total = recipe.train.steps or math.ceil(len(train) / cfg.batch_rows)
    learner = make_learner(policy, recipe.train, total, forward=step_scores)
    loop.restore(learner)

    def evaluate(step: int) -> tuple[Metrics, list[EpisodeRow]]:
        return held_out(policy, test, cfg, room)[0], []

    for step in loop.steps(total, evaluate, recipe.eval.every):
        order = rng.draw_order(len(train), step * cfg.batch_rows, cfg.batch_rows, seed)
        if not recipe.train.steps:  # one pass: the last step takes what is left
            order = order[: len(train) - step * cfg.batch_rows]
        rows = [train[i] for i in order]
        rng.seed_global(seed, "update", step)  # dropout, if the model has any
        batches = batching.micro(rows, room, "token-mean", device=policy.device)
        values = stat_values([*learner.forward_backward(batches, loss), learner.step()])
        loop.end(learner, values, tokens=sum(len(row.tokens) for row in rows))
    found = loop.summary(learner)
    return found and found | {"calibration": held_out(policy, test, cfg, room)[1]}


def held_out(
    policy: Policy, solutions: Sequence[tuple[Graded, Sample]], cfg: PRMConfig, micro_batch_tokens: int
) -> tuple[dict[str, float], list[Bin]]:
    """Metrics `eval/…` of solutions that are not trained on, and the calibration table; both empty without them.

    A label of 0.5 or more counts as right, and so does a prediction. Solutions are the random unit of the intervals.
    The outcome is predicted from all steps of an answer, joined by `cfg.aggregate`.
    """
    if not solutions:
        return {}, []
    rows = [row for _, row in solutions]
    scores = sample_step_scores(policy, rows, micro_batch_tokens)
    logits = [at[row.loss_mask].astype(np.float64) for at, row in zip(scores, rows, strict=True)]
    known = [part[: one.known] for part, (one, _) in zip(logits, solutions, strict=True)]
    labels = [np.array(one.solution.labels[: one.known]) for one, _ in solutions]
    flat, wanted = np.concatenate(known), np.concatenate(labels)
    predicted = 1 / (1 + np.exp(-flat))
    owner = np.repeat(np.arange(len(rows)), [len(part) for part in known])
    hit = ((predicted >= 0.5) == (wanted >= 0.5)).astype(float)
    error, table = calibration(predicted, wanted, BINS)
    cross = binary(torch.from_numpy(flat), torch.from_numpy(wanted))
    outcomes = np.array([one.right for one, _ in solutions])
    joined = np.array([joined_steps(torch.from_numpy(part), cfg.aggregate) for part in logits])
    values = {
        "eval/step_loss": float(cross.mean()),
        "eval/step_right": float((wanted >= 0.5).mean()),
        "eval/ece": error,
        **_spread("step_accuracy", resampled(owner, lambda i: float(hit[i].mean()))),
        **_spread("outcome_auc", resampled(np.arange(len(rows)), lambda i: auc(joined[i], outcomes[i]))),
    }
    if cfg.level == "step":
        values |= _spread("step_auc", resampled(owner, lambda i: auc(predicted[i], wanted[i] >= 0.5)))
        first = [_first_wrong(p, 0.0) == _first_wrong(w, 0.5) for p, w in zip(known, labels, strict=True)]
        values |= _spread("first_mistake", wilson(sum(first), len(first)))
    return values, table


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties half (Mann–Whitney); NaN where one kind is missing."""
    ordered, rank = np.unique(scores, return_inverse=True)
    ones, zeros = (np.bincount(rank[kind], minlength=len(ordered)) for kind in (positive, ~positive))
    if not ones.sum() or not zeros.sum():
        return math.nan
    below = np.cumsum(zeros) - zeros
    return float((ones * (below + zeros / 2)).sum() / (ones.sum() * zeros.sum()))


def resampled(owner: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """A statistic of rows with its percentile bootstrap interval; rows of one owner are drawn together.

    owner (N,) are ascending numbers from 0; `statistic` gets the numbers of the rows to use.
    """
    count = int(owner[-1]) + 1
    edges = np.searchsorted(owner, np.arange(count + 1))
    picks = (rng.uniforms(rng.key("bootstrap", 0), RESAMPLES * count) * count).astype(int).reshape(RESAMPLES, count)
    members = [np.arange(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    values = [statistic(np.concatenate([members[i] for i in pick])) for pick in picks]
    known = [value for value in values if not math.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (math.nan, math.nan)
    return Estimate(statistic(np.arange(len(owner))), float(low), float(high), count)


def _spread(name: str, found: Estimate) -> dict[str, float]:
    return {f"eval/{name}": found.value, f"eval/{name}_low": found.low, f"eval/{name}_high": found.high}


def _first_wrong(values: np.ndarray, limit: float) -> int:
    """The number of the first step below `limit`, or −1."""
    wrong = np.flatnonzero(values < limit)
    return int(wrong[0]) if len(wrong) else -1


def _whole(chat: ChatFormat, prompt: Sequence[Message], text: str, label: float) -> Sample:
    """A conversation judged at its end-of-turn token."""
    row = step_row(chat, prompt, text, [])
    last = np.arange(len(row.tokens)) == len(row.tokens) - 1
    return Sample(row.tokens, last, row.behaviour_logp, row.advantages, returns=np.where(last, np.float32(label), 0))
