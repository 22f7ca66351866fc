"""The best evaluation of a run so far, for keeping its checkpoint and for stopping without gain."""

from __future__ import annotations

import math
from collections.abc import Mapping

from posttrain.config.best import is_lower_better, metric_name
from posttrain.types import ConfigError, Json


class Best:
    """The step with the best value of an evaluation metric, and the number of evaluations since.

    The evaluation before training does not count: the starting model needs no checkpoint. Of equal values the earliest
    is kept, and NaN is never the best.
    """

    def __init__(self, metric: str) -> None:
        """`metric` is a setting of `run.keep_best`; empty keeps nothing."""
        self.metric = metric and metric_name(metric)
        self._lower = bool(metric) and is_lower_better(metric)
        self.step = 0
        self.value = math.nan
        self.since = 0
        self._allowed = 0

    def check(self, values: Mapping[str, float]) -> None:
        """Raises ConfigError if an evaluation of this run does not have the metric."""
        if self.metric and self.metric not in values:
            measured = ", ".join(sorted(name for name in values if name.startswith("eval/"))) or "nothing"
            raise ConfigError(f"run.keep_best={self.metric!r} is not measured in this run, which measures {measured}.")

    def update(self, step: int, values: Mapping[str, float]) -> bool:
        """Takes an evaluation into account; whether it is the best so far."""
        value = values.get(self.metric, math.nan)
        gained = not math.isnan(value) and (
            math.isnan(self.value) or (value < self.value if self._lower else value > self.value)
        )
        if gained:
            self.step, self.value, self.since, self._allowed = step, value, 0, 0
        else:
            self.since += 1
        return gained

    def exhausted(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row, or since `allow_more`, have not improved on the best; 0 never is."""
        return patience > 0 and self.since - self._allowed >= patience

    def allow_more(self) -> None:
        """Starts a new count for `exhausted`, in a run that ended by it and is extended."""
        self._allowed = self.since

    def state(self) -> Json:
        """The state for `load`, as JSON; empty before the first evaluation."""
        if not self.step:
            return {}
        return {"step": self.step, "value": self.value, "since": self.since, "allowed": self._allowed}

    def load(self, state: Mapping[str, float]) -> None:
        """Restores the state."""
        if state:
            self.step, self.value, self.since = int(state["step"]), float(state["value"]), int(state["since"])
            self._allowed = int(state.get("allowed", 0))
