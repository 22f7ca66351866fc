"""What an algorithm declares about itself: the models it holds, what it samples, the passes it makes.

Each recipe class answers `facts()` from its own settings. The planner, the speed probe, the command line, the lab, the
documentation and the kill tests read the answer, so none of them has to know an algorithm by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Saving:
    """A setting of the algorithm that needs less memory, and what it costs."""

    setting: str
    value: Any
    cost: str


@dataclass(frozen=True)
class Facts:
    """What a run with these settings holds and computes. `tests/test_facts.py` checks each against real runs."""

    data: Literal["tasks", "conversations", "pairs", "solutions"] = "tasks"
    """What its rows are made from."""
    trains: Literal["policy", "scorer"] = "policy"
    """A language model, or a model with a scalar head that scores text (a reward model or verifier)."""

    reference: Literal["none", "frozen", "precomputed"] = "none"
    """Log-probabilities of the starting model: from a frozen copy (with LoRA: the policy without its adapters) in every
    step, or computed once before step 0."""
    critic: Literal["none", "separate", "shared"] = "none"
    """A value model of its own, or a value head on the policy."""
    teacher: bool = False
    """A frozen model that the policy imitates."""
    sampler_copy: bool = False
    """The sampler has weights of its own, older than the learner's."""
    starting_weights: bool = False
    """The starting weights are kept, to train from them again."""

    samples: Literal["never", "before training", "every step"] = "every step"
    """When completions are sampled to learn from."""
    prompts: int = 1
    """Tasks sampled in a step."""
    group_size: int = 1
    """Completions per task."""

    batch_rows: int = 1
    """Rows in one optimizer batch."""
    minibatches: int = 1
    """Optimizer batches in one epoch of a step."""
    epochs: int = 1
    """Passes over a step's rows."""
    shared_prompt: int = 1
    """Rows with the same prompt, which is computed once for all of them."""
    paired: bool = False
    """Rows 2i and 2i + 1 are two completions of one prompt and stay in one micro-batch."""
    scoring_passes: int = 0
    """Forward passes without gradient over a step's rows: reference, old log-probabilities, old values, teacher."""
    held_out_pass: bool = False
    """Evaluation runs forward passes over held-out rows."""
    max_tokens: int | None = None
    """Longest training row, prompt included; None: a prompt and a completion of `rollout.max_tokens`."""

    savings: tuple[Saving, ...] = ()
    """Settings of its own that need less memory."""

    @property
    def step_rows(self) -> int:
        """Rows of one step, each counted once."""
        return self.batch_rows * self.minibatches


def names_tasks(source: str) -> bool:
    """Whether `data.tasks` names built-in tasks rather than a file or data set, going by its spelling alone."""
    return not ("." in source or "/" in source)
