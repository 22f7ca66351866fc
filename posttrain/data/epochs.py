"""The rows of each step of a run that makes passes over a fixed set of rows."""

from __future__ import annotations

import math

from posttrain.config.sections import EpochTrainConfig
from posttrain.rng import draw_order


class Epochs:
    """The steps of a run over `count` rows, `size` per step: `train.steps` of them, or `train.epochs` whole passes.

    The rows of a step depend on its number only, so a resumed run continues with the right ones.
    """

    def __init__(self, count: int, size: int, train: EpochTrainConfig, seed: int, shuffle: bool) -> None:
        self.count, self.size = count, size
        self.steps = train.steps or math.ceil(train.epochs * count / size)
        self._all = self.steps * size if train.steps else train.epochs * count
        self._seed, self._shuffle = seed, shuffle

    def span(self, step: int) -> tuple[int, int]:
        """The position of a step's first row in the run, and its number of rows.

        The last step of whole passes takes the rows that remain.
        """
        start = step * self.size
        return start, min(self.size, self._all - start)

    def rows(self, step: int) -> list[int]:
        """Indices of a step's rows."""
        return draw_order(self.count, *self.span(step), self._seed, self._shuffle)
