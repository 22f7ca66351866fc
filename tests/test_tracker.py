"""Trackers receive what is written to the run, after it is stored, and cannot end it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import posttrain as pt
from posttrain import api
from posttrain.store.run import Event, Run
from posttrain.store.tracker import open_trackers
from posttrain.types import ConfigError
from tests import tiny


class Memory:
    """A tracker that remembers."""

    def __init__(self, fail_at: int = -1, fail_to_close: bool = False) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.fail_at, self.fail_to_close, self.closed = fail_at, fail_to_close, 0

    def write(self, step: int, metrics: Any, timings: Any, episodes: Any, events: Any) -> None:
        if step == self.fail_at:
            raise OSError("the server is gone")
        self.steps.append((step, {**metrics, **timings}))

    def close(self) -> None:
        self.closed += 1
        if self.fail_to_close:
            raise OSError("the server is gone")


@pytest.fixture
def remember(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Memory]:
    def made(**settings: Any) -> Memory:
        tracker, module = Memory(**settings), ModuleType("posttrain.store.trackers.memory")
        module.open = lambda run: tracker  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return tracker

    return made


def test_a_tracker_gets_every_step_once_it_is_stored(tmp_path: Path, remember: Callable[..., Memory]) -> None:
    tracker = remember()
    with Run.create(tmp_path / "run", {}) as run:
        with open_trackers("memory", run):
            run.write(0, {"a": 1.0}, {"seconds": 2.0})
            run.write(1, {"a": 3.0}, {})
        run.write(2, {"a": 4.0}, {})
    assert tracker.steps == [(0, {"a": 1.0, "seconds": 2.0}), (1, {"a": 3.0})] and tracker.closed == 1


def test_a_tracker_that_fails_is_noted_and_dropped(tmp_path: Path, remember: Callable[..., Memory]) -> None:
    tracker = remember(fail_at=1)
    with Run.create(tmp_path / "run", {}) as run:
        with open_trackers("memory", run):
            for step in range(3):
                run.write(step, {"a": float(step)}, {})
        assert [step for step, _ in tracker.steps] == [0] and run.last_step() == 2
        (note,) = run.events()
    assert (note.level, note.kind) == ("warning", "tracker")
    assert note.message == "run.track: memory failed and was turned off (OSError: the server is gone)."


def test_a_tracker_that_fails_to_close_is_noted_and_does_not_end_the_run(
    tmp_path: Path, remember: Callable[..., Memory]
) -> None:
    tracker = remember(fail_to_close=True)
    with Run.create(tmp_path / "run", {}) as run:
        with open_trackers("memory", run):
            run.write(0, {"a": 1.0}, {})
        (note,) = run.events()
    assert tracker.closed == 1 and (note.level, note.kind, note.step) == ("warning", "tracker", 0)
    assert note.message == "run.track: memory failed and was turned off (OSError: the server is gone)."


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="run.track='tensorbord' is not one of tensorboard"):
        pt.grpo(run__track="tensorbord")


def test_a_run_and_its_continuation_are_one_curve_in_tensorboard(tmp_path: Path) -> None:
    model = tiny.chatty(tmp_path / "model")
    small: dict[str, Any] = {
        "rollout__max_tokens": 6, "rollout__slots": 32, "prompts": 3, "group_size": 4, "problems": 4, "count": 32,
    }  # fmt: skip

    def reward(completion: str) -> float:
        return len(completion) % 3 / 2

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pt.grpo(str(model), "sums", reward, out, stop, steps=4, run__track="tensorboard", checkpoint_every=1, **small)
    assert api.resume(out, reward).summary is not None
    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    with Run.read(out) as run:
        steps, values = run.curve("reward")
    curve = {event.step: event.value for event in found.Scalars("reward")}
    assert sorted(curve) == steps and len(found.Scalars("reward")) >= len(steps)
    assert all(math.isclose(curve[step], value, rel_tol=1e-6) for step, value in zip(steps, values, strict=True))


def test_without_tensorboard_the_setting_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Run.create(tmp_path / "run", {}) as run:
        run.write(0, {"a": 1.0}, {}, events=[Event("info", "data", "told")])
        with pytest.raises(ConfigError, match="posttrain\\[tensorboard\\]"), open_trackers("tensorboard", run):
            pass
