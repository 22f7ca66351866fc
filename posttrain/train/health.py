"""Signs that a step taught nothing, or that its rollouts were not the policy's: events, and reasons to stop."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.store.run import Event


def unscored(values: Mapping[str, float]) -> list[Event]:
    """A warning where completions could not be scored."""
    count = values["unscored"]
    return [Event("warning", "unscored", f"{count:.0f} completions could not be scored.")] if count else []


def repeated(kind: str, what: str, steps: int, least: int = 3) -> list[Event]:
    """A warning where the same has been the case for `least` steps in a row; `what` is a sentence with {steps}."""
    return [Event("warning", kind, what.format(steps=steps))] if steps >= least else []


def mismatch(values: Mapping[str, float], limit: float) -> str:
    """Why to stop where sampler and learner disagree about a token by more than `limit` nats; else nothing."""
    found = values.get("mismatch", 0.0)
    if found <= limit:
        return ""
    return (
        f"sampler and learner differ by {found:.3g} in a token's log-probability (allowed: algo.max_mismatch={limit}). "
        "The rollouts are not from this policy."
    )
