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

CHANGES = (
    ("eval/accuracy", "held-out accuracy (sampled)", "{:.1%}"),
    ("eval/think_share", "share of answers that think", "{:.0%}"),
    ("eval/length", "mean answer length (tokens)", "{:.1f}"),
    ("eval/truncated", "truncated at max_tokens", "{:.1%}"),
    ("eval/nll", "held-out loss (nats per token)", "{:.4f}"),
    ("eval/preference_accuracy", "held-out preference accuracy", "{:.1%}"),
    ("eval/chosen_logp", "log-probability of held-out chosen answers", "{:.2f}"),
    ("eval/pair_accuracy", "held-out pair accuracy", "{:.1%}"),
    ("eval/score_gap", "mean score gap of held-out pairs", "{:.2f}"),
    ("eval/step_accuracy", "held-out step accuracy", "{:.1%}"),
    ("eval/step_auc", "AUC of step scores, right against wrong", "{:.1%}"),
    ("eval/first_step_auc", "the same, first steps only", "{:.1%}"),
    ("eval/middle_step_auc", "the same, neither first nor last steps", "{:.1%}"),
    ("eval/outcome_auc", "AUC of answer scores, right against wrong", "{:.1%}"),
    ("eval/first_mistake", "first mistake (or that there is none) found", "{:.1%}"),
    ("eval/ece", "expected calibration error", "{:.3f}"),
)
"""Rows of the before/after table: metric, label, format."""
