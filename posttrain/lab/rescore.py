"""KL and entropy of each token of a stored completion, which the run does not store.

A run stores the log-probability that each token was sampled with. The starting model's log-probability and the entropy
are computed here with models on this machine; nothing is downloaded. torch is imported when the first model is opened.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from posttrain import config
from posttrain.lab.folders import trained
from posttrain.lab.tokens import start_folders
from posttrain.store.run import EpisodeRow, Run
from posttrain.types import ConfigError, Json, JsonView

if TYPE_CHECKING:
    from posttrain.models.load import Policy

LARGEST = 4 << 30  # bytes of weights; larger models are not loaded for this
LOGITS_AT_ONCE = 1 << 24
_lock = threading.Lock()


class TokenKl(TypedDict):
    """log π − log π_ref of each token with the stored π and the starting model as reference (k1), and their sum."""

    values: list[float | None]
    total: float


class TokenEntropy(TypedDict):
    """Entropy at each token under the weights of step `weights` (0 is the starting model).

    They are the closest on this machine to step `wanted`, which wrote the completion; `apart` is the mean absolute
    difference between their log-probabilities and the stored ones.
    """

    values: list[float | None]
    weights: int
    wanted: int
    apart: float


class TokenScores(TypedDict):
    """KL and entropy, each None if its model is not here; `start` is the path of the starting model."""

    kl: TokenKl | None
    entropy: TokenEntropy | None
    start: str


def score_tokens(folder: Path, row: EpisodeRow) -> TokenScores:
    """KL and entropy, in nats, of each of a completion's L tokens; None for tokens not written by the model.

    Raises ConfigError for a model that does not match.
    """
    with Run.read(folder) as run:
        header, last = run.header, run.last_step() or 0
    recipe: Json = header.get("recipe", {})
    heat = float(recipe.get("eval" if row.kind == "eval" else "rollout", {}).get("temperature") or 1.0)
    dtype = str(recipe.get("model", {}).get("dtype", "float32"))
    own, wanted = row.loss_mask.astype(bool), row.step if row.kind == "eval" else row.step - 1
    here = _weights(folder, header, last)
    found: TokenScores = {"kl": None, "entropy": None, "start": str(recipe.get("model", {}).get("path", ""))}
    with _lock:
        if 0 in here:
            reference, _ = _stats(_open(here[0], dtype, _stamp(here[0])), row, heat)
            kl = row.logprobs[own] - reference  # objectives.kl_k1, of numbers
            found["kl"] = {"values": _placed(kl, own), "total": float(f"{kl.sum():.5g}")}
        if here:
            nearest = min(here, key=lambda step: abs(step - wanted))
            logp, entropy = _stats(_open(here[nearest], dtype, _stamp(here[nearest])), row, heat)
            apart = float(np.abs(logp - row.logprobs[own]).mean()) if own.any() else 0.0
            found["entropy"] = {
                "values": _placed(entropy, own),
                "weights": nearest,
                "wanted": wanted,
                "apart": float(f"{apart:.3g}"),
            }
    return found


def _weights(folder: Path, header: JsonView, last: int) -> dict[int, Path]:
    """Step → folder of a run's language models on this machine: the starting model and the trained one."""
    starts = (path for path in start_folders(folder, header) if (path / "config.json").is_file())
    found = {0: next(starts, None)}
    facts = trained(header)
    if (folder / "model" / "tokenizer.json").is_file() and (facts is None or facts.trains == "policy"):
        found[last] = folder / "model"
    return {step: path for step, path in found.items() if path is not None}


def _stamp(folder: Path) -> int:
    return (folder / "config.json").stat().st_mtime_ns


@lru_cache(maxsize=3)
def _open(folder: Path, dtype: Literal["float32", "bfloat16"], stamp: int) -> Policy:
    """A model, kept open; `stamp` changes with its files."""
    from posttrain.models.load import load_policy

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size > LARGEST:
        raise ConfigError(f"{folder} has {size / (1 << 30):.1f} GiB of weights; the lab loads at most 4 GiB for this.")
    return load_policy(config.ModelConfig(path=str(folder), dtype=dtype))


def _stats(policy: Policy, row: EpisodeRow, heat: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies (K,) of the K tokens that the model wrote."""
    import torch

    from posttrain.models.policy import states as states_of
    from posttrain.objectives.tokens import select

    ids = torch.from_numpy(row.tokens.astype(np.int64))
    if not len(ids) or int(ids.max()) >= policy.vocab:
        raise ConfigError(
            f"tokenizer mismatch: {policy.source} has {policy.vocab} tokens, but the completion has other token ids."
        )
    where = torch.from_numpy(np.flatnonzero(row.loss_mask))
    with torch.inference_mode():
        policy.model.eval()
        hidden = states_of(policy, ids, torch.tensor([len(ids)]), (), where - 1)
        size = max(1, LOGITS_AT_ONCE // policy.vocab)
        parts = zip(hidden.split(size), ids[where].split(size), strict=True)
        stats = [select(policy.logits(states), targets, heat) for states, targets in parts]
        return (torch.cat([logp for logp, _ in stats]).numpy(), torch.cat([open_ for _, open_ in stats]).numpy())


def _placed(values: np.ndarray, own: np.ndarray) -> list[float | None]:
    """Places values (K,) at the K true positions of own (L,), None elsewhere, for JSON."""
    rest = iter(values.tolist())
    return [float(f"{next(rest):.5g}") if mine else None for mine in own]
