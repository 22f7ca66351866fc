"""Over-optimisation curves of Gao et al. (arXiv 2210.10760): the true score as the policy moves away from its start.

With d = sqrt(KL(policy ‖ start)), KL in nats per completion, and R the true score minus its value at d = 0, they find

    best of n:               R(d) = d (α − β d)
    reinforcement learning:  R(d) = d (α − β log d)

Both are linear in α and β, so the fit is ordinary least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from posttrain import rng
from posttrain.evaluation.accuracy import Estimate
from posttrain.types import Json

Form = Literal["best-of-n", "rl"]
RESAMPLES = 1000


@dataclass(frozen=True)
class Fit:
    """R(d) = d (α − β d) or d (α − β log d) above `base`, with 95 % intervals; `rms` is the root mean square residual.

    `peak` is the distance at which the fitted curve is highest, None if it never turns down.
    """

    form: Form
    alpha: Estimate
    beta: Estimate
    base: float
    rms: float
    peak: float | None

    def at(self, distance: np.ndarray) -> np.ndarray:
        """The fitted score (K,) at distances (K,)."""
        terms = columns(np.asarray(distance, float), self.form)
        return self.base + terms @ np.array([self.alpha.value, self.beta.value])

    def as_dict(self) -> Json:
        """A JSON-serialisable dict."""
        return asdict(self)


def columns(distance: np.ndarray, form: Form) -> np.ndarray:
    """Regressors of α and β, (K, 2): d and −d² or −d log d, whose limit at 0 is 0."""
    safe = np.where(distance > 0, distance, 1.0)
    bend = distance**2 if form == "best-of-n" else distance * np.log(safe)
    return np.stack([distance, -bend], axis=1)


def peak_of(alpha: float, beta: float, form: Form) -> float | None:
    """Where the curve peaks: α / 2β, or exp(α/β − 1); None if it does not rise and then fall."""
    if beta <= 0 or (form == "best-of-n" and alpha <= 0):
        return None
    power = alpha / beta - 1
    return alpha / (2 * beta) if form == "best-of-n" else (math.exp(power) if power < 700 else None)


def fit_tasks(distance: np.ndarray, values: np.ndarray, form: Form = "best-of-n", seed: int = 0) -> Fit:
    """Fits the mean values (P, K) of P tasks at distances (K,), the first of them 0, relative to the first value.

    Intervals are percentiles of a bootstrap over tasks. Raises ValueError for fewer than two distances above 0.
    """
    distance, values = np.asarray(distance, float), np.asarray(values, float)
    _enough(distance, 2)
    if distance[0] != 0:
        raise ValueError(f"the first distance is {distance[0]}, expected 0, the starting policy.")
    solve = np.linalg.pinv(columns(distance[1:], form))  # (2, K − 1)

    def coefficients(means: np.ndarray) -> np.ndarray:
        return (means[..., 1:] - means[..., :1]) @ solve.T

    tasks = len(values)
    picks = (rng.uniforms(rng.key("over-optimisation", seed), RESAMPLES * tasks) * tasks).astype(int)
    means = np.stack([values[one].mean(0) for one in picks.reshape(RESAMPLES, tasks)])
    whole = values.mean(0)
    return _made(form, coefficients(whole), float(whole[0]), coefficients(means), distance, whole, tasks)


def fit_points(distance: np.ndarray, value: np.ndarray, form: Form = "rl", seed: int = 0) -> Fit:
    """Fits points (S,) of a run, one per step; the value at d = 0 is a third coefficient of the same least squares.

    Intervals are percentiles of a bootstrap over points, as if they were independent: they say how well this run's
    curve is known, not what another seed would give. Raises ValueError for fewer than three different distances.
    """
    distance, value = np.asarray(distance, float), np.asarray(value, float)
    _enough(distance, 3)
    terms = np.column_stack([columns(distance, form), np.ones_like(distance)])

    def coefficients(picked: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(terms[picked], value[picked], rcond=None)[0]

    points = len(distance)
    found = coefficients(np.arange(points))
    uniform = rng.uniforms(rng.key("over-optimisation", seed), RESAMPLES * points)
    picks = (uniform * points).astype(int).reshape(RESAMPLES, points)
    enough = [one for one in picks if len(np.unique(distance[one])) >= 3]
    drawn = np.stack([coefficients(one)[:2] for one in enough])
    return _made(form, found[:2], float(found[2]), drawn, distance, value, points)


def _made(
    form: Form, found: np.ndarray, base: float, drawn: np.ndarray, distance: np.ndarray, value: np.ndarray, n: int
) -> Fit:
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    alpha, beta = (Estimate(float(v), float(a), float(b), n) for v, a, b in zip(found, low, high, strict=True))
    residual = value - base - columns(distance, form) @ found
    rms = float(np.sqrt(np.mean(residual**2)))
    return Fit(form, alpha, beta, base, rms, peak_of(float(found[0]), float(found[1]), form))


def _enough(distance: np.ndarray, least: int) -> None:
    usable = distance if least == 3 else distance[distance > 0]
    if len(np.unique(usable)) < least or not np.isfinite(distance).all():
        raise ValueError(
            f"a fit needs {least} different distances{' above 0' if least == 2 else ''}, all finite; got {distance}."
        )


FITS: dict[Form, Callable[..., Fit]] = {"best-of-n": fit_tasks, "rl": fit_points}
"""Form → its fitting function."""
