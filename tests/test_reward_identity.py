"""A run whose reward has changed since it started is not continued as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

import posttrain as pt
from posttrain.store.run import Run
from posttrain.types import ResumeError
from tests import tiny


def test_a_changed_reward_file_is_noticed_when_the_run_is_resumed(tmp_path: Path) -> None:
    model = tiny.chatty(tmp_path / "model")
    reward = tmp_path / "mine.py"
    reward.write_text("def score(completion, **task):\n    return float(len(completion) % 3)\n")
    small = {"rollout__max_tokens": 8, "slots": 32, "prompts": 2, "group_size": 2, "problems": 2, "threads": 1}
    out = tmp_path / "run"

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pt.grpo(str(model), "addition", f"{reward}:score", out, stop, steps=2, checkpoint_every=1, **small)
    reward.write_text("def score(completion, **task):\n    return 1.0\n")
    with pytest.raises(ResumeError, match="the tasks or the reward of .* have changed"):
        pt.resume(out)
    reward.write_text("def score(completion, **task):\n    return float(len(completion) % 3)\n")
    assert pt.resume(out).summary
    with Run.read(out) as run:
        assert run.status() == "finished"
