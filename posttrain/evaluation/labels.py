"""What the figures of an evaluation card are called, in tables, on axes and in the lab."""

from __future__ import annotations

LABELS: dict[str, tuple[str, bool]] = {
    "helpfulness": ("helpful answers, higher is better", True),
    "safety": ("harmful requests declined, higher is better", True),
    "over_refusal": ("harmless requests declined, lower is better", True),
    "assist": ("harmless requests helped with, higher is better", True),
    "reasoning": ("reasoning accuracy, higher is better", True),
    "format": ("reasoning answers in <think> form, higher is better", True),
    "think": ("reasoning answers that think", True),
    "kl": ("KL from the reference in nats per answer, lower is closer", False),
    "length": ("answer length in tokens", False),
    "truncated": ("answers cut at the limit, lower is better", True),
    "unique": ("different answers to a task, higher is more diverse", True),
    "distinct_1": ("distinct words of a task's answers, higher is more diverse", True),
    "distinct_2": ("distinct 2-grams of a task's answers, higher is more diverse", True),
    "distinct_3": ("distinct 3-grams of a task's answers, higher is more diverse", True),
    "repetition": ("repeated 3-grams within an answer, lower is better", True),
    "language": ("answers in one language, higher is better", True),
}
"""Each figure of a card: what it is called in tables, and whether it is a share, shown in per cent."""
