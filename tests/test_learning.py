"""RLOO, PPO and DPO make the shipped model clearly better at what they train, in seconds; full runs are recipes.

GRPO's own is in test_real_models.py, with what else it changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain import api, config

SMALL: dict[str, Any] = {
    "data.tasks": "arithmetic",
    "data.count": 512,
    "rollout.max_tokens": 64,
    "rollout.slots": 128,
    "eval.problems": 112,
    "train.threads": 1,
    "train.lr": 3e-4,
}
ON_POLICY = {**SMALL, "algo.prompts": 16, "algo.group_size": 8, "train.steps": 6}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "rloo": ("grpo", {**ON_POLICY, "algo.preset": "rloo"}),
    "ppo": ("ppo", {**ON_POLICY, "algo.prompts": 128, "algo.group_size": 1, "algo.critic_lr": 1e-3}),
    "dpo": ("dpo", {**SMALL, "data.count": 128, "pairs.samples": 8, "train.lr": 1e-4}),
}


@pytest.mark.parametrize("name", RUNS)
def test_held_out_accuracy_rises_beyond_both_intervals(name: str, tmp_path: Path) -> None:
    algorithm, settings = RUNS[name]
    result = api.start(algorithm, config.resolve(algorithm, {}, {**settings, "run.out": str(tmp_path / "run")}))
    assert result.summary
    before, after = result.summary["before"], result.summary["after"]
    assert after["eval/accuracy_low"] > before["eval/accuracy_high"], (before, after)
