"""The preference explorer's reward model: a linear Bradley–Terry model of an answer's features."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from posttrain.lab.explore.people import features, order
from posttrain.objectives.reward import bradley_terry

PRIOR = 0.25
"""L2 penalty on the weights; without it, a few labels that agree would make the weights infinite."""
MOST_STEPS = 15


@lru_cache(maxsize=8192)
def fit(seed: int, labels: str) -> tuple[np.ndarray, float, float]:
    """(weights (features,), mean loss per label, seconds) for these labels of the seed's pairs, each 1, 2 or 0.

    The loss is Σ bradley_terry + PRIOR·|w|², minimised from w = 0 with L-BFGS; it has a single minimum, so the order
    of the labels does not matter.
    """
    start = time.perf_counter()
    left, right, label = data(seed, labels)
    weights = torch.zeros(left.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=MOST_STEPS, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        return bradley_terry(left @ weights, right @ weights, label, torch.zeros_like(label))

    def closure() -> float:
        optimizer.zero_grad()
        total = loss().sum() + PRIOR * weights.square().sum()
        total.backward()  # pyright: ignore[reportUnknownMemberType]
        return float(total.detach())

    if len(labels):
        optimizer.step(closure)
    with torch.no_grad():
        mean = float(loss().mean()) if len(labels) else float("nan")
    return weights.detach().numpy(), mean, time.perf_counter() - start


def data(seed: int, labels: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left (N, features), right (N, features), probability (N,) that left is better) of the labelled pairs."""
    found = torch.from_numpy(features()[list(order(seed)[: len(labels)])])
    label = torch.tensor([{"1": 1.0, "2": 0.0, "0": 0.5}[said] for said in labels], dtype=torch.float64)
    return found[:, 0], found[:, 1], label


def scores(weights: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """(N, 2) scores of both answers of these pairs."""
    return features()[list(numbers)] @ weights
