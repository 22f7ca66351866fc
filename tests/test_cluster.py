"""Learners, samplers and judges in processes of their own: the same run, whoever computes it and whatever is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import posttrain as pt
from posttrain import api, config
from posttrain.cli import report
from posttrain.cluster import processes
from posttrain.cluster.actors import Actor, WorkerDied, call, message
from posttrain.cluster.launch import Cluster
from posttrain.cluster.messages import decode, encode
from posttrain.lab import app as lab_app
from posttrain.models.kernels.build import SWITCH
from posttrain.store.run import Run
from posttrain.types import ConfigError
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


ROWS = {"sft": "answers", "dpo": "pairs", "reward": "pairs", "prm": "solutions"}
"""Algorithms that learn from a file, and which."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cluster")
    tiny.chatty(root / "model")
    tiny.chatty(root / "teacher")
    pairs = [{"prompt": f"{i}?", "chosen": f"{i * i}", "rejected": f"{i + 3}"} for i in range(24)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    (root / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    steps = [{"question": f"Go {i}.", "steps": ["oo", "xx"], "mistake_index": 1, "answer": "o"} for i in range(24)]
    (root / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (root / "reward.py").write_text("def longer(completion, **task):\n    return (len(completion) % 5) / 4\n")
    return root


def settings(place: Path, algorithm: str) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model.path": str(place / "model"), "train.threads": 1, "train.lanes": 4, "train.steps": 2,
        "train.micro_batch_tokens": 48, "run.checkpoint_every": 1, "cluster.timeout": 60,
    }  # fmt: skip
    if algorithm in ROWS:
        return given | {"data.tasks": str(place / f"{ROWS[algorithm]}.jsonl"), "data.holdout": 0.2}
    given |= {"rollout.max_tokens": 8, "rollout.slots": 32, "algo.prompts": 4, "eval.problems": 4,
              "data.tasks": "sums", "data.count": 16, "reward.name": f"{place / 'reward.py'}:longer"}  # fmt: skip
    given |= {"algo.teacher": str(place / "teacher")} if algorithm == "distill" else {}
    return given | ({"algo.group_size": 4} if algorithm in ("grpo", "raft", "distill") else {})


def trained(
    out: Path, algorithm: str, given: dict[str, Any], on_step: Any = None, reward: Any = None
) -> dict[str, str]:
    """Runs, and returns what must not depend on who computed it: weights, checkpoint files, metrics and episodes."""
    recipe = config.resolve(algorithm, {}, given | {"run.out": str(out)})
    result = api.start(algorithm, recipe, on_step)
    assert result.summary is not None
    return kept(out) | {"weights": result.summary["weights"]}


def kept(out: Path) -> dict[str, str]:
    newest = sorted((out / "ckpt").glob("step_*"))[-1]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(newest.iterdir())}
    with Run.read(out) as run:
        return {"step": newest.name, **files, "metrics and episodes": run.digest()}


def events(out: Path, kind: str = "cluster") -> list[str]:
    with Run.read(out) as run:
        return [event.message for event in run.events() if event.kind == kind]


# --- messages and workers ----------------------------------------------------------------------------------------


def test_what_is_sent_arrives_with_the_same_bits() -> None:
    values = {
        "float32": torch.randn(3, 5), "bfloat16": torch.randn(4).bfloat16(), "mask": torch.tensor([True, False]),
        "view": torch.arange(12).view(3, 4).T, "empty": torch.zeros(0, 3), "array": np.arange(5, dtype=np.float32),
        "number": torch.tensor(3.5),
    }  # fmt: skip
    found = decode(encode(values))
    for name, value in values.items():
        assert type(found[name]) is type(value) and found[name].dtype == value.dtype, name
        assert np.array_equal(np.asarray(found[name].tolist()), np.asarray(value.tolist())), name
    tied = torch.nn.Parameter(torch.randn(3), requires_grad=False)
    first, second = decode(encode((tied, tied)))
    assert first is second and isinstance(first, torch.nn.Parameter) and not first.requires_grad
    scale = 3.0
    assert decode(encode(lambda x: scale * x))(2) == 6.0  # a closure travels by value


class Echo:
    """What a worker can do: answer, yield, raise, print, wait and end."""

    def __init__(self, name: str) -> None:
        self.name = name

    def echo(self, value: Any) -> Any:
        return self.name, value

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    def fail(self) -> None:
        raise ConfigError("a wrong setting")

    def end(self, code: int) -> None:
        print("its last words", flush=True)
        os._exit(code)

    def wait(self) -> None:
        time.sleep(1000)


@pytest.fixture
def actor() -> Iterator[Any]:
    made = processes.start("echo-0", "tests.test_cluster:Echo", ("echo",))
    yield made
    made.kill("the test has ended")


def test_a_worker_answers_in_order_and_its_exceptions_are_raised_here(actor: Actor) -> None:
    parts: list[int] = []
    futures = [call(actor, "echo", i) for i in range(5)]
    streamed = actor.send(message("count", 3), parts.append)
    wrong = call(actor, "fail")
    assert [future.result(60) for future in futures] == [("echo", i) for i in range(5)]
    assert streamed.result(60) is None and parts == [0, 1, 2]
    with pytest.raises(ConfigError, match="a wrong setting"):
        wrong.result(60)
    assert call(actor, "echo", 7).result(60) == ("echo", 7) and actor.alive


def test_a_death_says_how_and_repeats_the_last_words(actor: Any) -> None:
    with pytest.raises(WorkerDied, match="echo-0 died: ended with exit code 3; it said: its last words"):
        call(actor, "end", 3).result(60)
    with pytest.raises(WorkerDied, match="exit code 3"):  # a death is final
        call(actor, "echo", 1).result(60)
    assert not actor.alive


def test_a_killed_worker_fails_every_open_call(actor: Any) -> None:
    call(actor, "echo", 1).result(60)
    futures = [call(actor, "wait"), call(actor, "echo", 2)]
    os.kill(actor.pid, signal.SIGKILL)
    for future in futures:
        with pytest.raises(WorkerDied, match="SIGKILL"):
            future.result(60)


# --- the same run ------------------------------------------------------------------------------------------------

SHAPES = [(2, 0, 0), (4, 0, 0), (1, 1, 0), (2, 2, 2), (1, 0, 2)]  # learners, samplers, judges


def of(learners: int, samplers: int = 0, judges: int = 0) -> dict[str, Any]:
    return {"cluster.learners": learners, "cluster.samplers": samplers, "cluster.judges": judges}


@pytest.mark.parametrize("algorithm", config.RECIPES)
def test_who_computes_a_run_does_not_change_it(algorithm: str, place: Path, tmp_path: Path) -> None:
    given = settings(place, algorithm)
    alone = trained(tmp_path / "alone", algorithm, given)
    shape = of(4) if algorithm in ROWS else of(2, 2, 2)
    assert trained(tmp_path / "spread", algorithm, given | shape) == alone


LAGS = [{"algo.max_lag": 1}, {"algo.ahead": 1}, {"algo.ahead": 2}, {}, {"algo.ahead": 2}]


@pytest.mark.parametrize(("shape", "lag"), list(zip(SHAPES, LAGS, strict=True)))
def test_any_number_of_learners_samplers_and_judges_gives_the_same_bits(
    shape: tuple[int, int, int], lag: dict[str, int], place: Path, tmp_path: Path
) -> None:
    given = settings(place, "grpo") | {
        "algo.kl_coef": 0.1, "algo.minibatches": 2, "algo.epochs": 2, "model.lora_rank": 2, "train.steps": 3, **lag,
    }  # fmt: skip
    alone = trained(tmp_path / "alone", "grpo", given)
    assert trained(tmp_path / "spread", "grpo", given | of(*shape)) == alone


def test_a_run_goes_on_with_another_number_of_learners(place: Path, tmp_path: Path) -> None:
    given = settings(place, "sft") | {"train.steps": 4}
    alone = trained(tmp_path / "alone", "sft", given)
    trained(tmp_path / "parts", "sft", given | {"train.steps": 1})
    for steps, learners in ((2, 2), (3, 4), (4, 1)):
        pt.resume(tmp_path / "parts", steps=steps, cluster={"learners": learners})
    assert kept(tmp_path / "parts").items() <= alone.items() | kept(tmp_path / "parts").items()
    assert {k: v for k, v in kept(tmp_path / "parts").items() if k in ("model.safetensors", "optim.safetensors")} == {
        k: v for k, v in alone.items() if k in ("model.safetensors", "optim.safetensors")
    }


# --- whatever is killed ------------------------------------------------------------------------------------------


def workers(role: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The workers of a role as they are started."""
    found: list[Any] = []
    start = Cluster._start  # pyright: ignore[reportPrivateUsage]

    def recorded(self: Cluster, asked: str, *rest: Any) -> Actor:
        actor = start(self, asked, *rest)
        if asked == role:
            found.append(actor)
        return actor

    monkeypatch.setattr(Cluster, "_start", recorded)
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("role", ["learner", "sampler", "judge"])
def test_a_run_whose_workers_die_or_hang_ends_in_the_same_bits(
    role: str, how: signal.Signals, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(place, "grpo") | {"train.steps": 3}
    alone = trained(tmp_path / "alone", "grpo", given)
    started = workers(role, monkeypatch)
    shots: list[int] = []

    def shoot(step: int, values: Any) -> None:
        if step == 1 and not shots:
            shots.append(started[0].pid)
            os.kill(started[0].pid, how)

    patience = {"cluster.timeout": 5 if how == signal.SIGSTOP else 60}
    found = trained(tmp_path / "shot", "grpo", given | of(2, 2, 2) | patience, on_step=shoot)
    assert shots and found == alone
    (note,) = events(tmp_path / "shot")[:1]
    assert ("SIGKILL" in note) if how == signal.SIGKILL else ("5 s" in note or "Timed out" in note)


def test_workers_that_always_die_end_the_run_with_one_sentence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = workers("sampler", monkeypatch)
    over = threading.Event()

    def shoot() -> None:
        while not over.is_set():
            for actor in started:
                if actor.alive:
                    os.kill(actor.pid, signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=shoot)
    thread.start()
    try:
        with pytest.raises(pt.types.RolloutError, match="samplers in a row died without an answer"):
            trained(tmp_path / "shot", "grpo", settings(place, "grpo") | of(1, 2) | {"cluster.max_restarts": 1})
    finally:
        over.set()
        thread.join()


# --- wrong settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cluster.learners": 3}, "does not divide train.lanes=4"),
        ({"cluster.learners": 2, "train.lanes": 1}, "does not divide train.lanes=1"),
        ({"cluster.learners": 0}, "must be 1 or more"),
        ({"cluster.samplers": -1}, "cannot be negative"),
        ({"cluster.shard": "full"}, "needs cluster.learners of 2 or more and train.lanes=1, not 1 and 4"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.resolve("grpo", {}, {"train.lanes": 4} | given)


def test_samplers_and_judges_evaluate_a_model_to_the_same_bits(place: Path) -> None:
    given = {"data.tasks": "sums", "data.count": 16, "reward.name": "exact", "rollout.max_tokens": 8,
             "eval.problems": 6, "eval.samples": 4, "train.threads": 1}  # fmt: skip

    def found(more: dict[str, Any]) -> Any:
        recipe = config.resolve_as(config.EvalRecipe, {}, {**given, **more})
        report, groups = api.evaluate_recipe(str(place / "model"), recipe)
        return report.as_dict(), [[(e.text, e.reward, e.tokens.tolist()) for e in group] for group in groups]

    assert found({"cluster.samplers": 2, "cluster.judges": 1}) == found({})
    with pytest.raises(ConfigError, match="an evaluation computes no gradients"):
        found({"cluster.learners": 2, "train.lanes": 2})


# --- models that do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_sharded_model_trains_as_one_process_to_rounding(
    algorithm: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sharded pass has no fused kernels; without them in rank 0's own pass, the difference is the shards' alone."""
    given = settings(place, algorithm) | {"train.lanes": 1}
    monkeypatch.setenv(SWITCH, "0")  # of workers: this process has loaded its kernels
    for out, more in (("alone", {}), ("shards", {"cluster.learners": 2, "cluster.shard": "full"})):
        recipe = config.resolve(algorithm, {}, given | more | {"run.out": str(tmp_path / out)})
        assert api.start(algorithm, recipe).summary
    with Run.read(tmp_path / "alone") as one, Run.read(tmp_path / "shards") as several:
        for step in (1, 2):
            alone, shards = one.at(step), several.at(step)
            assert shards["loss"] == pytest.approx(alone["loss"], rel=1e-4, abs=1e-6)
            assert shards["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert several.at(1)["shard_difference"] <= 1e-6 and "shard_difference" not in several.at(2)
    assert kept(tmp_path / "shards").keys() == kept(tmp_path / "alone").keys()
    assert pt.resume(tmp_path / "shards", steps=3, cluster={"learners": 1, "shard": "optimizer"}).summary


# --- who did what ------------------------------------------------------------------------------------------------


def test_the_report_and_the_lab_show_who_worked_for_a_run(place: Path, tmp_path: Path) -> None:
    trained(tmp_path / "shown", "grpo", settings(place, "grpo") | of(1, 2))
    text = report.run_page(tmp_path / "shown")
    rows = lab_app.processes(tmp_path / "shown")
    assert [row["name"] for row in rows] == ["sampler-0", "sampler-1"] and sum(row["done"] for row in rows) >= 32
    for row in rows:
        assert row["unit"] == "completions" and f"{row['done']:,} completions" in text and row["where"] in text
    trained(tmp_path / "alone", "grpo", settings(place, "grpo"))
    assert lab_app.processes(tmp_path / "alone") == [] and "sampler-0" not in report.run_page(tmp_path / "alone")
