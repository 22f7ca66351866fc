"""Sequence packing for the learner: no padding tokens, and each shared prompt is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from posttrain.models import kernels

QUERIES = 256  # longer rows are split into pieces of this many tokens, so that later keys are never computed
TILE = 1 << 20  # attention scores computed at once: 4 MiB in fp32, so that they stay in the CPU cache

Range = tuple[int, int]  # tokens start … end − 1 of the packed sequence


@dataclass(frozen=True)
class Block:
    """Pieces of rows that are computed together: each attends to all of a common context and causally to itself.

    `own` are the ranges of the pieces; `context` are the ranges that every piece attends to.
    """

    own: tuple[Range, ...]
    context: tuple[Range, ...] = ()

    @property
    def longest(self) -> int:
        return max(end - start for start, end in self.own)

    @property
    def whole(self) -> Range | None:
        """The range of all pieces together, if they are equally long and contiguous; else None."""
        follow = all(a[1] == b[0] for a, b in pairwise(self.own))
        equal = all(end - start == self.longest for start, end in self.own)
        return (self.own[0][0], self.own[-1][1]) if follow and equal else None

    def tiles(self, heads: int) -> list[Block]:
        """Splits the block into parts of at most TILE scores, or of a single piece."""
        seen = self.longest + sum(end - start for start, end in self.context)
        size = max(1, TILE // (heads * self.longest * seen))
        return [Block(self.own[i : i + size], self.context) for i in range(0, len(self.own), size)]


class Packed:
    """Layout for rows packed into one (1, M) call; each token attends to the past of its own row.

    `shared` lists runs of neighbouring rows with a common prefix, as (rows, prefix tokens); the runs cover all rows in
    order. Each prefix is computed once. It precedes the rest of its rows in the call, and every row of the run attends
    to it as its own past, at the same positions as if the row were alone. Linear layers process each computed token
    once; attention is computed together for rows of similar length (see `attention_blocks`).
    """

    def __init__(self, lengths: torch.Tensor, shared: Sequence[tuple[int, int]] = ()) -> None:
        """lengths (B,) int64: tokens in each row, at least 1 and more than the row's shared prefix."""
        sizes = [int(n) for n in lengths.tolist()]
        shared = shared or [(1, 0)] * len(sizes)
        if sum(rows for rows, _ in shared) != len(sizes):
            raise ValueError(f"runs of {[rows for rows, _ in shared]} rows do not add up to {len(sizes)} rows.")
        self.longest = max(sizes)
        rows, kept, index, positions = self._lay(sizes, shared)
        device = lengths.device
        self.pieces, self.most = rows, QUERIES if device.type == "cpu" else self.longest
        self.rows = torch.tensor([own for own, _ in rows])  # (rows, 2), for kernels.attention
        starts = [i for i, (_, before) in enumerate(rows) if before[0] == before[1]]
        self.runs = torch.tensor([*starts, len(rows)])
        self.kept = torch.cat(kept).to(device)  # (M,) indices of the computed tokens among all N, in call order
        self.index = torch.cat(index).to(device)  # (N,) position in the call of each of the rows' N tokens
        self.positions = torch.cat(positions).unsqueeze(0).to(device)  # (1, M)

    @cached_property
    def blocks(self) -> list[Block]:
        """The rows as blocks, for attention without the compiled kernel."""
        return attention_blocks(self.pieces, self.most)

    def _lay(self, sizes: list[int], shared: Sequence[tuple[int, int]]) -> Any:
        rows: list[tuple[Range, Range]] = []  # a row's computed range, and the range of its shared prefix
        kept: list[torch.Tensor] = []
        index: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        at = real = row = 0
        for count, prefix in shared:
            begin = (at, at + prefix)
            if prefix:
                rows.append((begin, (0, 0)))
                kept.append(torch.arange(real, real + prefix))
                positions.append(torch.arange(prefix))
                at += prefix
            for size in sizes[row : row + count]:
                own = (at, at + size - prefix)
                rows.append((own, begin))
                kept.append(torch.arange(real + prefix, real + size))
                positions.append(torch.arange(prefix, size))
                index += [torch.arange(*begin), torch.arange(*own)]
                at, real = own[1], real + size
            row += count
        return rows, kept, index, positions

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        parts = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]  # (M, H, D)
        if kernels.takes(query):
            return kernels.attention(parts[0], parts[1], parts[2], self.rows, self.runs, scale).unsqueeze(0)
        if query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
            made: Any = _Attention.apply(parts[0], parts[1], parts[2], self.blocks, scale)
            return made.unsqueeze(0)
        return fused(parts[0], parts[1], parts[2], self.blocks, scale).unsqueeze(0)


