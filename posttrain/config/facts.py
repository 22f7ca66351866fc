"""Facts that an algorithm declares about itself: the models it holds, what it samples and its forward passes.

Each recipe class computes `facts()` from its settings. The planner, the speed probe, the command line, the lab, the
documentation and the kill tests use them, so none of them needs code for a particular algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Saving:
    """A setting of the algorithm that saves memory, and its cost."""

    setting: str
    value: Any
    cost: str


@dataclass(frozen=True)
class Facts:
    """What a run with these settings holds and computes. `tests/test_facts.py` checks each fact against real runs."""

    data: Literal["tasks", "conversations", "pairs", "solutions"] = "tasks"
    """Source of the training rows."""
    trains: Literal["policy", "scorer"] = "policy"
    """What is trained: a language model, or a model with a scalar head that scores text (reward model or verifier)."""

    reference: Literal["none", "frozen", "precomputed"] = "none"
    """Log-probabilities of the reference model: from a frozen copy in every step (with LoRA: the policy without its
    adapters), or computed once before step 0."""
    critic: Literal["none", "separate", "shared"] = "none"
    """A separate value model, or a value head on the policy."""
    teacher: bool = False
    """A frozen model that the policy imitates."""
    sampler_copies: int = 0
    """Copies of the weights that are older than the learner's: the sampler's own, and those that wait for it."""
    starting_weights: bool = False
    """The starting weights are kept, so that training can restart from them."""

    samples: Literal["never", "before training", "every step"] = "every step"
    """When training completions are sampled."""
    prompts: int = 1
    """Tasks sampled per step."""
    group_size: int = 1
    """Completions per task."""

    batch_rows: int = 1
    """Rows in one optimizer batch."""
    minibatches: int = 1
    """Optimizer batches in one epoch of a step."""
    epochs: int = 1
    """Passes over a step's rows."""
    shared_prompt: int = 1
    """Number of rows with the same prompt, which is computed once for all of them."""
    paired: bool = False
    """Rows 2i and 2i + 1 are two completions of one prompt and stay in one micro-batch."""
    scoring_passes: int = 0
    """Forward passes without gradient over a step's rows: reference, old log-probabilities, old values, teacher."""
    held_out_pass: bool = False
    """Evaluation runs forward passes over held-out rows."""
    max_tokens: int | None = None
    """Longest training row, prompt included; None: a prompt and a completion of `rollout.max_tokens`."""

    savings: tuple[Saving, ...] = ()
    """Settings of the algorithm that save memory."""

    @property
    def step_rows(self) -> int:
        """Rows of one step, each counted once."""
        return self.batch_rows * self.minibatches


def names_tasks(source: str) -> bool:
    """Whether `data.tasks` names built-in tasks rather than a file or hub dataset, judging by its spelling only."""
    return not ("." in source or "/" in source)
