"""Which direction of an evaluation metric is better, for `run.keep_best`."""

from __future__ import annotations

import re

from posttrain.types import ConfigError

HIGHER = re.compile(
    r"reward|reward_margin|(\w+_)?accuracy|pass_at_\d+|maj_at_\d+|score_gap|(\w+_)?(step|outcome)_auc|first_mistake"
    r"|chosen_logp|part/.+"
)
LOWER = re.compile(r"nll(/.+)?|(pair_|step_)?loss|ece|truncated|unscored|uncertainty")
KNOWN = "accuracy, reward, pass_at_K, maj_at_K, part/NAME, nll, loss, pair_accuracy, pair_loss, step_auc or ece"


def metric_name(metric: str) -> str:
    """`accuracy` and `eval/accuracy` → `eval/accuracy`."""
    return metric if metric.startswith("eval/") else f"eval/{metric}"


def is_lower_better(metric: str) -> bool:
    """Whether a lower value of an evaluation metric is better. Raises ConfigError for one without a direction."""
    name = metric_name(metric).removeprefix("eval/")
    if LOWER.fullmatch(name):
        return True
    if HIGHER.fullmatch(name):
        return False
    raise ConfigError(f"run.keep_best={metric!r} is not an evaluation metric with a better direction, such as {KNOWN}.")
