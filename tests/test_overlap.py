"""Rewards beside the sampler, and a sampler one step ahead: the outcome is that of doing one thing after the other."""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import posttrain as pt
from posttrain import config
from posttrain.rewards import verifiers, workers
from posttrain.rewards.functions import reward_from
from posttrain.rewards.scoring import score_safely
from posttrain.rewards.workers import WorkerPool
from posttrain.rollout.collector import Collector
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.generator import OnDone, OnToken, Request
from posttrain.rollout.prefetch import Cancelled, Prefetcher
from posttrain.store.run import Run
from posttrain.types import Completion, ConfigError, Message, RolloutError, SamplingParams, Task, Verdict
from tests import tiny

TASKS = [Task(f"t{i}", "mine", (Message("user", f"question {i}"),), str(i)) for i in range(4)]


class Ending:
    """A generator whose completions end in a given order; the text of each is its request, index and seed."""

    version = 3

    def __init__(self, order: Sequence[int], pause: float = 0.0, fail_after: int | None = None) -> None:
        self.order, self.pause, self.fail_after = order, pause, fail_after
        self.finished = 0.0

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        out: list[list[Completion | None]] = [[None] * len(r.seeds) for r in requests]
        places = [(g, i) for g, r in enumerate(requests) for i in range(len(r.seeds))]
        for count, at in enumerate(self.order):
            if count == self.fail_after:
                raise RolloutError("the sampler broke.", boundary="generator")
            time.sleep(self.pause)
            g, i = places[at]
            tokens = np.array([g, i, requests[g].seeds[i] % 97], np.int32)
            done = out[g][i] = Completion(tokens, np.zeros(3, np.float32), np.zeros(3, np.float32), "length", 3)
            if on_done:
                on_done(g, i, done)
        self.finished = time.monotonic()
        return [[c for c in group if c is not None] for group in out]

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.version = version

    def weights(self) -> dict[str, torch.Tensor]:
        return {}


def collector(generator: Any, reward: Callable[..., Any], workers: int) -> Collector:
    verify = reward if isinstance(reward, Together) else reward_from(reward)
    return Collector(
        generator,
        lambda task: np.array([1, 2]),
        lambda tokens: " ".join(map(str, tokens)),
        verify,
        SamplingParams(),
        seed=0,
        workers=workers,
    )