def attention_blocks(rows: Sequence[tuple[Range, Range]], most: int) -> list[Block]:
    """Cuts rows, each (own range, range of its prefix), into pieces of at most `most` tokens and groups similar pieces.

    All pieces of a block have the same context. They are padded within the block, so none is shorter than the longest
    by more than a quarter of it or 16 tokens, whichever is more. The context always precedes the block in the call.
    """
    pieces: dict[tuple[Range, ...], list[Range]] = {}
    for (start, end), before in rows:
        for at in range(start, end, most):
            context = tuple(r for r in (before, (start, at)) if r[0] < r[1])
            pieces.setdefault(context, []).append((at, min(at + most, end)))
    blocks: list[Block] = []
    for context, own in pieces.items():
        own.sort(key=lambda r: (r[0] - r[1], r[0]))  # longest first, then in order
        while own:
            longest = own[0][1] - own[0][0]
            least = longest - max(16, longest // 4)
            count = sum(end - start >= least for start, end in own)
            blocks.append(Block(tuple(own[:count]), context))
            own = own[count:]
    return blocks


def _padded(block: Block, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in the call of the block's padded pieces (R · S,), and which of them are not padding (R · S,) bool."""
    starts = torch.tensor([start for start, _ in block.own], device=device).unsqueeze(1)
    lengths = torch.tensor([end - start for start, end in block.own], device=device).unsqueeze(1)
    steps = torch.arange(block.longest, device=device)
    real = steps < lengths
    return torch.where(real, starts + steps, starts).reshape(-1), real.reshape(-1)


def _take(x: torch.Tensor, block: Block, index: torch.Tensor | None) -> torch.Tensor:
    """x (M, H, D) → the block's pieces (R, S, H, D), padded."""
    if index is not None:
        part = x.index_select(0, index)
    else:
        assert block.whole is not None
        part = x[slice(*block.whole)]
    return part.view(len(block.own), block.longest, *x.shape[1:])


def _context(x: torch.Tensor, block: Block) -> torch.Tensor:
    """x (M, H, D) → the block's context (H, P, D)."""
    parts = [x[start:end] for start, end in block.context]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


class _Tile:
    """Attention of one tile: probabilities, output and gradients.

    R pieces padded to S tokens, P tokens of context, H key heads with G query heads each, head width D.
    """

    def __init__(self, block: Block, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> None:
        self.block, self.scale = block, scale
        self.index, self.real = (None, None) if block.whole else _padded(block, query.device)
        heads, self.groups = key.shape[1], query.shape[1] // key.shape[1]
        self.shape = (heads, len(block.own), self.groups, block.longest)  # H, R, G, S
        self.query = self.queries(query).mul_(scale)  # (H, R·G·S, D)
        self.key, self.value = self.keys(key), self.keys(value)  # (H·R, S, D)
        self.seen = [_context(x, block) for x in (key, value)] if block.context else None  # (H, P, D)
        self.probs = self._products(self.query, self.key, self.seen[0] if self.seen else None)  # (H, R·G·S, P + S)
        later = torch.ones(block.longest, block.longest, dtype=torch.bool, device=query.device).triu(1)
        self.own(self.probs).view(-1, block.longest, block.longest).masked_fill_(later, float("-inf"))
        torch.softmax(self.probs, dim=-1, out=self.probs)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H·G, D) → a copy (H, R·G·S, D) of the tile's pieces."""
        heads, rows, groups, length = self.shape
        part = _take(x, self.block, self.index).unflatten(2, (heads, groups))  # (R, S, H, G, D)
        out = x.new_empty(heads, rows, groups, length, x.shape[2])
        return out.copy_(part.permute(2, 0, 3, 1, 4)).view(heads, -1, x.shape[2])

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H, D) → (H·R, S, D)."""
        return _take(x, self.block, self.index).permute(2, 0, 1, 3).reshape(-1, self.block.longest, x.shape[2])

    def own(self, scores: torch.Tensor) -> torch.Tensor:
        """(H, R·G·S, P + S) → (H·R, G·S, S): the scores without the context; a view."""
        heads, rows, groups, length = self.shape
        return scores.view(heads * rows, groups * length, -1)[:, :, scores.shape[2] - length :]

    def _products(self, query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """Queries (H, R·G·S, D) times the keys of context and pieces → (H, R·G·S, P + S)."""
        heads, rows, groups, length = self.shape
        context = 0 if seen is None else seen.shape[1]
        out = query.new_empty(heads, query.shape[1], context + length)
        if seen is not None:
            torch.bmm(query, seen.transpose(1, 2), out=out[:, :, :context])
        own = query.view(heads * rows, groups * length, -1)
        torch.bmm(own, key.transpose(1, 2), out=self.own(out))
        return out

    def _weighted(self, weights: torch.Tensor, key: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """Sums over context and pieces, weighted by weights (H, R·G·S, P + S) → (H, R·G·S, D)."""
        out = torch.bmm(self.own(weights), key).view(self.shape[0], weights.shape[1], -1)
        return out if seen is None else out.baddbmm_(weights[:, :, : seen.shape[1]], seen)

    def write(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the results of the tile's queries (H, R·G·S, D) to `out` (M, H·G, D)."""
        heads, rows, groups, length = self.shape
        moved = part.view(heads, rows, groups, length, -1).permute(1, 3, 0, 2, 4)  # (R, S, H, G, D)
        self._place(moved.reshape(rows * length, heads * groups, -1), out)

    def _place(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Writes rows (R·S, H, D) to the positions of the pieces in `out`, without padding."""
        if self.index is None or self.real is None:
            assert self.block.whole is not None
            out[slice(*self.block.whole)] = rows
        else:
            out.index_copy_(0, self.index[self.real], rows[self.real])

    def attended(self) -> torch.Tensor:
        return self._weighted(self.probs, self.value, self.seen[1] if self.seen else None)

    def backward(self, grad: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
        """Adds this tile's part to the gradients of query, key and value, given the output's grad (M, H·G, D)."""
        dquery, dkey, dvalue = grads
        given = self.queries(grad)
        if self.real is not None:  # padding was not written to the output, so its gradient is 0
            heads, rows, groups, length = self.shape
            pads = ~self.real.view(rows, 1, length, 1)
            given.view(heads, rows, groups, length, -1).masked_fill_(pads, 0)
        dscores = self._products(given, self.value, self.seen[1] if self.seen else None)
        dscores = torch.ops.aten._softmax_backward_data(dscores, self.probs, -1, dscores.dtype)
        self.write(self._weighted(dscores, self.key, self.seen[0] if self.seen else None).mul_(self.scale), dquery)
        for weights, rows, out in ((dscores, self.query, dkey), (self.probs, given, dvalue)):
            self._add_keys(weights, rows, out)

    def _add_keys(self, weights: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Adds weightsᵀ · rows at the positions of the pieces and of the context."""
        heads, count, groups, length = self.shape
        own = torch.bmm(self.own(weights).transpose(1, 2), rows.view(heads * count, groups * length, -1))
        flat = own.view(heads, count, length, -1).permute(1, 2, 0, 3).reshape(count * length, heads, -1)
        if self.index is None or self.real is None:
            assert self.block.whole is not None
            out[slice(*self.block.whole)] += flat
        else:
            out.index_add_(0, self.index[self.real], flat[self.real])
        at = 0
        for start, end in self.block.context:
            part = weights[:, :, at : at + end - start]
            out[start:end] += torch.bmm(part.transpose(1, 2), rows).transpose(0, 1)
            at += end - start


class _Attention(torch.autograd.Function):
    """Attention of a pass, tile by tile. The backward pass recomputes each tile's probabilities.

    No probabilities are stored, as in FlashAttention (Dao et al., arXiv 2205.14135).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scale: float
    ) -> torch.Tensor:
        """query (M, Hq, D), key and value (M, Hkv, D) → (M, Hq, D)."""
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        out = torch.empty_like(query)
        for block in blocks:
            for part in block.tiles(query.shape[1]):
                tile = _Tile(part, query, key, value, scale)
                tile.write(tile.attended(), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        grad = grad.contiguous()
        grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            for part in block.tiles(query.shape[1]):
                _Tile(part, query, key, value, ctx.scale).backward(grad, grads)
        return *grads, None, None


def fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scale: float
) -> torch.Tensor:
    """The same with torch's fused kernel, for GPUs and bf16; each piece gets its own copy of the context's keys."""
    out = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    for block in blocks:
        index, real = _padded(block, query.device)
        own = [_take(x, block, index).transpose(1, 2) for x in (query, key, value)]  # (R, H, S, D)
        mask = None
        if block.context:
            seen = [_context(x, block).expand(len(block.own), -1, -1, -1) for x in (key, value)]
            own[1:] = [torch.cat(pair, 2) for pair in zip(seen, own[1:], strict=True)]
            length, keys = block.longest, own[1].shape[2]
            mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
            own[1:] = [x.repeat_interleave(groups, 1) for x in own[1:]]
        made = F.scaled_dot_product_attention(
            *own, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=mask is None and groups > 1
        )
        rows = made.transpose(1, 2).reshape(-1, *query.shape[1:])
        out = out.index_copy(0, index[real], rows[real])
    return out
