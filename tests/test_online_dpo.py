"""Online DPO: which answers of a group become a pair, what a step computes, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain import api, config
from posttrain.algos.online_dpo import best_and_worst, make_loss, pair_roles, pair_samples, policy_kl
from posttrain.config.online_dpo import OnlineDPOConfig
from posttrain.data import batching
from posttrain.objectives.preference import PAIR_LOSSES
from posttrain.rollout.collector import with_logp
from posttrain.store.run import Run
from posttrain.types import ConfigError, Episode, Message, Sample, Span, Task, TrainingDiverged
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model"))


def episode(index: int, reward: float | None, group: int = 0, logp: float = -1.0, length: int = 2) -> Episode:
    answer = Span("model", np.arange(3, 3 + length), np.full(length, logp, np.float32))
    return Episode("t", group, index, (Span("prompt", np.array([1, 2])), answer), "x", reward)


def filled(samples: list[Sample], ref: float) -> list[Sample]:
    return with_logp(samples, "ref_logp", lambda rows: [np.where(r.loss_mask, np.float32(ref), 0) for r in rows])


def settings(**more: Any) -> dict[str, Any]:
    shared = {"train.threads": 1, "train.steps": 2, "data.tasks": "addition", "rollout.max_tokens": 6}
    small = {"rollout.slots": 32, "algo.prompts": 4, "algo.group_size": 4, "eval.problems": 4}
    return {**shared, **small, **{name.replace("__", "."): value for name, value in more.items()}}


def start(model: Path, out: Path, reward: Any, given: list[Task] | None = None, **more: Any) -> api.Result:
    named = {"model.path": str(model), "run.out": str(out)}
    return api.start("online-dpo", config.resolve("online-dpo", {}, {**settings(**more), **named}), None, given, reward)


def letters(completion: str) -> float:
    return float(sum(c.isascii() and c.isalpha() for c in completion))


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_the_best_and_the_worst_of_a_group_are_the_pair_the_first_written_of_equals() -> None:
    group = [episode(i, r) for i, r in enumerate((0.5, 0.0, 1.0, 0.0, 1.0))]
    ((best, worst),) = best_and_worst([group])
    assert (best.index, worst.index) == (2, 1)


def test_a_group_of_equal_rewards_gives_no_pair_and_unscored_answers_are_in_none() -> None:
    groups = [
        [episode(0, 1.0), episode(1, 1.0)],
        [episode(0, None), episode(1, 0.0), episode(2, 1.0)],
        [episode(0, None), episode(1, 1.0)],
        [episode(0, None), episode(1, None)],
    ]
    assert [(b.index, w.index) for b, w in best_and_worst(groups)] == [(2, 1)]


def test_a_pair_trains_exactly_the_tokens_that_were_sampled() -> None:
    rows = pair_samples([(episode(0, 1.0, length=3), episode(1, 0.25))])
    assert [r.tokens.tolist() for r in rows] == [[1, 2, 3, 4, 5], [1, 2, 3, 4]]
    assert [r.loss_mask.tolist() for r in rows] == [[False, False, True, True, True], [False, False, True, True]]
    assert [(r.label, r.margin) for r in rows] == [(1.0, 0.75), (0.0, 0.75)]


def test_the_roles_of_a_steps_answers_are_stored() -> None:
    groups = [[episode(0, 0.0), episode(1, 1.0)], [episode(0, 1.0, 1), episode(1, 1.0, 1)]]
    assert pair_roles(groups, best_and_worst(groups)).tolist() == [[-1.0, 1.0], [0.0, 0.0]]


# --- the loss -------------------------------------------------------------------------------------------------------


def loss_of(cfg: OnlineDPOConfig, rows: list[Sample], logp: list[float]) -> tuple[float, dict[str, float]]:
    (batch,) = batching.micro(rows, 1000, "seq-mean-token-sum", together=2)
    per_token = torch.tensor(logp).unsqueeze(1) * batch.mask
    value, stats = make_loss(cfg)(per_token, torch.zeros_like(per_token), batch)
    return value.item(), {name: stat.value for name, stat in stats.items()}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        # two tokens each at −0.5 and −1 under the policy, −0.75 under the reference: h = 0.5 − (−0.5) = 1, β = 0.5
        ({}, math.log1p(math.exp(-0.5))),
        ({"label_smoothing": 0.1}, math.log1p(math.exp(-0.5)) + 0.1 * 0.5),
        ({"length_normalise": True}, math.log1p(math.exp(-0.25))),
        ({"margin_coef": 0.5}, math.log(2)),  # rewards 1 and 0
        ({"loss": "hinge"}, 0.5),
        ({"loss": "ipo"}, 0.0),
    ],
)
def test_the_loss_of_a_pair_is_what_a_hand_computes(more: dict[str, Any], expected: float) -> None:
    rows = filled(pair_samples([(episode(0, 1.0), episode(1, 0.0))]), -0.75)
    value, stats = loss_of(OnlineDPOConfig(beta=0.5, **more), rows, [-0.5, -1.0])
    assert value == pytest.approx(expected, abs=1e-6)
    assert stats["preference_accuracy"] == 1.0 and stats["mismatch"] == pytest.approx(0.5)


def test_pairs_weigh_the_same_whatever_their_lengths_and_however_many_groups_gave_none() -> None:
    cfg = OnlineDPOConfig(beta=0.5)
    short = filled(pair_samples([(episode(0, 1.0, length=1), episode(1, 0.0, length=1))]), -0.75)
    long = filled(pair_samples([(episode(0, 1.0, length=5), episode(1, 0.0, length=5))]), -0.75)
    one, other = loss_of(cfg, short, [-0.5, -1.0])[0], loss_of(cfg, long, [-0.5, -1.0])[0]
    both = loss_of(cfg, [*short, *long], [-0.5, -1.0, -0.5, -1.0])
    assert both[0] == pytest.approx((one + other) / 2) and one != pytest.approx(other)


def test_the_kl_is_of_whole_answers_as_the_sampler_saw_them() -> None:
    rows = filled(pair_samples([(episode(0, 1.0, logp=-0.5, length=4), episode(1, 0.0, logp=-1.0))]), -0.75)
    assert policy_kl(rows).value == pytest.approx((4 * 0.25 + 2 * -0.25) / 2)


def test_the_losses_offered_are_those_with_a_reference() -> None:
    for name in ("sigmoid", "robust", "ipo", "hinge"):
        assert name in PAIR_LOSSES and config.resolve("online-dpo", {}, {"algo.loss": name})


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_the_reward_of_what_is_sampled_rises(model: Path, tmp_path: Path) -> None:
    more = {"train__steps": 15, "train__lr": 1e-2, "algo__prompts": 8, "algo__group_size": 8, "eval__problems": 20}
    result = start(model, tmp_path / "run", letters, eval__samples=8, **more)
    assert result.summary
    before, after = (result.summary[at]["eval/reward"] for at in ("before", "after"))
    assert after > 2 * before, f"mean letters in an answer went from {before:.2f} to {after:.2f}"
    with Run.read(result.folder) as run:
        assert run.curve("loss")[1][0] == pytest.approx(math.log(2), abs=1e-5), "the policy starts as its reference"
        assert max(run.curve("mismatch")[1]) < 1e-3
        assert {e.advantage for e in run.episodes("train", 1)} == {-1.0, 0.0, 1.0}


def test_with_adapters_the_reference_is_the_model_without_them(model: Path, tmp_path: Path) -> None:
    result = start(model, tmp_path / "run", letters, lora_rank=4, train__lr=3e-2)
    with Run.read(result.folder) as run:
        losses, kl = run.curve("loss")[1], run.curve("pair_kl")[1]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and abs(kl[0]) < 1e-3 < abs(kl[1])


def test_a_step_without_a_pair_changes_no_weight_and_many_stop_the_run(model: Path, tmp_path: Path) -> None:
    still = start(model, tmp_path / "still", lambda completion: 1.0)
    with Run.read(still.folder) as run:
        assert run.curve("flat_groups")[1] == [1.0, 1.0] and run.curve("pairs")[1] == [0.0, 0.0]
        assert not run.curve("grad_norm")[1]
    with pytest.raises(TrainingDiverged, match=r"in the last 2 steps all completions of each task had equal rewards"):
        start(model, tmp_path / "stops", lambda completion: 0.5, train__steps=5, max_flat_steps=2)


def test_tasks_can_be_given_from_python(model: Path, tmp_path: Path) -> None:
    tasks = [Task(f"t{i}", "mine", (Message("user", f"q{i}"),), "") for i in range(6)]
    assert start(model, tmp_path / "run", letters, tasks, data__tasks="given from Python").summary


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("algo.group_size", 1, "gives no pair to compare. Set algo.group_size to 2 or more"),
        ("algo.beta", 0, r"algo\.beta=0\.0 must be positive"),
        ("algo.label_smoothing", 0.5, r"is not in \[0, 0\.5\)"),
        ("algo.loss", "simpo", "is not one of sigmoid, robust, ipo, hinge"),
        ("algo.margin_coef", -1, "cannot be negative"),
        ("rollout.temperature", 0, "makes all completions of a group equal"),
        ("eval.temperature", -1, "is negative; 0 is greedy"),
        ("algo.prompts", 0, "prompts=0 must be 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_a_sentence(name: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config.resolve("online-dpo", {}, {name: value})
