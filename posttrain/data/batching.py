"""From samples to the padded micro-batches of one optimizer step. Normalisation is data: weights are fixed here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from posttrain import rng
from posttrain.objectives.tokens import token_weights
from posttrain.types import Batch, Sample


def minibatches(samples: Sequence[Sample], count: int, seed: int) -> list[list[Sample]]:
    """Deals samples into `count` optimizer batches, in an order that is a function of the seed."""
    if count == 1:
        return [list(samples)]
    order = rng.permutation(len(samples), seed)
    return [[samples[i] for i in sorted(part)] for part in np.array_split(order, count)]


def micro(
    samples: Sequence[Sample],
    tokens_per_pass: int,
    how: str,
    max_len: int | None = None,
    device: torch.device | str = "cpu",
    skip_zero_advantage: bool = False,
    together: int = 1,
) -> list[Batch]:
    """Splits one optimizer batch into passes of at most `tokens_per_pass` real tokens (a longer row goes alone).

    Weights are computed over all samples first, so the split cannot change the gradient. Longest rows come first:
    if memory is short, it shows at once. With `skip_zero_advantage`, rows whose advantages are all 0 are left out of
    the passes after they were counted: their policy gradient is exactly 0. With `together` = 2, rows 2i and 2i + 1 are
    a pair and stay neighbours in one pass.
    """
    if not samples:
        return []
    weights = token_weights(loss_masks(samples), how, max_len)
    kept = [i for i, s in enumerate(samples) if not skip_zero_advantage or np.any(s.advantages)]
    units = [kept[i : i + together] for i in range(0, len(kept), together)]
    parts = passes([sum(len(samples[i].tokens) for i in unit) for unit in units], tokens_per_pass)
    chosen = [[i for u in part for i in units[u]] for part in parts]
    return [pad([samples[i] for i in part], weights[part], device) for part in chosen]


def passes(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
    """Splits rows of these lengths, longest first, into lists of row numbers of at most `tokens_per_pass` tokens.

    A row that is longer than that goes alone. Rows of equal length keep their order.
    """
    out: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not out or lengths[row] > room:
            out.append([])
            room = tokens_per_pass
        out[-1].append(row)
        room -= lengths[row]
    return out


def loss_masks(samples: Sequence[Sample]) -> torch.Tensor:
    """The samples' loss masks (B, T) bool, False on padding."""
    return _stack([s.loss_mask for s in samples], torch.bool)


def pad(samples: Sequence[Sample], weights: torch.Tensor, device: torch.device | str = "cpu") -> Batch:
    """Right-pads samples to their longest; weights (B, ≥T) are cut to that length."""

    def optional(name: str) -> torch.Tensor | None:
        rows = [getattr(s, name) for s in samples]
        return None if rows[0] is None else _stack(rows, torch.float32).to(device)

    tokens = _stack([s.tokens for s in samples], torch.int64)
    lengths = torch.tensor([len(s.tokens) for s in samples])
    return Batch(
        tokens=tokens.to(device),
        real=(torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).to(device),
        weights=weights[:, : tokens.shape[1]].to(device),
        behaviour_logp=_stack([s.behaviour_logp for s in samples], torch.float32).to(device),
        advantages=_stack([s.advantages for s in samples], torch.float32).to(device),
        old_logp=optional("old_logp"),
        ref_logp=optional("ref_logp"),
        old_values=optional("old_values"),
        returns=optional("returns"),
        labels=torch.tensor([s.label for s in samples], dtype=torch.float32, device=device),
        margins=torch.tensor([s.margin for s in samples], dtype=torch.float32, device=device),
    )


def _stack(rows: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(len(rows), max(len(r) for r in rows), dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(np.ascontiguousarray(row)).to(dtype)
    return out
