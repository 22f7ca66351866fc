"""Process and outcome reward models (PRM, ORM): classify each step of a solution, or the whole solution, as correct.

A linear head reads the hidden state at the last token of each step (PRM, arXiv 2305.20050 and 2312.08935) or at the
token that ends the solution (ORM, arXiv 2110.14168); the sigmoid of its logit is the probability of being correct. The
loss is the cross-entropy with the label, which may be soft; every labelled step has the same weight. With `lm_coef`, a
language modelling loss is added, as Cobbe et al. do (arXiv 2110.14168, section 4.2).

Choices made here, where implementations differ: the head has one output, where Math-Shepherd's code trains two tokens
of the vocabulary; a step is read at the last token of its text, not at a special token after it, so scoring never
changes the text; an ORM is read at the end of the solution, not at every token.
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
from posttrain.data.epochs import Epochs
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
from posttrain.train.forward import per_token, step_scores, step_scores_and_likelihood
from posttrain.train.job import Job, Loop, Metrics, Setup, Summary
from posttrain.train.learner import Learner, Loss
from posttrain.types import Batch, DataError, Message, Sample, Stat, stat_values

BINS = 10  # over predicted probabilities
RESAMPLES = 1000  # bootstrap resamples over solutions


def prepare(setup: Setup[PRMRecipe]) -> Job:
    """Tokenizes labelled solutions, holds out a share of them and attaches a scalar head to the model."""
    recipe, policy, cfg = setup.recipe, setup.policy, setup.recipe.algo
    sets = load_solutions(setup)
    train, notes = labelled_rows(sets.train, setup.chat, cfg)
    test, _ = labelled_rows(sets.test, setup.chat, cfg, whole=True)
    about = {"kind": cfg.level, "format": recipe.data.format, "separator": cfg.separator, "aggregate": cfg.aggregate}
    about |= setup.chat.about()
    as_critic(attach_scalar(policy, 1, recipe.run.seed, about=about))
    rows = [row for _, row in train]
    return Job(policy, sets.hash, sets.notes + notes, lambda loop: run(recipe, policy, rows, test, loop))


def labelled_rows(
    solutions: Sequence[Graded], chat: ChatFormat, cfg: PRMConfig, whole: bool = False
) -> tuple[list[tuple[Graded, Sample]], list[str]]:
    """Solutions with their token rows, whose loss masks mark the tokens to classify; also notes on dropped solutions.

    With `whole`, steps after the first mistake are included as well, as they are when a completion is scored.
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
    """Binary cross-entropy at the masked tokens, weighted over the optimizer batch; logits (B, T)."""
    assert b.returns is not None
    mask = b.mask
    per_token = binary(torch.where(mask, logits, 0), b.returns)
    hit = (logits >= 0) == (b.returns >= 0.5)
    return (b.weights * per_token).sum(), {"step_accuracy": Stat(float((hit & mask).sum()), int(mask.sum()))}