class Together:
    """A reward that wants all answers at once, as a reward model does."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, task: Task, text: str) -> Verdict:
        raise AssertionError("answers are judged together")

    def score_all(self, pairs: Sequence[tuple[Task, str]]) -> list[Verdict]:
        self.calls.append(len(pairs))
        return [Verdict(float(len(text)), False) for _, text in pairs]


def shown(groups: Any) -> list[Any]:
    return [
        (e.task_id, e.group, e.index, e.text, e.tokens.tolist(), e.reward, e.passed, dict(e.parts), e.stop, e.error)
        for group in groups
        for e in group
    ]


# --- rewards while other answers are written -------------------------------------------------------------------------


@settings(max_examples=25)
@given(order=st.permutations(range(12)), faults=st.lists(st.integers(0, 96), max_size=40), workers=st.integers(1, 5))
def test_whatever_order_answers_end_in_the_episodes_are_those_of_judging_afterwards(
    order: list[int], faults: list[int], workers: int
) -> None:
    def reward(completion: str, task_id: str) -> Any:
        number = int(completion.split()[2])
        time.sleep(number / 50_000)  # verdicts come in an order of their own
        if number in faults:
            return [float("nan"), None, 1 / 0][number % 3] if number % 3 < 2 else {}[number]
        return Verdict(number / 7, number > 40, "", {"number": float(number)})

    found, plain = (shown(collector(Ending(order), reward, count).groups(TASKS, 3, step=5)) for count in (workers, 0))
    assert found == plain


def test_a_slow_reward_begins_before_the_last_answer_is_written() -> None:
    begun: list[float] = []

    def reward(completion: str) -> float:
        begun.append(time.monotonic())
        time.sleep(0.02)
        return 1.0

    generator = Ending(range(12), pause=0.01)
    collector(generator, reward, 4).groups(TASKS, 3, step=0)
    assert sum(moment < generator.finished for moment in begun) >= 6
    begun.clear()
    collector(generator, reward, 0).groups(TASKS, 3, step=0)
    assert min(begun) > generator.finished


def test_with_one_worker_a_reward_is_never_called_twice_at_a_time() -> None:
    inside, most = 0, 0

    def reward(completion: str) -> float:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        inside -= 1
        return 0.0

    collector(Ending(range(12)), reward, 1).groups(TASKS, 3, step=0)
    assert most == 1


def test_a_reward_that_judges_many_at_once_is_called_once_with_all_of_them() -> None:
    reward = Together()
    collector(Ending([*range(12)][::-1]), reward, 3).groups(TASKS, 3, step=0)
    assert reward.calls == [12]


def test_a_reward_that_needs_the_main_thread_is_called_there() -> None:
    database = sqlite3.connect(":memory:")  # refuses other threads

    def stored(completion: str) -> float:
        return float(database.execute("select length(?)", (completion,)).fetchone()[0])

    (episodes,) = collector(Ending(range(3)), stored, 2).groups(TASKS[:1], 3, step=0)
    assert [(e.reward, e.error) for e in episodes] == [(float(len(e.text)), None) for e in episodes]


def timed(completion: str) -> float:
    """A reward as many are written: a time limit by signal, and any exception is a 0."""
    try:
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.signal(signal.SIGALRM, before)
        return 1.0
    except Exception:
        return 0.0


def test_a_reward_that_swallows_the_error_of_signals_in_a_thread_is_not_believed() -> None:
    (episodes,) = collector(Ending(range(3)), timed, 2).groups(TASKS[:1], 3, step=0)
    assert [e.reward for e in episodes] == [1.0] * 3
    with WorkerPool(1) as threads:
        verdict, why = threads.submit(lambda: score_safely(reward_from(timed), TASKS[0], "")).result()
        assert verdict is None and why is not None and "main thread only" in why and "timed" in why
        verdict, why = threads.submit(lambda: score_safely(reward_from(len_of), TASKS[0], "abc")).result()
        assert verdict == Verdict(3.0, True) and why is None


def len_of(completion: str) -> float:
    return float(len(completion))


def test_the_mathematical_verifier_finds_the_same_in_several_threads_at_once() -> None:
    golds = ["x^2+2x+1", r"\frac{1}{3}", "(1,2]", r"\sqrt{8}", r"\{1,2,3\}"]
    given_ = ["(x+1)^2", "0.333333333", "[1,2]", r"2\sqrt{2}", r"\{3,2,1\}"]
    pairs = [
        (Task(f"m{i}", "mine", (Message("user", "?"),), gold), rf"so \boxed{{{text}}}")
        for i, gold in enumerate(golds)
        for text in given_
    ]
    plain = [score_safely(verifiers.math, *pair) for pair in pairs]
    with WorkerPool(4) as threads:
        futures = [threads.submit(lambda pair=pair: score_safely(verifiers.math, *pair)) for pair in pairs]
        assert [future.result() for future in futures] == plain
    assert {verdict.passed for verdict, _ in plain if verdict} == {True, False}


# --- threads ---------------------------------------------------------------------------------------------------------


def test_no_thread_outlives_the_call_whether_it_returns_or_raises() -> None:
    before = threading.active_count()

    def reward(completion: str) -> float:
        time.sleep(0.01)
        return 1.0

    collector(Ending(range(12)), reward, 4).groups(TASKS, 3, step=0)
    assert threading.active_count() == before
    with pytest.raises(RolloutError, match="the sampler broke"):
        collector(Ending(range(12), fail_after=6), reward, 4).groups(TASKS, 3, step=0)
    assert threading.active_count() == before


def test_ctrl_c_does_not_wait_for_a_reward_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LAST_CALL", 0.05)
    release, calls = threading.Event(), []

    def reward(completion: str) -> float:
        calls.append(completion)
        release.wait(60)
        return 1.0

    class Interrupted(Ending):
        def generate(self, *rest: Any, **named: Any) -> Any:
            super().generate(*rest, **named)
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        collector(Interrupted(range(12)), reward, 1).groups(TASKS, 3, step=0)
    assert time.monotonic() - start < 30
    release.set()
    time.sleep(0.05)
    assert len(calls) == 1, "calls that had not begun are dropped"


@pytest.mark.parametrize("count", [1, 2])
def test_a_thread_computes_with_as_many_cpu_threads_as_its_caller(count: int) -> None:
    with tiny.threads(count), WorkerPool(1) as threads:
        assert threads.submit(torch.get_num_threads).result() == count


def test_a_result_that_is_ready_before_it_is_asked_for_was_hidden() -> None:
    with Prefetcher[int]() as ahead:
        assert not ahead.started
        ahead.start(lambda: time.sleep(0.05) or 2)
        assert ahead.started
        ahead.wait()
        result, hidden = ahead.take()
        assert result == 2 and hidden >= 0.05 and not ahead.started
        ahead.start(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            ahead.take()


def test_a_collection_that_nobody_waits_for_any_more_ends_with_its_next_answer() -> None:
    generator, reached = Ending(range(12), pause=0.02), threading.Event()
    with Prefetcher[Any]() as ahead:

        def check() -> None:
            reached.set()
            ahead.check()

        stoppable = replace(collector(generator, len_of, 1), check=check)
        ahead.start(lambda: stoppable.groups(TASKS, 3, step=0))
        assert reached.wait(30)
    assert generator.finished == 0
    with pytest.raises(Cancelled):
        ahead.take()


# --- a sampler one step ahead ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model"))


def spread(completion: str) -> float:
    """Differs between the answers of a random model."""
    return float(sum(map(ord, completion)) % 7)


def train(model: Path, out: Path, reward: Any = spread, **settings: Any) -> tuple[Any, str, dict[str, list[float]]]:
    """The weights' digest, the store's, and the metrics of a short run."""
    small: dict[str, Any] = {
        "rollout__max_tokens": 8, "rollout__slots": 32, "prompts": 3, "group_size": 4, "problems": 4,
        "steps": 4, "train__lr": 1e-2, "count": 64, "eval__every": 2,
    }  # fmt: skip
    result = pt.grpo(str(model), "sums", reward, out, **{**small, **settings})
    assert result.summary
    with Run.read(result.folder) as run:
        found = {name: list(run.curve(name)[1]) for name in {name for _, name, _ in run.metrics()}}
        found["hidden"] = [value for _, name, value in sorted(run.timings()) if name == "seconds_hidden"]
        return result.summary["weights"], run.digest(), found


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_with_a_sampler_ahead_is_the_plain_loop_bit_for_bit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    settings: dict[str, Any] = {"ahead": 1, "threads": count, "minibatches": 2, "kl_coef": 0.01}
    with tiny.threads(count):
        first, again = (train(model, tmp_path / name, **settings)[:2] for name in ("first", "again"))
        start = Prefetcher.start
        monkeypatch.setattr(Prefetcher, "start", lambda self, call: (start(self, call), self.wait()))
        plain = train(model, tmp_path / "plain", **settings)[:2]
    assert first == again == plain


def test_rewards_in_threads_leave_a_run_as_it_is_without(model: Path, tmp_path: Path) -> None:
    runs = [train(model, tmp_path / str(n), threads=1, rollout__reward_workers=n)[:2] for n in (0, 1, 4)]
    assert runs[0] == runs[1] == runs[2]


def test_every_step_but_the_first_learns_from_answers_one_update_old(model: Path, tmp_path: Path) -> None:
    _, _, found = train(model, tmp_path / "run", ahead=1, threads=1)
    assert found["lag"] == [0, 1, 1, 1]
    assert found["mismatch"] == [found["mismatch"][0], 0, 0, 0], "the ratio is to the sampler"
    assert found["hidden"][0] == 0 and len(found["hidden"]) == 4 and max(found["hidden"]) > 0
    _, _, corrected = train(model, tmp_path / "corrected", ahead=1, is_cap=2.0, threads=1)
    assert corrected["mismatch"][0] < 1e-4 < corrected["mismatch"][1] and corrected["is_weight"][1] != 1.0


def test_what_is_learned_comes_from_the_weights_before_the_last_update(model: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 all weights are the same, so being ahead changes the `lag` metric alone."""
    settings: dict[str, Any] = {"train__lr": 0.0, "threads": 1}
    one, other = (train(model, tmp_path / str(k), ahead=k, **settings) for k in (1, 0))
    assert one[0] == other[0]
    assert one[2]["reward"] == other[2]["reward"] and one[2]["length"] == other[2]["length"]


