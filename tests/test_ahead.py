"""Sampling k steps ahead: which weights and pass rates write which answers does not depend on speed, kills or luck."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain import api, config
from posttrain.models.load import load_weights, with_chat_format
from posttrain.rollout.build import make_collector
from posttrain.rollout.curriculum import Curriculum
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.prefetch import Prefetcher
from posttrain.rollout.tasks import env_tasks
from posttrain.store import checkpoint
from posttrain.store.run import Run
from posttrain.types import Episode, Message, Span, Task
from tests import run_server, tiny
from tests.test_resume import Server

AHEAD = [name for name, cls in config.RECIPES.items() if "ahead" in config.as_dict(cls())["algo"]]
"""Every algorithm that samples ahead; one that gets the setting is tested like the others."""
DEPTHS = (0, 1, 2, 3)
each = pytest.mark.parametrize("algorithm", AHEAD)
deep = pytest.mark.parametrize("depth", DEPTHS)
EVERYTHING: dict[str, dict[str, Any]] = {
    "grpo": {"curriculum": "pass-rate", "max_resamples": 1, "baseline": "greedy", "group_size": 2}
}
"""Settings of an algorithm that make more of its state matter."""


def settings_of(algorithm: str, depth: int, folder: Path, model: Path, **more: Any) -> dict[str, Any]:
    """A run of six small steps."""
    own = {f"algo.{name}": value for name, value in EVERYTHING.get(algorithm, {}).items()}
    sizes = {"train.steps": 6, "eval.every": 2, "algo.ahead": depth, "model.path": str(model), "run.out": str(folder)}
    return {**run_server.SHARED, **run_server.small(algorithm), **own, **sizes, **more}


def train(algorithm: str, depth: int, folder: Path, model: Path, **more: Any) -> tuple[str, str]:
    """The digests of the weights and of everything stored."""
    with tiny.threads(1):
        result = api.start(
            algorithm, config.resolve(algorithm, {}, settings_of(algorithm, depth, folder, model, **more))
        )
    return outcome(result.folder)


def outcome(folder: Path) -> tuple[str, str]:
    with Run.read(folder) as run:
        summary = run.summary()
        assert summary is not None
        return summary["weights"], run.digest()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model"))


def test_some_algorithm_samples_ahead() -> None:
    assert "grpo" in AHEAD


@deep
@each
def test_the_bits_do_not_depend_on_how_fast_the_sampler_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, depth: int
) -> None:
    found: dict[str, tuple[str, str]] = {}
    start, generate, chance = Prefetcher.start, EmbeddedGenerator.generate, random.Random(depth)
    with monkeypatch.context() as patch:  # every pending step is complete before the update begins
        patch.setattr(Prefetcher, "start", lambda self, call: (start(self, call), self.wait()))
        found["fast"] = train(algorithm, depth, tmp_path / "fast", model)

    def slow(self: EmbeddedGenerator, *rest: Any, **named: Any) -> Any:
        time.sleep(chance.uniform(0, 0.06))  # longer than an update
        return generate(self, *rest, **named)

    monkeypatch.setattr(EmbeddedGenerator, "generate", slow)
    found["slow"] = train(algorithm, depth, tmp_path / "slow", model)
    assert len(set(found.values())) == 1, found


@deep
@each
def test_answers_are_exactly_k_updates_old_and_less_only_where_there_were_none(
    model: Path, tmp_path: Path, algorithm: str, depth: int
) -> None:
    """Each step's answers are sampled once more, in turn, with the weights that the checkpoints say they are from."""
    more = {"run.checkpoint_every": 1, "run.keep": 99}
    train(algorithm, depth, tmp_path / "run", model, **more)
    recipe = config.resolve(algorithm, {}, settings_of(algorithm, depth, tmp_path / "run", model, **more))
    policy = tiny.load(model)
    chat = with_chat_format(policy, recipe.data.format)
    sets, verify, _ = env_tasks(recipe, chat, None, None)
    tasks = {task.id: task for task in sets.train}
    collector = make_collector(policy, chat, verify, recipe)
    with Run.read(tmp_path / "run") as run, tiny.threads(1):
        assert list(run.curve("lag")[1]) == [min(step, depth) for step in range(6)]
        for step in range(6):
            if step - depth > 0:
                tensors, _ = checkpoint.load(run.folder / "ckpt" / f"step_{step - depth:07d}", ["model"])
                load_weights(policy, tensors["model"])
            rows = run.episodes("train", step + 1)
            chosen = list(dict.fromkeys(row.task_id for row in rows if row.group < recipe.algo.prompts))
            groups = collector.groups([tasks[name] for name in chosen], recipe.algo.group_size, step)
            again = {(e.task_id, e.index): e for group in groups for e in group}
            first = [row for row in rows if row.group < recipe.algo.prompts]
            assert len(first) >= recipe.algo.group_size
            for row in first:  # a task that is drawn twice in a step has other seeds the second time
                if [r.group for r in first if r.task_id == row.task_id and r.index == row.index] == [row.group]:
                    episode = again[row.task_id, row.index]
                    assert row.tokens.tolist() == episode.tokens.tolist()
                    assert row.logprobs.tolist() == episode.behaviour_logp.tolist()


