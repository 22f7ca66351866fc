"""Do things that are predicted with probability p happen in a share p of cases?"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch

from posttrain.evaluation.accuracy import wilson
from posttrain.objectives.reward import expected_calibration_error


class Bin(TypedDict):
    """Predictions of about the same probability: how many, their mean, the share that came true and its interval."""

    count: int
    predicted: float
    observed: float
    low: float
    high: float


def calibration(probability: np.ndarray, outcome: np.ndarray, bins: int) -> tuple[float, list[Bin]]:
    """The expected calibration error, and the table of the bins that hold anything.

    probability, outcome (N,) in [0, 1]. The intervals are Wilson's, 95 %; an outcome between 0 and 1 counts as that
    part of a case, which makes them a little too wide.
    """
    found = expected_calibration_error(torch.from_numpy(probability), torch.from_numpy(outcome), bins)
    table: list[Bin] = []
    for count, predicted, observed in torch.stack(found[1:], 1).tolist():
        if count:
            span = wilson(round(observed * count), int(count))
            table.append(Bin(count=int(count), predicted=predicted, observed=observed, low=span.low, high=span.high))
    return float(found.error), table
