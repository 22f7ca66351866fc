"""From samples to the padded micro-batches of one optimizer step. Normalisation is data: weights are fixed here."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from posttrain import rng
from posttrain.objectives.tokens import token_weights
from posttrain.types import Batch, Sample

WORTH = 16  # fewer saved tokens do not pay for the separate attention of a run


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
    share: bool = True,
) -> list[Batch]:
    """Splits one optimizer batch into passes of about equal size and at most `tokens_per_pass` computed tokens each.

    Weights are computed over all samples first, so the split cannot change the gradient. Rows without a trained token
    are counted but not computed; with `skip_zero_advantage`, so are rows whose advantages are all 0, because their
    policy gradient is exactly 0. With `together` = 2, rows 2i and 2i + 1 are a pair and stay neighbours in one pass.
    With `share`, rows that begin alike come to lie side by side, and what they share is computed once.
    """
    if not samples:
        return []
    weights = token_weights(loss_masks(samples), how, max_len)
    kept = [s.loss_mask.any() and (not skip_zero_advantage or bool(np.any(s.advantages))) for s in samples]
    units = [list(range(i, min(i + together, len(samples)))) for i in range(0, len(samples), together)]
    parts = plan(samples, [u for u in units if any(kept[i] for i in u)], tokens_per_pass, share)
    return [pad([samples[i] for i in part], weights[part], device, share, part) for part in parts]


def plan(
    samples: Sequence[Sample], units: Sequence[Sequence[int]], tokens_per_pass: int, share: bool = True
) -> list[list[int]]:
    """Row numbers of each pass. Units of rows are never torn; rows that begin alike are side by side.

    Units that share a beginning go into one pass if they fit; more of them are split evenly, and each part computes the
    beginning again. A unit alone may exceed `tokens_per_pass`. The same input gives the same passes.
    """
    if not share:
        parts = passes([sum(len(samples[i].tokens) for i in unit) for unit in units], tokens_per_pass)
        return [[i for number in part for i in units[number]] for part in parts]
    prompts = [prompt(s) for s in samples]
    order = sorted(units, key=lambda unit: (prompts[unit[0]].tolist(), unit[0]))

    def cost(part: Sequence[Sequence[int]]) -> int:
        rows = [i for unit in part for i in unit]
        saved = sum((count - 1) * tokens for count, tokens in runs([prompts[i] for i in rows]))
        return sum(len(samples[i].tokens) for i in rows) - saved

    pieces: list[list[Sequence[int]]] = []
    for item in _alike(order, runs([prompts[i] for unit in order for i in unit])):
        lengths = [sum(len(samples[i].tokens) for i in unit) for unit in item]
        for count in range(min(len(item), -(-cost(item) // tokens_per_pass)), len(item) + 1):
            parts = [[item[i] for i in part] for part in spread(lengths, count)]
            if all(len(part) == 1 or cost(part) <= tokens_per_pass for part in parts):
                pieces += parts
                break
    return [
        [i for number in part for unit in pieces[number] for i in unit]
        for part in passes([cost(piece) for piece in pieces], tokens_per_pass)
    ]


def _alike(units: Sequence[Sequence[int]], found: Sequence[tuple[int, int]]) -> list[list[Sequence[int]]]:
    """Units that have a row in one run, put together; `found` are the runs of all the units' rows."""
    owner = [number for number, (count, _) in enumerate(found) for _ in range(count)]
    out: list[list[Sequence[int]]] = []
    at = 0
    for unit in units:
        if at and owner[at - 1] == owner[at]:
            out[-1].append(unit)
        else:
            out.append([unit])
        at += len(unit)
    return out


def passes(costs: Sequence[int], most: int) -> list[list[int]]:
    """Deals things of these costs into lists of their numbers of at most `most` each, and of nearly equal cost.

    As few lists as can be found; one thing that costs more goes alone. The costliest list comes first: if memory is
    short, it shows at once.
    """
    parts: list[list[int]] = []
    for count in range(-(-sum(min(cost, most) for cost in costs) // most), len(costs) + 1):
        parts = spread(costs, count)
        if all(len(part) == 1 or sum(costs[i] for i in part) <= most for part in parts):
            break
    return sorted(parts, key=lambda part: -sum(costs[i] for i in part))


def spread(costs: Sequence[int], count: int) -> list[list[int]]:
    """Deals things into `count` lists: the costliest first, each to the list that costs least so far.

    The costliest list is at most 4/3 of the best possible (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    Lists without anything are left out; within a list numbers ascend.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for thing in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, number = heapq.heappop(loads)
        parts[number].append(thing)
        heapq.heappush(loads, (load + costs[thing], number))
    return [sorted(part) for part in parts if part]


def prompt(sample: Sample) -> np.ndarray:
    """The tokens before the first trained one, or all but the last: what rows may share."""
    trained = np.flatnonzero(sample.loss_mask)
    return sample.tokens[: trained[0] if len(trained) else len(sample.tokens) - 1]


def runs(prompts: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Cuts rows, in the order given, into runs of (rows, tokens they all begin with), to save as much as possible.

    A run of n rows that share P tokens saves (n − 1) · P. Runs that would save fewer than WORTH tokens share none.
    """
    common = [_common(a, b) for a, b in pairwise(prompts)]

    def best(first: int, end: int) -> tuple[int, list[tuple[int, int]]]:
        if end - first == 1:
            return 0, [(1, 0)]
        least = min(common[first : end - 1])
        cuts = [first, *(i + 1 for i in range(first, end - 1) if common[i] == least), end]
        parts = [best(a, b) for a, b in pairwise(cuts)]
        saved, whole = sum(saving for saving, _ in parts), (end - first - 1) * least
        if whole >= max(saved, WORTH):
            return whole, [(end - first, least)]
        return saved, [run for _, made in parts for run in made]

    return best(0, len(prompts))[1] if prompts else []


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens are equal."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def loss_masks(samples: Sequence[Sample]) -> torch.Tensor:
    """The samples' loss masks (B, T) bool, False on padding."""
    return _stack([s.loss_mask for s in samples], torch.bool)


def pad(
    samples: Sequence[Sample],
    weights: torch.Tensor,
    device: torch.device | str = "cpu",
    share: bool = True,
    rows: Sequence[int] = (),
) -> Batch:
    """Right-pads samples to their longest; weights (B, ≥T) are cut to that length.

    With `share`, neighbours that begin alike are marked, for a pass to compute that once. `rows` says which rows of
    the optimizer batch these are.
    """

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
        shared=tuple(runs([prompt(s) for s in samples])) if share else (),
        rows=tuple(rows),
    )


def _stack(rows: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(len(rows), max(len(r) for r in rows), dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(np.ascontiguousarray(row)).to(dtype)
    return out
