"""Splits the samples of an optimizer step into padded micro-batches and computes their loss weights."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from posttrain import rng
from posttrain.objectives.tokens import token_weights
from posttrain.types import Batch, Sample

WORTH = 16  # sharing a prefix must save at least this many tokens to pay for the separate attention of a run


def minibatches(samples: Sequence[Sample], count: int, seed: int) -> list[list[Sample]]:
    """Splits samples into `count` optimizer batches, in an order determined by the seed."""
    if count == 1:
        return [list(samples)]
    order = rng.permutation(len(samples), seed)
    return [[samples[i] for i in sorted(part)] for part in np.array_split(order, count)]


def micro(
    samples: Sequence[Sample],
    micro_batch_tokens: int,
    how: str,
    max_len: int | None = None,
    device: torch.device | str = "cpu",
    skip_zero_advantage: bool = False,
    together: int = 1,
    share: bool = True,
) -> list[Batch]:
    """Splits one optimizer batch into passes of about equal size and at most `micro_batch_tokens` computed tokens each.

    Weights are computed over all samples first, so the split does not change the gradient. Rows without a trained token
    count for the weights but are not computed; with `skip_zero_advantage`, neither are rows whose advantages are all 0,
    because their policy gradient is exactly 0. With `together` = 2, rows 2i and 2i + 1 are a pair and stay adjacent in
    one pass. With `share`, rows with a common prefix become adjacent, and the prefix is computed once.
    """
    if not samples:
        return []
    weights = token_weights(loss_masks(samples), how, max_len)
    kept = [s.loss_mask.any() and (not skip_zero_advantage or bool(np.any(s.advantages))) for s in samples]
    units = [list(range(i, min(i + together, len(samples)))) for i in range(0, len(samples), together)]
    parts = plan(samples, [u for u in units if any(kept[i] for i in u)], micro_batch_tokens, share)
    return [pad([samples[i] for i in part], weights[part], device, share, part) for part in parts]


def plan(
    samples: Sequence[Sample], units: Sequence[Sequence[int]], micro_batch_tokens: int, share: bool = True
) -> list[list[int]]:
    """Row numbers of each pass. Units of rows stay together; rows with a common prefix are adjacent.

    Units with a common prefix go into one pass if they fit; otherwise they are split evenly, and each part computes the
    prefix again. A unit alone may exceed `micro_batch_tokens`. The same input gives the same passes.
    """
    if not share:
        parts = passes([sum(len(samples[i].tokens) for i in unit) for unit in units], micro_batch_tokens)
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
        for count in range(min(len(item), -(-cost(item) // micro_batch_tokens)), len(item) + 1):
            parts = [[item[i] for i in part] for part in spread(lengths, count)]
            if all(len(part) == 1 or cost(part) <= micro_batch_tokens for part in parts):
                pieces += parts
                break
    return [
        [i for number in part for unit in pieces[number] for i in unit]
        for part in passes([cost(piece) for piece in pieces], micro_batch_tokens)
    ]


def _alike(units: Sequence[Sequence[int]], found: Sequence[tuple[int, int]]) -> list[list[Sequence[int]]]:
    """Groups units that have rows in the same run; `found` are the runs of all the units' rows."""
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
    """Groups items with these costs into lists of item numbers, of at most `most` and nearly equal total cost each.

    Uses as few lists as `spread` allows; an item that costs more than `most` is alone in its list. The most expensive
    list comes first, so that a lack of memory shows up immediately.
    """
    parts: list[list[int]] = []
    for count in range(-(-sum(min(cost, most) for cost in costs) // most), len(costs) + 1):
        parts = spread(costs, count)
        if all(len(part) == 1 or sum(costs[i] for i in part) <= most for part in parts):
            break
    return sorted(parts, key=lambda part: -sum(costs[i] for i in part))


def spread(costs: Sequence[int], count: int) -> list[list[int]]:
    """Distributes items over `count` lists: the most expensive item first, each to the cheapest list so far.

    The most expensive list costs at most 4/3 of the optimum (Graham, "Bounds on multiprocessing timing anomalies",
    1969). Empty lists are left out; within a list, item numbers ascend.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, number = heapq.heappop(loads)
        parts[number].append(item)
        heapq.heappush(loads, (load + costs[item], number))
    return [sorted(part) for part in parts if part]


def prompt(sample: Sample) -> np.ndarray:
    """The tokens that rows may share: those before the first trained token, or all but the last."""
    trained = np.flatnonzero(sample.loss_mask)
    return sample.tokens[: trained[0] if len(trained) else len(sample.tokens) - 1]


def runs(prompts: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Splits rows, in the given order, into runs (rows, common prefix tokens) that save as many tokens as possible.

    A run of n rows with a common prefix of P tokens saves (n − 1) · P tokens. Runs that would save fewer than WORTH
    tokens share nothing.
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
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def loss_masks(samples: Sequence[Sample]) -> torch.Tensor:
    """The loss masks of the samples, (B, T) bool, False on padding."""
    return _stack([s.loss_mask for s in samples], torch.bool)


def pad(
    samples: Sequence[Sample],
    weights: torch.Tensor,
    device: torch.device | str = "cpu",
    share: bool = True,
    rows: Sequence[int] = (),
) -> Batch:
    """Right-pads samples to the longest one; weights (B, ≥T) are cut to that length.

    With `share`, common prefixes of adjacent rows are recorded, so that a pass computes them once. `rows` are the
    samples' row numbers in the optimizer batch.
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
