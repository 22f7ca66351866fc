"""What may go wrong in a cluster: wrong weights, losses that cannot be sent, Ctrl-C, full disks, deaths."""

from __future__ import annotations

import ast
import errno
import gc
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import posttrain as pt
from posttrain import config
from posttrain.cluster import launch, processes
from posttrain.cluster.actors import WorkerDied, call
from posttrain.cluster.launch import Cluster
from posttrain.cluster.learner import check_size
from posttrain.cluster.sampler import Sampler
from posttrain.cluster.worker import FORK
from posttrain.data import batching
from posttrain.rewards.scoring import score_safely
from posttrain.rollout.build import make_generator
from posttrain.rollout.generator import Request
from posttrain.store import checkpoint, durable
from posttrain.store.durable import DiskError
from posttrain.store.run import Run
from posttrain.train.forward import token_stats
from posttrain.types import (
    Batch,
    Completion,
    ConfigError,
    RolloutError,
    SamplingParams,
    Task,
    TrainingDiverged,
    Verdict,
)
from tests import tiny
from tests.test_cluster import kept, of, settings, trained, workers
from tests.test_learner import loss, samples_for

pytestmark = pytest.mark.usefixtures("one_thread")
ONCE = "FAULT_ONCE"  # a file: whoever removes it is faulty, once; without the variable, every worker is
TASK = Task("a", "test", (pt.types.Message("user", "?"),), "1")
PARAMS = SamplingParams(max_tokens=6)
REQUESTS = [Request(np.array([3 + i, 5], np.int32), tuple(range(8 * i, 8 * i + 4))) for i in range(4)]


def faulty() -> bool:
    """Whether this worker is to misbehave now."""
    path = os.environ.get(ONCE)
    if path is None:
        return True
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    tiny.chatty(root / "model")
    (root / "reward.py").write_text("def longer(completion, **task):\n    return (len(completion) % 5) / 4\n")
    return root


