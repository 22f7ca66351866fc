"""Learning from one's own best answers: what is selected, what is trained, when it restarts and when it stops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain import api, config, rng
from posttrain.algos import raft
from posttrain.config import PRESETS
from posttrain.config.raft import RaftConfig
from posttrain.data import batching
from posttrain.store import checkpoint
from posttrain.store.run import Run
from posttrain.train.learners.local import LocalLearner
from posttrain.types import ConfigError, Episode, Sample, Span, TrainingDiverged
from tests import tiny


def episode(index: int, reward: float | None, text: str = "", passed: bool = False) -> Episode:
    spans = (Span("prompt", np.arange(3)), Span("model", np.arange(2), np.zeros(2, np.float32)))
    return Episode("t", 0, index, spans, text or f"answer {index}", reward, passed)


GROUP = [
    episode(0, 0.2, passed=True),
    episode(1, None),
    episode(2, 0.9),
    episode(3, 0.9, "answer 2"),
    episode(4, 0.5, passed=True),
    episode(5, -1.0),
]


def chosen(seed: int = 0, **settings: Any) -> list[int]:
    return [e.index for e in raft.choose(GROUP, RaftConfig(**settings), seed)]


# --- what is selected -----------------------------------------------------------------------------------------------


def test_the_best_answers_come_first_and_equal_texts_count_once() -> None:
    for seed in range(20):
        first, second, third = chosen(seed, select="best", max_per_task=3)
        assert first in (2, 3) and (second, third) == (4, 0)
    assert {chosen(seed, select="best")[0] for seed in range(20)} == {2, 3}, "a tie is settled by the seed"


def test_passed_and_threshold_take_what_is_eligible_and_a_surplus_is_drawn_by_the_seed() -> None:
    assert sorted(chosen(select="passed", max_per_task=6)) == [0, 4]
    assert sorted(chosen(select="threshold", threshold=0.5, max_per_task=6)) in ([2, 4], [3, 4])
    assert {chosen(seed, select="passed")[0] for seed in range(20)} == {0, 4}
    assert chosen(select="threshold", threshold=2.0) == []
    assert all(chosen(s, select="passed") == chosen(s, select="passed") for s in range(5))


def test_an_answer_that_could_not_be_scored_is_never_selected() -> None:
    assert 1 not in chosen(select="best", max_per_task=6)
    assert raft.choose([episode(0, None)], RaftConfig(), 0) == []


def test_how_far_selection_moves_the_policy_by_hand() -> None:
    groups = [[episode(i, float(i == 0), passed=i == 0) for i in range(4)], [episode(i, 0.0) for i in range(4)]]

    def stats(**settings: Any) -> dict[str, float]:
        cfg = RaftConfig(**settings)
        found = raft.selection_stats(groups, [raft.choose(g, cfg, 0) for g in groups], cfg)
        return {name: stat.value for name, stat in found.items()}

    best = stats(select="best")
    assert best["selection_kl"] == pytest.approx(math.log(4) - 3 / 4), "the best of four"
    assert (best["selected_share"], best["selected_per_task"], best["reward_selected"]) == (0.25, 1.0, 0.5)
    assert stats(select="best", max_per_task=2)["selection_kl"] == pytest.approx(math.log(4 / 2))
    passed = stats(select="passed")
    assert passed["selection_kl"] == pytest.approx(math.log(4)), "conditioning on what happens one time in four"
    assert (passed["selected_share"], passed["selected_per_task"], passed["reward_selected"]) == (1 / 8, 0.5, 1.0)
    nothing = stats(select="threshold", threshold=9.0)
    assert nothing == {"selected_share": 0.0, "selected_per_task": 0.0}


# --- the pool -------------------------------------------------------------------------------------------------------


def row(*tokens: int) -> Sample:
    mask = np.arange(len(tokens)) >= 2
    return Sample(np.array(tokens), mask, np.zeros(len(tokens), np.float32), mask.astype(np.float32))


def test_a_pool_keeps_each_row_once_and_survives_a_checkpoint() -> None:
    pool = raft.joined([row(1, 2, 3)], [row(1, 2, 3), row(1, 2, 3, 4), row(1, 2, 5)])
    assert [s.tokens.tolist() for s in pool] == [[1, 2, 3], [1, 2, 3, 4], [1, 2, 5]]
    again = raft.unpack(raft.pack(pool))
    for a, b in zip(pool, again, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()
        assert a.advantages.tolist() == b.advantages.tolist()


# --- whole runs -----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "data.tasks": "sums",
    "data.count": 8,
    "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
    "rollout.max_tokens": 8,
    "algo.prompts": 8,
    "algo.group_size": 8,
    "algo.batch_rows": 4,
    "eval.problems": 2,
    "train.steps": 2,
    "train.lr": 1e-2,
    "train.threads": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model"))


def start(model: Path, out: Path, **settings: Any) -> api.Result:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return api.start(
        "raft", config.resolve("raft", {}, {**SMALL, "model.path": str(model), "run.out": str(out), **named})
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.latest(out)
    assert saved is not None
    return checkpoint.load(saved)[0]["model"]


def test_a_model_learns_from_its_best_answers(model: Path, tmp_path: Path) -> None:
    start(model, tmp_path / "run", train__steps=5)
    with Run.read(tmp_path / "run") as run:
        reward, selected = run.curve("reward")[1], run.curve("reward_selected")[1]
    assert np.mean(reward[-2:]) > 1.5 * reward[0] and all(s > r for r, s in zip(reward, selected, strict=True))


def test_what_is_trained_are_the_selected_answers_tokens_as_they_were_sampled(model: Path, tmp_path: Path) -> None:
    start(model, tmp_path / "run", algo__pool="all")
    with Run.read(tmp_path / "run") as run:
        sampled = [e for step in (1, 2) for e in run.episodes("train", step)]
    kept = [(e.tokens.tolist(), e.loss_mask.tolist()) for e in sampled if e.advantage]
    saved = checkpoint.latest(tmp_path / "run")
    assert saved is not None and {e.advantage for e in sampled} == {0.0, 1.0}
    pool = [(s.tokens.tolist(), s.loss_mask.tolist()) for s in raft.unpack(checkpoint.load(saved)[0]["pool"])]
    assert len(kept) == 16 and pool == [r for i, r in enumerate(kept) if r not in kept[:i]]


def test_with_restart_a_round_is_fine_tuning_of_the_starting_model_on_its_pool(model: Path, tmp_path: Path) -> None:
    settings = {"algo__pool": "all", "algo__epochs": 2, "train__schedule": "cosine"}
    start(model, tmp_path / "run", algo__restart=True, **settings)
    saved = checkpoint.latest(tmp_path / "run")
    assert saved is not None
    tensors, _ = checkpoint.load(saved)
    pool = raft.unpack(tensors["pool"])
    updates = 2 * math.ceil(len(pool) / 4)
    policy = tiny.load(model)
    learner = LocalLearner(policy, config.TrainConfig(lr=1e-2, schedule="cosine"), updates)
    for epoch in range(2):
        order = rng.permutation(len(pool), 0, "epoch", 1, epoch)
        for i in range(0, len(pool), 4):
            (batch,) = batching.micro([pool[j] for j in order[i : i + 4]], 10_000, "token-mean")
            learner.forward_backward([batch], raft.loss)
            learner.step()
    assert learner.steps == updates
    for name, found in learner.weights().items():
        torch.testing.assert_close(found, tensors["model"][name], atol=1e-6, rtol=1e-5)


def test_without_restart_rounds_build_on_each_other(model: Path, tmp_path: Path) -> None:
    start(model, tmp_path / "on", algo__pool="all")
    start(model, tmp_path / "again", algo__pool="all", algo__restart=True)
    on, again = weights(tmp_path / "on"), weights(tmp_path / "again")
    assert any(not torch.equal(on[name], again[name]) for name in on)


def test_rounds_without_a_selected_answer_change_nothing_and_end_the_run(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="step 3: nothing was selected for 3 rounds in a row"):
        start(model, tmp_path / "run", algo__select="threshold", algo__threshold=2.0, algo__max_empty=3, train__steps=9)
    with Run.read(tmp_path / "run") as run:
        assert run.last_step() == 3 and run.curve("grad_norm")[1] == []
        assert "Nothing was selected for 2 rounds in a row." in [e.message for e in run.events()]
    start_weights = {name: p.detach() for name, p in tiny.load(model).model.named_parameters()}
    assert all(torch.equal(w, start_weights[name]) for name, w in weights(tmp_path / "run").items())


# --- settings -------------------------------------------------------------------------------------------------------


def test_presets_are_their_papers_choices() -> None:
    algo = {name: config.resolve("raft", {}, {"algo.preset": name}).algo for name in PRESETS["raft"]}
    assert [(n, a.select, a.max_per_task, a.restart, a.pool) for n, a in algo.items()] == [
        ("raft", "best", 1, False, "round"),
        ("rejection-sampling", "best", 1, False, "all"),
        ("expert-iteration", "passed", 4, True, "all"),
        ("star", "passed", 1, True, "round"),
        ("rest-em", "passed", 10, True, "round"),
    ]
    assert algo["star"].group_size == 1 and algo["rest-em"].group_size == 32


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_per_task": 9}, "max_per_task=9 is more than the algo.group_size=8"),
        ({"group_size": 1}, "the best 1 of 1 completions are all of them"),
        ({"schedule": "cosine"}, "needs the number of updates"),
        ({"rollout.temperature": 0}, "makes all completions of a task equal"),
        ({"max_empty": 0}, "max_empty=0 must be 1 or more"),
        ({"threshold": math.inf}, "is not a finite reward"),
        ({"select": "good"}, "is not one of best, passed, threshold"),
        ({"preset": "rafd"}, "Did you mean 'raft'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.resolve("raft", {}, {{"preset": "algo.preset"}.get(k, k): v for k, v in settings.items()})