def test_the_reward_is_not_called_by_an_examination_and_a_sampler_at_once(model: Path, tmp_path: Path) -> None:
    inside, most = 0, 0

    def reward(completion: str) -> float:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.002)
        inside -= 1
        return spread(completion)

    train(model, tmp_path / "run", reward, ahead=1, threads=1, eval__every=1)
    assert most == 1


def test_an_error_of_the_sampler_ahead_ends_the_run_and_its_thread(model: Path, tmp_path: Path) -> None:
    before, calls = threading.active_count(), 0

    def reward(completion: str) -> float:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise ValueError("out of order")
        return spread(completion)

    with pytest.raises(RolloutError, match="could not be scored"):
        train(model, tmp_path / "run", reward, ahead=1, threads=1)
    assert threading.active_count() == before


def test_being_ahead_and_a_lag_of_ones_own_choice_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"algo\.ahead=3 already has a lag of 3, so algo\.max_lag=2 must be 0"):
        config.resolve("grpo", {"algo": {"ahead": 3, "max_lag": 2}})
    with pytest.raises(ConfigError, match="reward_workers=-1 is negative"):
        config.resolve("grpo", {"rollout": {"reward_workers": -1}})


def test_the_embedded_generator_says_when_each_completion_ends(model: Path) -> None:
    policy = tiny.load(model)
    ended: dict[tuple[int, int], Completion] = {}
    requests = [Request(p, (1, 2, 3)) for p in tiny.prompts(policy, 3)]
    out = EmbeddedGenerator(policy, 32).generate(
        requests, SamplingParams(max_tokens=12), on_done=lambda g, i, c: ended.update({(g, i): c})
    )
    assert ended == {(g, i): c for g, group in enumerate(out) for i, c in enumerate(group)}