@pytest.fixture
def cluster(place: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters of GRPO's small recipe, and closes them."""
    made: list[Cluster] = []

    def make(**more: Any) -> Cluster:
        given = settings(place, "grpo") | {f"cluster.{name}": value for name, value in more.items()}
        made.append(Cluster(config.resolve("grpo", {}, given)).__enter__())
        return made[-1]

    yield make
    for one in made:
        one.close()


def told(cluster: Cluster) -> list[str]:
    """What the cluster notes from now on."""
    notes: list[str] = []
    cluster.notes = notes
    return notes


def answers(found: list[list[Completion]]) -> list[Any]:
    return [(c.tokens.tolist(), c.logprobs.tobytes(), c.version) for row in found for c in row]


def moved(place: Path) -> dict[str, torch.Tensor]:
    """Weights of version 1."""
    own = launch.trainable(tiny.load(place / "model"))
    return {name: tensor.detach() + 0.01 for name, tensor in own.items()}


def expected(place: Path, weights: Mapping[str, torch.Tensor]) -> list[Any]:
    generator = make_generator(tiny.load(place / "model"), config.RolloutConfig(slots=32))
    generator.load(weights, 1)
    return answers(generator.generate(REQUESTS, PARAMS))


# --- wrong weights -----------------------------------------------------------------------------------------------


class Dropped(Sampler):
    """Says that it has loaded what it was sent."""

    def load(self, weights: Any, version: int, digest: str) -> str:
        return digest if version == 1 and faulty() else super().load(weights, version, digest)


class Spoiled(Sampler):
    """A generator that does something to the weights on their way."""

    def spoil(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def load(self, weights: Any, version: int, digest: str) -> str:
        take = self.generator.load
        if version == 1 and faulty():
            self.generator.load = lambda weights, version: take(self.spoil(dict(weights)), version)
        try:
            return super().load(weights, version, digest)
        finally:
            self.generator.load = take


class HalfLoaded(Spoiled):
    def spoil(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = self.generator.weights()
        return {name: tensor if i % 2 else own[name] for i, (name, tensor) in enumerate(weights.items())}


class OneBit(Spoiled):
    def spoil(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(iter(weights))
        changed = weights[name].clone()
        changed.view(-1).view(torch.int32)[0] ^= 1
        return weights | {name: changed}


class Broken(Spoiled):
    """Loads a tensor, then fails."""

    def spoil(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(iter(weights))
        self.generator.weights()[name].copy_(weights[name])
        raise RuntimeError("out of memory")


class OtherVersion(Sampler):
    """Answers with completions of the version before."""

    def generate(self, requests: Any, params: Any, version: int, digest: str) -> Any:
        wrong = faulty()
        for request, index, completion in super().generate(requests, params, version, digest):
            yield request, index, replace(completion, version=version - 1) if wrong else completion


class Silent(Sampler):
    """Leaves out every second answer."""

    def generate(self, requests: Any, params: Any, version: int, digest: str) -> Any:
        wrong = faulty()
        for number, done in enumerate(super().generate(requests, params, version, digest)):
            if number % 2 or not wrong:
                yield done


REFUSED: dict[type[Sampler], str] = {
    Dropped: "other weights", HalfLoaded: "weights", OneBit: "weights", Broken: "weights",
    OtherVersion: "answered with version 0", Silent: "not answered all",
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_sampler_with_wrong_weights_or_answers_is_replaced_and_at_last_refused(
    kind: type[Sampler], place: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SAMPLER", f"tests.test_cluster_faults:{kind.__name__}")
    weights, policy = moved(place), tiny.load(place / "model")
    with monkeypatch.context() as once:
        (tmp_path / "once").touch()
        once.setenv(ONCE, str(tmp_path / "once"))
        made = cluster(samplers=1)
        notes, pool = told(made), made.generator(policy, made.recipe.rollout)
        pool.load(weights, 1)
        assert answers(pool.generate(REQUESTS, PARAMS)) == expected(place, weights)
        assert not (tmp_path / "once").exists() and len(notes) == 1 and REFUSED[kind] in notes[0], notes
    made = cluster(samplers=2, max_restarts=1)
    pool = made.generator(policy, made.recipe.rollout)
    pool.load(weights, 1)
    done: list[Completion] = []
    with pytest.raises(RolloutError, match="died.*(weights|answered).*max_restarts=1"):
        pool.generate(REQUESTS, PARAMS, on_done=lambda group, index, completion: done.append(completion))
    right = {(*tokens, logprobs) for tokens, logprobs, _ in expected(place, weights)}
    assert all((*c.tokens.tolist(), c.logprobs.tobytes()) in right and c.version == 1 for c in done)


# --- an exception in the driver ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("shot", [False, True], ids=["alive", "killed"])
def test_a_pool_whose_call_was_abandoned_answers_the_next(
    error: type[BaseException], shot: bool, place: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = workers("sampler", monkeypatch)
    made = cluster(samplers=1)
    pool, weights = made.generator(tiny.load(place / "model"), made.recipe.rollout), moved(place)
    pool.load(weights, 1)

    def fail(group: int, index: int, completion: Completion) -> None:
        if shot:
            os.kill(started[0].pid, signal.SIGKILL)
        raise error

    with pytest.raises(error):
        pool.generate(REQUESTS, PARAMS, on_done=fail)
    assert answers(pool.generate(REQUESTS, PARAMS)) == expected(place, weights)


def test_nobody_is_started_for_a_cluster_that_is_closed(
    place: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that still samples or scores when the run ends gets the death of its worker, not another one."""
    started = workers("sampler", monkeypatch) + workers("judge", monkeypatch)
    made = cluster(samplers=1, judges=1)
    pool = made.generator(tiny.load(place / "model"), made.recipe.rollout)
    judges = made.verifier(lambda task, text: Verdict(0.0, False))
    before = len(started)
    made.close()
    with pytest.raises(WorkerDied, match="the run has ended"):
        pool.generate(REQUESTS, PARAMS)
    with pytest.raises(WorkerDied, match="the run has ended"):
        judges(TASK, "text")
    assert len(started) == before


# --- learners ----------------------------------------------------------------------------------------------------


def test_a_loss_that_holds_a_model_or_a_large_tensor_is_refused(place: Path) -> None:
    model, large, small = tiny.load(place / "model").model, torch.zeros(1 << 19), torch.zeros(8)

    def holding(what: Any) -> Any:
        return lambda logp, entropy, batch: (what, logp.sum())

    with pytest.raises(ConfigError, match="the loss holds 2.1 MB, which would be sent to every learner"):
        check_size(holding(large))
    with pytest.raises(ConfigError, match="the loss holds a model"):
        check_size(holding(model))
    check_size(holding(small))


def test_a_rank_that_diverges_leaves_no_rank_waiting(place: Path, cluster: Any) -> None:
    """The loss fails in one micro-batch, which one of the ranks has."""
    made = cluster(learners=2)
    recipe, policy = made.recipe, tiny.load(place / "model")
    batches = batching.micro(samples_for(policy, 12), 48, "token-mean")
    size = max(batch.tokens.numel() for batch in batches)

    def failing(logp: torch.Tensor, entropy: torch.Tensor, batch: Batch) -> Any:
        if batch.tokens.numel() == size:
            raise TrainingDiverged("the loss is not a number")
        return loss(logp, entropy, batch)

    def updated(learner: Any) -> Any:
        learner.forward_backward(batches, loss)
        return learner.step()["grad_norm"], checkpoint.weights_digest(learner.weights())

    first = made.learner(policy, recipe.train, 4, 1.0, token_stats)
    with pytest.raises(TrainingDiverged, match="not a number"):
        first.forward_backward(batches, failing)
    again = made.learner(tiny.load(place / "model"), recipe.train, 4, 1.0, token_stats)
    alone = launch.make_learner(tiny.load(place / "model"), recipe.train, 4, 1.0, token_stats)
    torch.manual_seed(0)
    found = updated(again)
    torch.manual_seed(0)
    assert found == updated(alone)


# --- judges ------------------------------------------------------------------------------------------------------


def deadly(completion: str, **task: Any) -> float:
    """A reward that kills its process for one completion."""
    if "die" in completion:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(completion) / 10


def scored(verify: Any, text: str) -> float:
    verdict, _ = score_safely(verify, TASK, text)
    assert verdict is not None
    return verdict.score


def test_a_completion_that_kills_three_judges_is_unscored_and_the_others_are_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.resolve("grpo", {}, settings(place, "grpo") | {"cluster.judges": 2})
    started = workers("judge", monkeypatch)
    with Cluster(recipe, deadly) as made:
        notes = told(made)
        verify = made.verifier(deadly)  # pyright: ignore[reportArgumentType]
        assert scored(verify, "good") == 0.4
        verdict, error = score_safely(verify, TASK, "die")
        assert verdict is None and error is not None and "3 judges died" in error
        assert scored(verify, "better") == 0.6
        assert len(started) == 2 + 3 and len(notes) == 3 and all("SIGKILL" in note for note in notes)
        assert "is unscored" in notes[-1]


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (
            'raise RuntimeError("no dictionary")',
            "judge-[01] cannot make the reward longer: .*RuntimeError: no dictionary",
        ),
        ("os._exit(3)", "exit code 3. 3 judges ended before they had made longer"),
    ],
)
def test_a_judge_that_cannot_be_made_ends_the_run_with_one_sentence(
    then: str, said: str, place: Path, tmp_path: Path
) -> None:
    """The file of the reward is as it should be where the run was started, but not where its judges are."""
    (tmp_path / "reward.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    {then}\n" + (place / "reward.py").read_text()
    )
    given = settings(place, "grpo") | {"reward.name": f"{tmp_path / 'reward.py'}:longer", **of(1, 0, 2)}
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path / "run", "grpo", given)


# --- workers -----------------------------------------------------------------------------------------------------


class Odd:
    """Replies that cannot be used, work that never ends, and other things of which a driver must not hang."""

    def __init__(self, how: str = "") -> None:
        if how == "exit":
            sys.exit("no such device")
        if how == "raise":
            raise ConfigError("no such model")

    def unreadable(self) -> Any:
        return Unreadable()

    def size(self, value: Any) -> int:
        return len(value)

    def same(self, value: Any) -> Any:
        return value

    def open_files(self) -> list[str]:
        return sorted(
            os.readlink(f"/proc/self/fd/{name}").split(":")[0].split("#")[0]
            for name in os.listdir("/proc/self/fd")[:-1]
        )

    def start(self) -> int:
        return subprocess.Popen(["sleep", "1000"]).pid


def refuse() -> None:
    raise ValueError("not for you")


class Unreadable:
    """Can be pickled, but read by nobody but a worker."""

    def __reduce__(self) -> Any:
        return refuse, ()


@pytest.fixture
def odd() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def start(*arguments: Any) -> Any:
        made.append(processes.start("odd-0", "tests.test_cluster_faults:Odd", arguments))
        return made[-1]

    yield start
    for actor in made:
        actor.kill("the test has ended")


def gone(pid: int) -> bool:
    """Whether a process has ended: it is not there, or only as an entry that its parent has not read yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_an_object_that_cannot_be_made_says_why_at_every_call(odd: Any) -> None:
    actor = odd("raise")
    for _ in range(2):
        with pytest.raises(ConfigError, match="no such model"):
            call(actor, "size", b"").result(60)
    with pytest.raises(WorkerDied, match="exit code 1; it said: .*no such device"):
        call(odd("exit"), "size", b"").result(60)


def test_an_answer_that_cannot_be_read_counts_as_a_death(odd: Any) -> None:
    actor = odd()
    futures = [call(actor, "unreadable"), call(actor, "size", b"12")]
    for future in futures:
        with pytest.raises(WorkerDied, match=r"its answer cannot be read \(ValueError: not for you\)"):
            future.result(60)
    assert eventually(lambda: gone(actor.pid))


def test_a_worker_that_does_not_read_keeps_nobody_waiting(odd: Any) -> None:
    """A stopped process takes no more than its socket's buffer; the deadline must still be looked at."""
    actor = odd()
    assert call(actor, "size", b"1").result(60) == 1
    os.kill(actor.pid, signal.SIGSTOP)
    future = call(actor, "size", b"0" * (1 << 25))
    assert not future.done()
    actor.kill("it is too late")
    with pytest.raises(WorkerDied, match="it is too late"):
        future.result(60)


def test_messages_of_any_size_arrive(odd: Any) -> None:
    value = np.arange(1 << 26, dtype=np.uint8)
    assert np.array_equal(call(odd(), "same", value).result(60), value)


def test_workers_inherit_no_connection_and_leave_none_behind(odd: Any) -> None:
    def open_here() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    first = odd()
    alone = call(first, "open_files").result(60)
    forker = processes._forker._process  # pyright: ignore[reportPrivateUsage]
    assert forker is not None
    here, there = open_here(), len(os.listdir(f"/proc/{forker.pid}/fd"))
    several = [odd() for _ in range(3)]
    assert [call(actor, "open_files").result(60) for actor in several] == [alone] * 3
    for actor in several:
        actor.kill("enough")
    assert eventually(lambda: open_here() == here)
    assert len(os.listdir(f"/proc/{forker.pid}/fd")) == there
    children = Path(f"/proc/{forker.pid}/task/{forker.pid}/children").read_text().split()
    assert eventually(lambda: all(not Path(f"/proc/{actor.pid}").exists() for actor in several)), "a zombie is left"
    assert str(first.pid) in children


def test_a_worker_is_ended_together_with_what_it_has_started(odd: Any) -> None:
    actor = odd()
    started = call(actor, "start").result(60)
    actor.kill("enough")
    assert eventually(lambda: gone(started) and gone(actor.pid))


def test_the_process_that_forks_workers_may_die(odd: Any) -> None:
    before = odd()
    assert call(before, "size", b"1").result(60) == 1
    forker = processes._forker._process  # pyright: ignore[reportPrivateUsage]
    assert forker is not None
    os.kill(forker.pid, signal.SIGKILL)
    after = odd()
    assert call(after, "size", b"12").result(60) == 2
    assert call(before, "size", b"123").result(60) == 3, "its workers go on"
    os.kill(before.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="it ended"):
        call(before, "size", b"").result(60)
    assert eventually(lambda: gone(forker.pid))


# --- drivers -----------------------------------------------------------------------------------------------------

DRIVER = """
import os, sys, time
from posttrain.cluster import processes
from posttrain.cluster.actors import call
actors = [processes.start(f"odd-{i}", "tests.test_cluster_faults:Odd", ()) for i in range(2)]
found = [call(actor, "size", b"123").result(120) for actor in actors]
pids = [actor.pid for actor in actors] + [call(actors[0], "start").result(60), processes._forker._process.pid]
with open(sys.argv[1] + ".part", "w") as file:
    file.write(repr((found, pids)))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(1000)
"""


def test_no_process_survives_a_killed_driver_whose_standard_streams_are_closed(tmp_path: Path) -> None:
    """One of the workers is stopped when its driver is killed, so it cannot end by itself."""
    found = tmp_path / "found"
    command = f'exec "$0" -c "$1" "{found}" <&- >&- 2>&-'
    driver = subprocess.Popen(["bash", "-c", command, sys.executable, DRIVER], cwd=Path(__file__).parents[1])
    assert eventually(lambda: found.exists() or driver.poll() is not None) and found.exists()
    sizes, pids = ast.literal_eval(found.read_text())
    assert sizes == [3, 3]
    os.kill(pids[0], signal.SIGSTOP)
    driver.kill()
    driver.wait()
    began = time.monotonic()
    assert eventually(lambda: all(gone(pid) for pid in pids)), [pid for pid in pids if not gone(pid)]
    assert time.monotonic() - began < 10


def test_a_driver_that_dies_before_it_is_told_of_its_worker_leaves_none(tmp_path: Path) -> None:
    """The process that forks has the request when its driver's connection closes, and another holds the worker's."""
    ours, theirs = socket.socketpair()
    own, workers_end = socket.socketpair()
    with (tmp_path / "output").open("w") as output:
        forker = processes.spawn(theirs)
        text = json.dumps({}).encode()
        socket.send_fds(ours, [FORK], [workers_end.fileno(), output.fileno()])
        ours.sendall(struct.pack("<Q", len(text)) + text)
    for one in (ours, theirs, workers_end):
        one.close()
    assert forker.wait(120) == 0
    own.settimeout(60)
    assert own.recv(1) == b"", "the worker has ended"
    own.close()


@pytest.fixture(scope="module")
def lives() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.cluster_lives"]
    cwd = Path(__file__).parents[1]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd)
    yield process
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_interrupted_saves_and_is_resumed_to_the_same_bits(
    number: signal.Signals, lives: subprocess.Popen[str], place: Path, tmp_path: Path
) -> None:
    """The signal goes to the driver's whole process group, as Ctrl-C in a terminal does."""

    def live(**request: Any) -> int:
        assert lives.stdin and lives.stdout
        print(json.dumps({"folder": str(tmp_path / "run"), **request}), file=lives.stdin, flush=True)
        code, seconds = json.loads(lives.stdout.readline())
        assert seconds < 10, "a process has survived its driver"
        return code

    given = settings(place, "grpo") | {"train.steps": 6, "run.checkpoint_every": 4}
    request: dict[str, Any] = {"algorithm": "grpo", "settings": given | of(2, 2, 2)}
    code = live(**request, kill_at_step=1, signal=int(number))
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 40 + number
        saved = checkpoint.latest(tmp_path / "run")
        with Run.read(tmp_path / "run") as run:
            assert saved is not None and saved.step == run.last_step() and run.status() == "interrupted"
    assert live(**request) == 0
    whole = trained(tmp_path / "whole", "grpo", given)
    assert kept(tmp_path / "run").items() <= whole.items()


# --- disks -------------------------------------------------------------------------------------------------------


class FullDisk:
    """The operating system, on whose disk nothing more fits once `full`."""

    full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: Any) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data)


def test_a_full_disk_ends_a_run_on_several_learners_with_its_earlier_checkpoint_intact(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(place, "grpo") | {"train.steps": 3}
    disk = FullDisk()

    def fill(step: int, values: Any) -> None:
        disk.full = step == 2  # the checkpoint of step 2 is saved after this

    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", disk)
        with pytest.raises(DiskError, match="No space left"):
            trained(tmp_path / "run", "grpo", given | of(2, 2, 2), on_step=fill)
    saved = checkpoint.latest(tmp_path / "run")
    assert saved is not None and saved.step == 1 and saved.skipped == ()
    assert pt.resume(tmp_path / "run").summary
    assert kept(tmp_path / "run").items() <= trained(tmp_path / "whole", "grpo", given).items()
