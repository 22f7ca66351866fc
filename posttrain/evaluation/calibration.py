"""Calibration of predicted probabilities: expected calibration error (ECE) and its table of bins."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch

from posttrain.evaluation.accuracy import wilson
from posttrain.objectives.reward import expected_calibration_error


class Bin(TypedDict):
    """One bin of predictions: their count and mean, the observed share and its interval."""

    count: int
    predicted: float
    observed: float
    low: float
    high: float


def calibration(probability: np.ndarray, outcome: np.ndarray, bins: int) -> tuple[float, list[Bin]]:
    """Expected calibration error, and the table of non-empty bins.

    probability, outcome (N,) in [0, 1]. Intervals are 95 % Wilson; an outcome between 0 and 1 counts as a fraction of
    a case, which makes them slightly too wide.
    """
    found = expected_calibration_error(torch.from_numpy(probability), torch.from_numpy(outcome), bins)
    table: list[Bin] = []
    for count, predicted, observed in torch.stack(found[1:], 1).tolist():
        if count:
            span = wilson(round(observed * count), int(count))
            table.append(Bin(count=int(count), predicted=predicted, observed=observed, low=span.low, high=span.high))
    return float(found.error), table