def joint_loss(coef: float) -> Loss:
    """`loss` plus `coef` times the negative log-likelihood per token; a row counts as often as it has steps."""

    def joint(logits: torch.Tensor, logp: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
        value, stats = loss(logits, b)
        likelihood = (b.weights * logp).sum()
        return value - coef * likelihood, stats | {"lm_loss": Stat.over(-logp.detach())}

    return joint


def run(
    recipe: PRMRecipe, policy: Policy, train: Sequence[Sample], test: Sequence[tuple[Graded, Sample]], loop: Loop
) -> Summary | None:
    """Trains for `train.steps` steps (0: `train.epochs` passes over the solutions).

    The summary includes the calibration table.
    """
    cfg, seed, micro_batch_tokens = recipe.algo, recipe.run.seed, recipe.train.micro_batch_tokens
    epochs = Epochs(len(train), cfg.batch_rows, recipe.train, seed, recipe.data.shuffle)
    forward, objective = (step_scores_and_likelihood, joint_loss(cfg.lm_coef)) if cfg.lm_coef else (step_scores, loss)
    learner = loop.learner(policy, recipe.train, epochs.steps, forward=forward)
    loop.restore(learner)

    def evaluate(step: int) -> tuple[Metrics, list[EpisodeRow]]:
        return held_out(learner, test, cfg)[0], []

    for step in loop.steps(epochs.steps, evaluate, recipe.eval.every):
        rows = [train[i] for i in epochs.rows(step)]
        rng.seed_global(seed, "update", step)  # whatever the model draws
        batches = batching.micro(rows, micro_batch_tokens, "token-mean", device=policy.device)
        values = stat_values([*learner.forward_backward(batches, objective), learner.step()])
        loop.end(learner, values, tokens=sum(len(row.tokens) for row in rows))
    summary = loop.summary(learner)
    return summary and summary | {"calibration": held_out(learner, test, cfg)[1]}


def held_out(
    learner: Learner, solutions: Sequence[tuple[Graded, Sample]], cfg: PRMConfig
) -> tuple[dict[str, float], list[Bin]]:
    """Metrics `eval/…` on held-out solutions, and the calibration table; both empty without held-out solutions.

    A label or prediction of 0.5 or more counts as correct. AUCs of first steps, and of those that are neither first nor
    last, tell how well unfinished solutions are judged. Intervals resample whole solutions. The outcome is predicted
    from all steps of a solution, combined by `cfg.aggregate`.
    """
    if not solutions:
        return {}, []
    rows = [row for _, row in solutions]
    scores = per_token(rows, lambda part: learner.outputs(part, step_scores))
    logits = [score[row.loss_mask].astype(np.float64) for score, row in zip(scores, rows, strict=True)]
    known = [part[: one.known] for part, (one, _) in zip(logits, solutions, strict=True)]
    labels = [np.array(one.solution.labels[: one.known]) for one, _ in solutions]
    flat, targets = np.concatenate(known), np.concatenate(labels)
    predicted = 1 / (1 + np.exp(-flat))
    owner = np.repeat(np.arange(len(rows)), [len(part) for part in known])
    hit = ((predicted >= 0.5) == (targets >= 0.5)).astype(float)
    error, table = calibration(predicted, targets, BINS)
    cross = binary(torch.from_numpy(flat), torch.from_numpy(targets))
    outcomes = np.array([one.right for one, _ in solutions])
    joined = np.array([joined_steps(torch.from_numpy(part), cfg.aggregate) for part in logits])
    values = {
        "eval/step_loss": float(cross.mean()),
        "eval/step_right": float((targets >= 0.5).mean()),
        "eval/ece": error,
        **_spread("step_accuracy", resampled(owner, lambda i: float(hit[i].mean()))),
        **_spread("outcome_auc", resampled(np.arange(len(rows)), lambda i: auc(joined[i], outcomes[i]))),
    }
    if cfg.level == "step":
        values |= _spread("step_auc", resampled(owner, lambda i: auc(predicted[i], targets[i] >= 0.5)))
        spots = np.concatenate([_spots(len(part), len(whole)) for part, whole in zip(known, logits, strict=True)])
        for spot in ("first", "middle"):
            found = _auc_at(spots == spot, owner, predicted, targets >= 0.5)
            values |= {} if math.isnan(found.value) else _spread(f"{spot}_step_auc", found)
        first = [_first_wrong(p, 0.0) == _first_wrong(w, 0.5) for p, w in zip(known, labels, strict=True)]
        values |= _spread("first_mistake", wilson(sum(first), len(first)))
    return values, table


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve (Mann–Whitney, ties count half); NaN if one class is missing."""
    ordered, rank = np.unique(scores, return_inverse=True)
    ones, zeros = (np.bincount(rank[kind], minlength=len(ordered)) for kind in (positive, ~positive))
    if not ones.sum() or not zeros.sum():
        return math.nan
    below = np.cumsum(zeros) - zeros
    return float((ones * (below + zeros / 2)).sum() / (ones.sum() * zeros.sum()))


def resampled(owner: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """A statistic with its percentile bootstrap interval, resampled by owner (cluster bootstrap).

    owner (N,) holds ascending numbers from 0; `statistic` gets the indices of the rows to use.
    """
    count = int(owner[-1]) + 1
    edges = np.searchsorted(owner, np.arange(count + 1))
    picks = (rng.uniforms(rng.key("bootstrap", 0), RESAMPLES * count) * count).astype(int).reshape(RESAMPLES, count)
    members = [np.arange(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    values = [statistic(np.concatenate([members[i] for i in pick])) for pick in picks]
    known = [value for value in values if not math.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (math.nan, math.nan)
    return Estimate(statistic(np.arange(len(owner))), float(low), float(high), count)


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    return {f"eval/{name}": estimate.value, f"eval/{name}_low": estimate.low, f"eval/{name}_high": estimate.high}


def _spots(known: int, steps: int) -> np.ndarray:
    """`first`, `middle` or `last` for each of the first `known` steps of a solution."""
    return np.array(["first", *["middle"] * (steps - 2), *["last"] * (steps > 1)][:known])


def _auc_at(chosen: np.ndarray, owner: np.ndarray, scores: np.ndarray, right: np.ndarray) -> Estimate:
    """AUC of the chosen steps only, resampled by the solutions that have one."""
    if not chosen.any():
        return Estimate(math.nan, math.nan, math.nan, 0)
    members, scores, right = np.unique(owner[chosen], return_inverse=True)[1], scores[chosen], right[chosen]
    return resampled(members, lambda i: auc(scores[i], right[i]))


def _first_wrong(values: np.ndarray, limit: float) -> int:
    """Index of the first step below `limit`, or −1."""
    wrong = np.flatnonzero(values < limit)
    return int(wrong[0]) if len(wrong) else -1


def _whole(chat: ChatFormat, prompt: Sequence[Message], text: str, label: float) -> Sample:
    """A conversation classified at its end-of-turn token."""
    row = step_row(chat, prompt, text, [])
    last = np.arange(len(row.tokens)) == len(row.tokens) - 1
    return Sample(row.tokens, last, row.behaviour_logp, row.advantages, returns=np.where(last, np.float32(label), 0))
