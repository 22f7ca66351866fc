"""Layouts of the learner's passes: rows laid end to end, no padding token computed."""

from __future__ import annotations

import torch

from posttrain.models.attention import KEY_BLOCK, causal


class Packed:
    """Rows laid end to end in one (1, N) call; each token attends to its own row's past.

    Linear layers see only real tokens. Attention alone is computed on rows right-padded to the longest, one causal
    call for all of them; what a pad computes is dropped and nothing real ever sees one.
    """

    def __init__(self, lengths: torch.Tensor) -> None:
        """lengths (B,) int64: tokens in each row, all at least 1; N is their sum."""
        self.longest = int(lengths.max())
        steps = torch.arange(-(-self.longest // KEY_BLOCK) * KEY_BLOCK, device=lengths.device)
        starts = lengths.cumsum(0) - lengths
        self.real = steps < lengths.unsqueeze(1)  # (B, longest rounded up)
        self.index = torch.where(self.real, starts.unsqueeze(1) + steps, 0).reshape(-1)
        self.back = self.real.reshape(-1).nonzero().squeeze(1)  # (N,) packed → padded
        self.positions = steps.expand_as(self.real)[self.real].unsqueeze(0)  # (1, N)

    def _pad(self, packed: torch.Tensor) -> torch.Tensor:
        heads, width = packed.shape[1], packed.shape[3]
        padded = packed[0].transpose(0, 1).index_select(0, self.index)
        return padded.view(*self.real.shape, heads, width).transpose(1, 2)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out = causal(self._pad(query), self._pad(key), self._pad(value), scale)
        flat = out.transpose(1, 2).reshape(-1, query.shape[1], query.shape[3])
        return flat.index_select(0, self.back).unsqueeze(0)
