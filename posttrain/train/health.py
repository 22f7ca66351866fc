"""Run health checks: warnings about a step, and reasons to stop."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.store.run import Event


def unscored(values: Mapping[str, float]) -> list[Event]:
    """A warning if completions could not be scored."""
    count = values["unscored"]
    return [Event("warning", "unscored", f"{count:.0f} completions could not be scored.")] if count else []


def repeated(kind: str, what: str, steps: int, least: int = 3) -> list[Event]:
    """A warning once a condition has held for `least` steps in a row; `what` is a sentence with {steps}."""
    return [Event("warning", kind, what.format(steps=steps))] if steps >= least else []


def solved_steps(before: int, flat: bool, values: Mapping[str, float]) -> int:
    """Consecutive steps, this one included, in which all rewards were equal and every scored completion passed."""
    return before + 1 if flat and values["accuracy"] == 1 else 0


def solved(steps: int, most: int) -> str:
    """Reason to end a run early, as a success: `most` steps in a row had nothing left to improve; else empty."""
    if steps < most:
        return ""
    return f"every completion of the last {steps} steps passed with equal rewards, so there was nothing left to learn"


def mismatch(values: Mapping[str, float], limit: float) -> str:
    """Reason to stop if sampler and learner log-probabilities differ by more than `limit` nats; else empty."""
    gap = values.get("mismatch", 0.0)
    if not gap <= limit:  # also catches NaN
        return (
            f"sampler and learner differ by {gap:.3g} in a token's log-probability (allowed: algo.max_mismatch="
            f"{limit}). The rollouts are not from this policy."
        )
    return ""