@pytest.mark.parametrize("depth", [2])
@each
def test_a_run_that_is_continued_is_one_that_planned_all_its_steps(
    model: Path, tmp_path: Path, algorithm: str, depth: int
) -> None:
    whole = train(algorithm, depth, tmp_path / "whole", model, **{"eval.every": 0})
    train(algorithm, depth, tmp_path / "part", model, **{"train.steps": 4, "eval.every": 0})
    with tiny.threads(1):
        api.resume(tmp_path / "part", steps=6)
    assert outcome(tmp_path / "part")[0] == whole[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("runs")
    tiny.chatty(root / "model")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.run_server"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    yield Server(process, root, {})
    process.communicate()


@deep
@each
def test_killed_anywhere_a_run_resumes_to_the_same_bits_and_samples_nothing_twice(
    server: Server, algorithm: str, depth: int
) -> None:
    own = {f"algo.{name}": value for name, value in EVERYTHING.get(algorithm, {}).items()}
    settings = {**own, "algo.ahead": depth, "run.checkpoint_every": 3, "train.steps": 6, "eval.every": 0}
    name = f"{algorithm}-{depth}"
    assert server.live(name, algorithm, settings=settings) == 0
    whole, hits = server.outcome(name), server.hits(name)
    for failpoint, hit in (("journal:recorded", 0.8), ("step:updated", 0.7)):
        at = max(1, round(hits[failpoint] * hit))
        killed = f"{name}-{failpoint.replace(':', '-')}-{at}"
        assert server.live(killed, algorithm, failpoint=f"{failpoint}:{at}", settings=settings) == -signal.SIGKILL
        assert server.live(killed, algorithm) == 0
        assert server.outcome(killed) == whole, f"killed at {failpoint}, hit {at}"
        if failpoint == "journal:recorded":
            assert server.hits(killed)[failpoint] == hits[failpoint] - at, "what was recorded is not sampled again"


# --- the curriculum ---------------------------------------------------------------------------------------------------


def graded(task: Task, passed: bool) -> list[Episode]:
    return [
        Episode(task.id, 0, 0, (Span("prompt", np.zeros(1, np.int32)),), "", float(passed), passed, {}, "stop", None)
    ]


def test_pending_steps_draw_different_tasks_though_they_know_the_same_pass_rates() -> None:
    tasks = [Task(str(i), "mine", (Message("user", "?"),), "", meta={"level": "one"}) for i in range(24)]
    of_run = Curriculum(tasks, "pass-rate", seed=0)
    known, lead, drawn = of_run.state(), of_run.copy(), list[int]()
    for step in range(6):
        lead.take_rates(known)
        places = lead.order(4 * step, 0, 4)
        lead.count([graded(tasks[i], True) for i in places])
        drawn += places
    assert sorted(drawn) == [*range(24)], "each task of a level once before any comes again"
    assert of_run.state() == known, "the thread's curriculum is its own"


def test_pass_rates_are_those_of_the_moment_and_counts_go_on() -> None:
    tasks = [Task(str(i), "mine", (Message("user", "?"),), "", meta={"level": str(i % 2)}) for i in range(8)]
    one, other = Curriculum(tasks, "pass-rate", seed=0), Curriculum(tasks, "pass-rate", seed=0)
    one.learn([graded(tasks[0], True)])
    other.count([graded(tasks[0], True)])
    assert other.state()["drawn"] == one.state()["drawn"] and other.state()["seen"] != one.state()["seen"]
    other.take_rates(one.state())
    assert other.state() == one.state()


# --- the thread -------------------------------------------------------------------------------------------------------


def test_calls_run_in_order_one_at_a_time() -> None:
    inside, order = 0, list[int]()

    def call(number: int) -> int:
        nonlocal inside
        inside += 1
        assert inside == 1
        time.sleep(0.002)
        order.append(number)
        inside -= 1
        return number

    with Prefetcher[int]() as ahead:
        for number in range(5):
            ahead.start(lambda number=number: call(number))
        assert [ahead.take()[0] for _ in range(5)] == order == [*range(5)] and not ahead.started


def test_while_paused_the_call_in_progress_has_ended_and_none_begins() -> None:
    running, release, ended = threading.Event(), threading.Event(), list[int]()

    def call(number: int) -> int:
        running.set()
        assert release.wait(30)
        ended.append(number)
        return number

    with Prefetcher[int]() as ahead:
        for number in range(3):
            ahead.start(lambda number=number: call(number))
        assert running.wait(30)
        threading.Timer(0.02, release.set).start()
        with ahead.paused():
            count = len(ended)
            time.sleep(0.02)
            assert len(ended) == count >= 1
        assert [ahead.take()[0] for _ in range(3)] == [0, 1, 2]


def test_calls_that_wait_for_a_pause_to_end_are_dropped_at_the_end() -> None:
    before, called = threading.active_count(), list[int]()
    with Prefetcher[None]() as ahead, ahead.paused():
        ahead.start(lambda: called.append(1))
        ahead.__exit__(None, None, None)  # would wait for ever if the call did
    assert not called and threading.active_count() == before


@pytest.mark.parametrize("depth", [2])
@each
def test_the_reward_is_called_by_one_thread_at_a_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, depth: int
) -> None:
    inside, most = 0, 0

    def reward(completion: str) -> float:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        inside -= 1
        return float(len(completion) % 3)

    settings = settings_of(algorithm, depth, tmp_path / "run", model, **{"eval.every": 1})
    settings.pop("reward.name", None)
    with tiny.threads(1):
        api.start(algorithm, config.resolve(algorithm, {}, settings), reward=reward)
    assert most == 1


def test_the_old_name_is_the_new_setting() -> None:
    recipe = config.resolve("grpo", {}, {"algo.ahead": 1})
    for value in (True, "true"):
        with pytest.warns(config.SettingRenamed, match=r"algo\.overlap was renamed to algo\.ahead"):
            assert config.resolve("grpo", {}, {"overlap": value}) == recipe
    with pytest.warns(config.SettingRenamed):
        assert config.resolve("grpo", {"algo": {"overlap": False}}) == config.resolve("grpo", {})
    deeper = replace(recipe, algo=replace(recipe.algo, ahead=3))
    for known in (recipe, deeper):
        assert config.stored("grpo", config.identity(config.as_dict(known))).algo == known.algo
