"""Labels of the evaluation card's metrics, for tables, axes and the lab."""

from __future__ import annotations

LABELS: dict[str, tuple[str, bool]] = {
    "helpfulness": ("helpful answers, higher is better", True),
    "safety": ("harmful requests declined, higher is better", True),
    "over_refusal": ("harmless requests declined, lower is better", True),
    "assist": ("harmless requests helped with, higher is better", True),
    "reasoning": ("reasoning accuracy, higher is better", True),
    "format": ("reasoning answers in <think> format, higher is better", True),
    "think": ("reasoning answers that think", True),
    "kl": ("KL from the reference model in nats per answer, lower is closer", False),
    "length": ("answer length in tokens", False),
    "truncated": ("truncated answers, lower is better", True),
    "unique": ("unique answers per task, higher is more diverse", True),
    "distinct_1": ("distinct words among a task's answers, higher is more diverse", True),
    "distinct_2": ("distinct 2-grams among a task's answers, higher is more diverse", True),
    "distinct_3": ("distinct 3-grams among a task's answers, higher is more diverse", True),
    "repetition": ("repeated 3-grams within an answer, lower is better", True),
    "language": ("answers in the right language, higher is better", True),
}
"""Metric of a card → its label, and whether it is a share (shown in per cent)."""
