"""A run that is killed anywhere and resumed ends with the same bits as one that never stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from posttrain import config
from posttrain.store import checkpoint
from posttrain.store.failpoints import FAILPOINTS
from posttrain.store.run import Run
from tests import run_server, tiny

ALGORITHMS = tuple(dict.fromkeys([*config.RECIPES, *run_server.SETTINGS]))
THOROUGH = ("grpo", "sft")  # killed at every failpoint; the others, which share their store, where their own state is
STEP = ("step:updated", "step:after-store", "step:after-checkpoint")


@dataclass
class Server:
    """Runs in forked processes; `baseline` holds what an uninterrupted one gives."""

    process: subprocess.Popen[str]
    root: Path
    baseline: dict[str, tuple[Any, ...]]

    def live(self, name: str, algorithm: str, **request: Any) -> int:
        """One life of a run; its exit code, negative for the signal that ended it."""
        assert self.process.stdin and self.process.stdout
        base = {"folder": str(self.root / name), "model": str(self.root / "model"), "algorithm": algorithm}
        if data := run_server.data_of(request["copy"][1] if "copy" in request else algorithm):
            base["data"] = str(self.root / data)
        self.process.stdin.write(json.dumps({**base, **request}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def outcome(self, name: str) -> tuple[Any, ...]:
        """Everything that must be equal: the store's digest, the weights, optimizer and exported model."""
        folder = self.root / name
        with Run.read(folder) as run:
            saved = checkpoint.latest(folder)
            assert saved is not None and run.status() == "finished"
            tensors, state = checkpoint.load(saved)
            digests = [checkpoint.weights_digest(group) for _, group in sorted(tensors.items())]
            return run.digest(), digests, state, (folder / "model" / "model.safetensors").read_bytes()

    def hits(self, name: str) -> dict[str, int]:
        """How often each failpoint was passed in the last life."""
        return cast("dict[str, int]", json.loads(Path(f"{self.root / name}.hits").read_text()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("runs")
    tiny.chatty(root / "model")
    rows = [{"prompt": f"Say {word}.", "completion": word * 2} for word in ("ab", "cd", "ef", "gh", "ij", "kl")] * 6
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{**row, "chosen": row["completion"], "rejected": row["completion"][::-1]} for row in rows]
    pairs = [{**row, "steps": [row["chosen"], row["rejected"]], "labels": [1, 0]} for row in pairs]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    command = [sys.executable, "-m", "tests.run_server"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    made = Server(process, root, {})
    for algorithm in ALGORITHMS:
        assert made.live(f"{algorithm}-whole", algorithm) == 0
        made.baseline[algorithm] = made.outcome(f"{algorithm}-whole")
    yield made
    process.communicate()  # closes the pipes; the server ends at the end of its input


@pytest.mark.parametrize("of", ["online-dpo", "sft", "reward"])
def test_a_renamed_copy_of_an_algorithm_is_killed_and_resumes_bit_exactly(server: Server, of: str) -> None:
    """What a new algorithm gets from its two files alone: settings that make a small run, and its kill test."""
    copy = {"copy": ["copy-of-it", of]}
    assert server.live(f"{of}-copied", "copy-of-it", **copy) == 0
    folder = f"{of}-copied-killed"
    assert server.live(folder, "copy-of-it", failpoint="step:after-store:4", **copy) == -signal.SIGKILL
    assert server.live(folder, "copy-of-it", **copy) == 0
    assert server.outcome(folder) == server.outcome(f"{of}-copied")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_uninterrupted_runs_are_equal_bit_for_bit(server: Server, algorithm: str) -> None:
    assert server.live(f"{algorithm}-again", algorithm) == 0
    assert server.outcome(f"{algorithm}-again") == server.baseline[algorithm]


def test_training_changed_the_weights_and_another_seed_gives_another_run(server: Server) -> None:
    assert server.live("grpo-seed", "grpo", settings={"run.seed": 1}) == 0
    assert server.outcome("grpo-seed")[1] != server.baseline["grpo"][1]


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [(a, name) for a in ALGORITHMS for name in (FAILPOINTS if a in THOROUGH else STEP)],
)
def test_killed_at_any_failpoint_a_run_resumes_to_the_same_bits(server: Server, name: str, algorithm: str) -> None:
    last = server.hits(f"{algorithm}-whole").get(name, 0)
    if not last:
        rollouts = ("step:rollouts-done", "journal:recorded")
        assert name in rollouts and run_server.data_of(algorithm), "only offline ones have no rollouts"
    hits = {1, last} if algorithm == "grpo" else {(last + 1) // 2}
    for hit in sorted(hits - {0}):
        folder = f"{algorithm}-{name.replace(':', '-')}-{hit}"
        assert server.live(folder, algorithm, failpoint=f"{name}:{hit}") == -signal.SIGKILL
        assert server.live(folder, algorithm) == 0
        assert server.outcome(folder) == server.baseline[algorithm], f"killed at {name}, hit {hit}"


def test_killed_at_random_moments_runs_resume_to_the_same_bits(server: Server) -> None:
    chance = random.Random(0)
    killed = 0
    for i in range(12):
        folder = f"grpo-random-{i}"
        killed += server.live(folder, "grpo", kill_after=chance.uniform(0.05, 0.8)) == -signal.SIGKILL
        while server.live(folder, "grpo", kill_after=None) != 0:
            raise AssertionError("a resumed run did not finish")
        assert server.outcome(folder) == server.baseline["grpo"]
    assert killed >= 3, "the moments were all after the end; the test proves nothing"


@pytest.mark.parametrize(
    ("algorithm", "number"), [("grpo", signal.SIGINT), ("grpo", signal.SIGTERM), ("grpo+ahead", signal.SIGTERM)]
)
def test_a_polite_signal_finishes_the_step_and_saves_it(server: Server, algorithm: str, number: signal.Signals) -> None:
    folder = f"{algorithm}-{number.name}"
    code = server.live(folder, algorithm, kill_at_step=1, signal=int(number), settings={"train.steps": 4000})
    assert code == 40 + number, "the run should end by itself, unfinished, and say which signal asked for it"
    with Run.read(server.root / folder) as run:
        saved = checkpoint.latest(server.root / folder)
        assert saved is not None and saved.step == run.last_step() and run.status() == "interrupted"


def test_interrupted_at_any_moment_a_run_resumes_to_the_same_bits(server: Server) -> None:
    began = time.monotonic()
    assert server.live("grpo-timed", "grpo") == 0
    life = time.monotonic() - began
    codes: list[int] = []
    for i in range(8):
        folder = f"grpo-interrupted-{i}"
        codes.append(server.live(folder, "grpo", kill_after=life * (0.4 + 0.07 * i), signal=int(signal.SIGINT)))
        assert server.live(folder, "grpo") == 0
        assert server.outcome(folder) == server.baseline["grpo"]
    assert 40 + signal.SIGINT in codes, "no moment was inside the loop; the test proves nothing"


def test_the_failpoints_of_a_real_run_are_all_passed(server: Server) -> None:
    passed = {n for n, count in server.hits("grpo-whole").items() if count}
    assert not passed ^ set(FAILPOINTS)
    assert server.baseline["grpo"][2]["step"] == run_server.STEPS
