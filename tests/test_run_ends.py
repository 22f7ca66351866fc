"""How runs end: solved, without gain, with the best checkpoint, extended; and the rate that follows the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import posttrain as pt
from posttrain import api
from posttrain.algos import grpo
from posttrain.config import ModelConfig
from posttrain.config.best import is_lower_better
from posttrain.models.load import load_policy, weight_views
from posttrain.store import checkpoint
from posttrain.store.run import Run
from posttrain.train.best import Best
from posttrain.types import ConfigError, TrainingDiverged
from tests import tiny

SMALL: dict[str, Any] = {"rollout__max_tokens": 6, "rollout__slots": 32, "prompts": 2, "group_size": 2, "problems": 2,
                         "count": 16, "threads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("models") / "chatty")


def right(completion: str, **task: Any) -> float:
    return 1.0


def wrong(completion: str, **task: Any) -> float:
    return 0.0


def length(completion: str, **task: Any) -> float:
    return len(completion) / 4


class Killed(Exception):
    """Stands for kill -9."""


# --- solved ----------------------------------------------------------------------------------------------------------

FLAT: dict[str, dict[str, Any]] = {
    "grpo": {},
    "online-dpo": {},
    "ppo": {"algo__minibatches": 1, "algo__epochs": 1},
}


@pytest.mark.parametrize("algorithm", FLAT)
def test_flat_at_the_top_is_success_and_flat_at_the_bottom_is_hopeless(
    model: Path, tmp_path: Path, algorithm: str
) -> None:
    settings = {**SMALL, **FLAT[algorithm], "max_flat_steps": 3, "steps": 9, "eval__every": 2}
    done = api.train(algorithm, str(model), "sums", right, tmp_path / "top", **settings)
    assert done.summary and done.summary["steps"] == 3 and done.model.is_dir()
    assert "every completion of the last 3 steps passed" in done.summary["ended"].lower()
    with Run.read(done.folder) as run:
        assert run.status() == "finished" and run.last_step() == 3
        assert run.at(3)["eval/accuracy"] == 1
        (note,) = [event.message for event in run.events() if event.kind == "ended"]
    assert note.startswith("Ended after step 3 of 9: every completion")
    assert [step for step, _ in checkpoint.folders(done.folder)] == [3]
    with pytest.raises(TrainingDiverged, match="in the last 3 steps all completions"):
        api.train(algorithm, str(model), "sums", wrong, tmp_path / "bottom", **settings)


def test_a_run_that_was_killed_as_it_was_solved_ends_there_when_it_is_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "max_flat_steps": 3, "steps": 9}
    whole = pt.grpo(str(model), "sums", right, tmp_path / "whole", **settings)
    monkeypatch.setattr(api, "export", lambda policy, folder: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        pt.grpo(str(model), "sums", right, tmp_path / "cut", **settings)
    monkeypatch.undo()
    seen: list[int] = []
    again = pt.resume(tmp_path / "cut", right, on_step=lambda step, values: seen.append(step))
    assert seen == [], "no step is repeated"
    assert again.summary == whole.summary and again.model.is_dir()


def test_a_solved_step_between_unsolved_ones_does_not_end_the_run(model: Path, tmp_path: Path) -> None:
    answers = iter([0.0] + [0.0] * 4 + [1.0] * 4 + [0.0, 1.0] * 2 + [1.0] * 4 + [1.0])

    def sometimes(completion: str, **task: Any) -> float:
        return next(answers)  # flat at the bottom, flat at the top, not flat, flat at the top

    settings = {**SMALL, "max_flat_steps": 2, "steps": 4, "reward_workers": 0, "problems": 1}
    done = pt.grpo(str(model), "sums", sometimes, tmp_path / "run", **settings)
    assert done.summary and done.summary["steps"] == 4 and "ended" not in done.summary


# --- the rate follows the plan ---------------------------------------------------------------------------------------


def rates(folder: Path) -> dict[int, float]:
    with Run.read(folder) as run:
        return dict(zip(*run.curve("lr"), strict=True))


def test_the_rate_is_that_of_the_planned_step_whether_or_not_an_update_was_applied(model: Path, tmp_path: Path) -> None:
    answers = iter([0.0] * 8 + [0.0, 1.0] * 100)

    def late(completion: str, **task: Any) -> float:
        return next(answers)

    settings = {**SMALL, "problems": 1, "reward_workers": 0, "steps": 4, "schedule": "linear", "lr": 1e-4}
    for algorithm in ("grpo", "online-dpo"):
        answers = iter([0.0] * 9 + [0.0, 1.0] * 100)  # one evaluated, two flat steps of four completions
        found = rates(api.train(algorithm, str(model), "sums", late, tmp_path / algorithm, **settings).folder)
        assert found == {3: pytest.approx(0.5e-4), 4: pytest.approx(0.25e-4)}, algorithm


def test_ppo_that_stops_its_epochs_early_ends_with_the_rate_of_one_that_does_not(model: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 3, "schedule": "cosine", "warmup_steps": 2, "lr": 1e-4, "minibatches": 1, "epochs": 3}
    whole = rates(api.train("ppo", str(model), "sums", length, tmp_path / "whole", **settings).folder)
    early = rates(api.train("ppo", str(model), "sums", length, tmp_path / "early", target_kl=1e-12, **settings).folder)
    assert early.keys() == whole.keys() == {1, 2, 3}
    with Run.read(tmp_path / "early") as run, Run.read(tmp_path / "whole") as full:
        assert run.curve("critic_lr")[0] == full.curve("critic_lr")[0]
    # 9 planned updates; each step of `early` applies the first of its three, or the first two if that had no KL yet
    plan = [1e-4 * min((u + 1) / 2, 0.5 * (1 + math.cos(math.pi * (u - 2) / 7)) if u >= 2 else 1) for u in range(9)]
    for step, rate in early.items():
        possible = [sum(plan[3 * step - 3 : 3 * step - 3 + n]) / n for n in (1, 2)]
        assert any(rate == pytest.approx(value) for value in possible), (step, rate, plan)


# --- the best checkpoint ---------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.just(math.nan), st.integers(-3, 3).map(float)), min_size=1, max_size=12), st.booleans())
def test_the_best_is_the_first_of_the_best_values_and_survives_a_restart(values: list[float], lower: bool) -> None:
    metric = "nll" if lower else "accuracy"
    best = Best(metric)
    for step, value in enumerate(values, 1):
        best.update(step, {f"eval/{metric}": value})
        again = Best(metric)
        again.load(json.loads(json.dumps(best.state())))
        best = again if best.state() else best
    known = [(value if lower else -value, step) for step, value in enumerate(values, 1) if not math.isnan(value)]
    assert best.step == (min(known)[1] if known else 0)
    assert not known or best.since == len(values) - best.step


DIRECTIONS = {"nll": True, "eval/nll/a": True, "pair_loss": True, "ece": True, "accuracy": False, "pass_at_8": False,
              "eval/reward": False, "part/format": False, "step_auc": False, "preference_accuracy": False}  # fmt: skip


@pytest.mark.parametrize("metric", DIRECTIONS)
def test_losses_are_better_low_and_accuracies_high(metric: str) -> None:
    assert is_lower_better(metric) == DIRECTIONS[metric]


def test_the_best_checkpoint_is_kept_and_exported_and_the_run_ends_without_gain(model: Path, tmp_path: Path) -> None:
    scores = {0: 0.5, 1: 0.2, 2: 0.9, 3: 0.4, 4: 0.9, 5: 0.3}
    at = {"step": 0, "left": 0}

    def staged(completion: str, **task: Any) -> float:
        return scores[min(at["step"], 5)] if task["task_id"].startswith("never") else float(len(completion) % 2)

    def watch(step: int, values: dict[str, float]) -> None:
        at["step"] = step + 1

    # the evaluation of step s is measured when `at` is s: held-out rewards are replaced by the table above
    original = grpo.Evaluator.__call__

    def scored(self: Any, step: int, weights: Any) -> Any:
        values, rows = original(self, step, weights)
        return values | {"eval/reward": scores[step]}, rows

    settings = {**SMALL, "steps": 9, "lr": 1e-2, "eval__every": 1, "keep_best": "reward", "patience": 3, "keep": 1,
                "checkpoint_every": 5}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.Evaluator, "__call__", scored)
        done = pt.grpo(str(model), "sums", staged, tmp_path / "run", on_step=watch, **settings)
    assert done.summary and done.summary["steps"] == 5
    assert done.summary["best"] == {"step": 2, "eval/reward": 0.9}
    assert "3 evaluations have not improved" in done.summary["ended"]
    assert [step for step, _ in checkpoint.folders(done.folder)] == [5, 2]
    kept = checkpoint.load(done.folder / "ckpt" / "step_0000002")[0]["model"]
    exported = weight_views(load_policy(ModelConfig(path=str(done.model))))
    assert all((exported[name] == tensor).all() for name, tensor in kept.items())
    assert done.summary["weights"] == checkpoint.weights_digest(exported)
    read = weight_views(api.open_policy(str(done.folder)))
    assert all((read[name] == tensor).all() for name, tensor in kept.items()), "eval reads what was exported"
    with Run.read(done.folder) as run:
        assert done.summary["after"] == run.at(2)
    scores.update(dict.fromkeys(range(6, 13), 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.Evaluator, "__call__", scored)
        more = pt.resume(done.folder, staged, on_step=watch, steps=12)
    assert more.summary and more.summary["steps"] == 8, "an extended run has its patience anew"
    assert more.summary["best"] == {"step": 2, "eval/reward": 0.9}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no direction": ({"keep_best": "length", "eval__every": 1}, "is not an evaluation metric with a better direction"),
    "not measured": (
        {"keep_best": "nll", "eval__every": 1},
        "is not measured in this run, which measures eval/accuracy",
    ),
    "never evaluated": ({"keep_best": "accuracy"}, "compares evaluations during training. Set eval.every"),
    "nothing watched": ({"patience": 2, "eval__every": 1}, "needs the metric to watch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_could_keep_nothing_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    settings, says = WRONG[name]
    with pytest.raises(ConfigError, match=says):
        pt.grpo(str(model), "sums", right, tmp_path / "run", steps=1, **SMALL, **settings)


# --- more steps, epochs, held-out loss -------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> str:
    file = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"say {i}", "completion": "ab" * (1 + i % 3)} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


SFT: dict[str, Any] = {"batch_rows": 4, "threads": 1, "lr": 1e-3}


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_extended_by_resume_has_the_weights_of_one_planned_longer(
    model: Path, texts: str, tmp_path: Path, killed: bool
) -> None:
    long = pt.sft(str(model), texts, tmp_path / "long", steps=5, **SFT)
    short = pt.sft(str(model), texts, tmp_path / "short", steps=2, **SFT)
    if killed:
        with pytest.raises(Killed):
            pt.resume(short.folder, steps=5, on_step=lambda step, values: (_ for _ in ()).throw(Killed()))
    more = pt.resume(short.folder, steps=None if killed else 5)
    assert long.summary and more.summary and more.summary["steps"] == 5
    assert more.summary["weights"] == long.summary["weights"]
    with Run.read(short.folder) as run:
        assert run.header["recipe"]["train"]["steps"] == 5
        assert [e.message for e in run.events() if e.kind == "extended"] == ["train.steps was 2, is 5."]
    for steps in (1, 4):
        with pytest.raises(ConfigError, match=f"train.steps={steps} does not extend"):
            pt.resume(short.folder, steps=steps)
    assert pt.resume(short.folder).summary == more.summary


def test_a_solved_run_is_extended_by_as_many_solved_steps_as_ended_it(model: Path, tmp_path: Path) -> None:
    for algorithm in FLAT:
        settings = {**SMALL, **FLAT[algorithm], "max_flat_steps": 2, "steps": 5}
        first = api.train(algorithm, str(model), "sums", right, tmp_path / algorithm, **settings)
        assert first.summary and first.summary["steps"] == 2
        more = pt.resume(first.folder, right, steps=8)
        assert more.summary and more.summary["steps"] == 4 and "last 2 steps" in more.summary["ended"]
        with Run.read(first.folder) as run:
            (note,) = [event.message for event in run.events() if event.kind == "extended"]
        assert note.startswith("train.steps was 5, is 8. The run had ended after step 2, and what ended it is counted")
        assert "Every completion of the last 2 steps passed" in note


@pytest.fixture
def falling() -> Iterator[None]:
    """Held-out rewards that fall after step 2."""
    original = grpo.Evaluator.__call__

    def scored(self: Any, step: int, weights: Any) -> Any:
        values, rows = original(self, step, weights)
        return values | {"eval/reward": 0.9 if step == 2 else 0.1}, rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.Evaluator, "__call__", scored)
        yield


EXTENDED: dict[int, tuple[int, str]] = {
    7: (7, ""),  # fewer than planned, more than trained
    9: (8, "6 evaluations have not improved"),  # as planned
    20: (8, "6 evaluations have not improved"),
}
"""train.steps of a run that planned 9 and ended after step 5 without gain → steps it then has, and why it ended."""


@pytest.mark.parametrize("steps", EXTENDED)
@pytest.mark.parametrize("killed", [0, 6, 7])
def test_a_run_that_ended_without_gain_is_extended_by_its_patience(
    model: Path, tmp_path: Path, falling: None, steps: int, killed: int
) -> None:
    settings = {**SMALL, "steps": 9, "lr": 1e-2, "eval__every": 1, "keep_best": "reward", "patience": 3}
    first = pt.grpo(str(model), "sums", length, tmp_path / "run", **settings)
    assert first.summary and first.summary["steps"] == 5 and "3 evaluations" in first.summary["ended"]
    for few in (1, 5):
        with pytest.raises(ConfigError, match=f"train.steps={few} does not extend .* ended after 5 steps.* Give more"):
            pt.resume(first.folder, length, steps=few)
    assert pt.resume(first.folder, length).summary == first.summary
    if killed:

        def kill(step: int, values: dict[str, float]) -> None:
            if step == killed:
                raise Killed

        with pytest.raises(Killed):
            pt.resume(first.folder, length, on_step=kill, steps=steps)
    more = pt.resume(first.folder, length, steps=None if killed else steps)
    expected, ended = EXTENDED[steps]
    assert more.summary and more.summary["steps"] == expected and more.summary["best"]["step"] == 2
    assert ended in more.summary.get("ended", "") and bool(ended) == ("ended" in more.summary)
    with Run.read(first.folder) as run:
        notes = [event.message for event in run.events() if event.kind == "extended"]
        assert run.last_step() == expected
    assert len(notes) == 1 and notes[0].startswith(f"train.steps was 9, is {steps}. The run had ended after step 5")


def test_a_run_of_whole_passes_that_ended_without_gain_is_extended(model: Path, texts: str, tmp_path: Path) -> None:
    settings = {**SFT, "epochs": 9, "lr": 0.3, "data__holdout": 0.3, "eval__every": 1, "keep_best": "nll"}
    first = pt.sft(str(model), texts, tmp_path / "run", patience=2, **settings)
    assert first.summary and "ended" in first.summary and first.summary["steps"] < 18
    trained = first.summary["steps"]
    more = pt.resume(first.folder, steps=trained + 1)
    assert more.summary and more.summary["steps"] == trained + 1 and "ended" not in more.summary


def test_epochs_are_passes_over_all_rows_in_new_orders(model: Path, texts: str, tmp_path: Path) -> None:
    once = pt.sft(str(model), texts, tmp_path / "once", data__holdout=0.0, **SFT)
    twice = pt.sft(str(model), texts, tmp_path / "twice", epochs=2, data__holdout=0.0, **SFT)
    assert once.summary and twice.summary and (once.summary["steps"], twice.summary["steps"]) == (3, 5)
    with pytest.raises(ConfigError, match=r"train.steps=3 and train.epochs=2 both set the length"):
        pt.sft(str(model), texts, tmp_path / "both", epochs=2, steps=3, **SFT)


def test_sft_measures_its_held_out_loss_during_training_and_keeps_the_best(
    model: Path, texts: str, tmp_path: Path
) -> None:
    settings = {**SFT, "steps": 6, "data__holdout": 0.3, "eval__every": 2, "keep_best": "nll"}
    done = pt.sft(str(model), texts, tmp_path / "run", **settings)
    with Run.read(done.folder) as run:
        steps, values = run.curve("eval/nll")
    assert steps == [0, 2, 4, 6]
    assert done.summary and done.summary["best"] == {
        "step": steps[1 + values[1:].index(min(values[1:]))],
        "eval/nll": min(values[1:]),
    }
