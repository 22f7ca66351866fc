"""Scores a queue's pairs with a reward model trained on its labels, and compares them with the annotators."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from posttrain.config import DataConfig
from posttrain.data.files import Row, read_rows
from posttrain.data.preferences import row_to_preference
from posttrain.data.sources import content_key, split_holdout, usable
from posttrain.evaluation.intervals import wilson
from posttrain.lab.label.agreement import Share, share
from posttrain.lab.label.store import Label, Pair, Queue, prompt_rows
from posttrain.store.run import Run
from posttrain.types import ConfigError, PosttrainError, RolloutError, Task

if TYPE_CHECKING:
    from posttrain.rewards.models import RewardModel

Scores = dict[str, tuple[float, float] | None]
"""Pair → scores of a and b; None if an answer is too long for the model."""
EVERYONE = "everyone"
_known: dict[tuple[Path, Path], Scores] = {}
_lock = threading.Lock()


class ModelAgreement(TypedDict):
    """How often a model agrees with an annotator, on prompts it was not trained on and on those it was."""

    name: str
    held_out: Share
    trained: Share


class ScoredPair(TypedDict):
    """A pair with the scores of a and b, the probability that a is preferred, and [annotator, label] of each label."""

    id: str
    prompt: str
    answers: list[str]
    scores: tuple[float, float] | None
    probability: float | None
    held_out: bool
    said: list[list[str]]


class Comparison(TypedDict):
    """A reward model's agreement with each annotator, and all pairs with their scores."""

    agreement: list[ModelAgreement]
    pairs: list[ScoredPair]


def compare(queue: Queue, run: Path, data: Path) -> Comparison:
    """`agreement` with each annotator, on held-out prompts and on training prompts, and the scored `pairs`.

    `run` is a finished reward model trained on the export `data`. It is loaded on first use and scores every pair of
    the queue. Raises ConfigError for a run without a model.
    """
    pairs, labels = queue.pairs(), queue.labels()
    cfg, seed = _asked(run)
    trained = trained_on(data, cfg, seed)
    known = {pair.id for pair in pairs if _key(pair, cfg) in trained}
    scores = score(queue, run, pairs)
    said: dict[str, list[list[str]]] = {}
    for label in labels:
        said.setdefault(label.pair, []).append([label.annotator, label.preferred])
    rows = [_judged(pair, scores[pair.id], pair.id in known, said.get(pair.id, [])) for pair in pairs]
    return {"agreement": agreement(labels, scores, known), "pairs": rows}


def agreement(labels: Sequence[Label], scores: Scores, known: set[str]) -> list[ModelAgreement]:
    """How often an annotator's preferred answer has the higher score, ties excluded.

    `known` are the pairs whose prompts the model was trained on; `held_out` counts the others. The intervals treat
    labels as independent, which several labels of one pair are not: rely on those of single annotators.
    """
    rows: list[ModelAgreement] = []
    for name in [*sorted({label.annotator for label in labels}), EVERYONE]:
        own = [x for x in labels if name in (x.annotator, EVERYONE) and x.preferred != "tie" and scores.get(x.pair)]
        held_out = _agreeing([x for x in own if x.pair not in known], scores)
        trained = _agreeing([x for x in own if x.pair in known], scores)
        rows.append({"name": name, "held_out": held_out, "trained": trained})
    return rows


def trained_on(data: Path, cfg: DataConfig, seed: int) -> set[str]:
    """Keys of the prompts in a file that a run with these settings trains on."""
    rows = read_rows(str(data), cfg.count)
    parsed = usable(rows, lambda row: row_to_preference(row, cfg.system, cfg.instruction), cfg, [])
    train = parsed if cfg.eval_tasks else split_holdout(parsed, cfg.holdout, seed)[0]
    return {content_key(pair) for pair in train}


def score(queue: Queue, run: Path, pairs: Sequence[Pair]) -> Scores:
    """The scores of all pairs, computed once per run while the lab is running."""
    with _lock:
        if (run, queue.path) not in _known:
            _known[run, queue.path] = _scored(_loaded(run), pairs)
        return _known[run, queue.path]


def _judged(pair: Pair, found: tuple[float, float] | None, known: bool, said: list[list[str]]) -> ScoredPair:
    """The probability that a is preferred is σ of the difference of the scores."""
    gap = None if found is None else max(-700.0, min(700.0, found[0] - found[1]))
    return {
        "id": pair.id,
        "prompt": pair.prompt[-1].content,
        "answers": [pair.a, pair.b],
        "scores": found,
        "probability": None if gap is None else 1 / (1 + math.exp(-gap)),
        "held_out": not known,
        "said": said,
    }


def _agreeing(labels: Sequence[Label], scores: Scores) -> Share:
    return share(wilson(sum(_agrees(label, scores) for label in labels), len(labels)))


def _agrees(label: Label, scores: Scores) -> bool:
    found = scores[label.pair]
    assert found is not None
    return found[0] > found[1] if label.preferred == "a" else found[1] > found[0]


def _asked(run: Path) -> tuple[DataConfig, int]:
    """The data section and the seed of a run."""
    with Run.read(run) as store:
        recipe = store.header.get("recipe", {})
    try:
        return DataConfig(**recipe["data"]), int(recipe["run"]["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot read the recipe of {run} ({error}); it was written by another version.") from None


def _key(pair: Pair, cfg: DataConfig) -> str:
    """The key of a pair's prompt as the run's model sees it."""
    row = Row(pair.id, {"prompt": prompt_rows(pair.prompt), "chosen": pair.a, "rejected": pair.b})
    return content_key(row_to_preference(row, cfg.system, cfg.instruction))


def _loaded(run: Path) -> RewardModel:
    from posttrain.config import RewardConfig
    from posttrain.rewards.models import load_reward_model

    return load_reward_model(f"model:{run}", RewardConfig())


def _scored(model: RewardModel, pairs: Sequence[Pair]) -> Scores:
    asked = [(Task(pair.id, "label", pair.prompt, None), text) for pair in pairs for text in (pair.a, pair.b)]
    try:
        flat = [float(score) for score in model.scores(asked)]
        return {pair.id: (flat[2 * i], flat[2 * i + 1]) for i, pair in enumerate(pairs)}
    except RolloutError:  # an answer is too long: find out which
        return {pair.id: _scored_alone(model, asked[2 * i : 2 * i + 2]) for i, pair in enumerate(pairs)}


def _scored_alone(model: RewardModel, two: Sequence[tuple[Task, str]]) -> tuple[float, float] | None:
    try:
        first, second = model.scores(two)
        return float(first), float(second)
    except PosttrainError:
        return None
