"""All worked examples of the course."""

from __future__ import annotations

from posttrain.lab.course import (
    worked,
    worked_algorithms,
    worked_challenges,
    worked_measured,
    worked_pairs,
    worked_reasoning,
    worked_rewards,
    worked_search,
)
from posttrain.lab.course.working import Example

EXAMPLES: dict[str, Example] = {
    **worked.EXAMPLES,
    **worked_rewards.EXAMPLES,
    **worked_algorithms.EXAMPLES,
    **worked_pairs.EXAMPLES,
    **worked_measured.EXAMPLES,
    **worked_reasoning.EXAMPLES,
    **worked_search.EXAMPLES,
    **worked_challenges.EXAMPLES,
}
"""Worked examples by the name that chapters use."""
