"""What is promised about kill -9, power cuts and failing disks, each measured by doing it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.store import checkpoint, durable, failpoints
from posttrain.store.durable import DiskError
from posttrain.store.run import Run
from posttrain.types import ConfigError
from tests.store_disk import Disk, Tree, in_memory, lay_out

KILLED = -9
Tensors = dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def memory() -> Iterator[Path]:
    with in_memory() as folder:
        yield folder


class Server:
    """Runs the loop of store_loop.py in one forked process per call."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("store_loop.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(script.parent.parent)},
        )

    def run(self, folder: Path, failpoint: str = "", kill_after: float | None = None) -> int:
        assert self.process.stdin and self.process.stdout
        request = {"folder": str(folder), "failpoint": failpoint, "kill_after": kill_after}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def outcome(folder: Path) -> tuple[str, str, str, list[int]]:
    """All that a run leaves: what it stored, both weight files, and which checkpoints it kept."""
    saved = checkpoint.latest(folder)
    assert saved is not None and saved.skipped == ()
    tensors, state = checkpoint.load(saved)
    with Run.read(folder) as run:
        assert run.status() == "finished"
        stored = run.digest()
    digests = [checkpoint.weights_digest(tensors[group]) for group in ("model", "optim")]
    return stored, "+".join(digests), json.dumps(state), [step for step, _ in checkpoint.folders(folder)]


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> tuple[Any, dict[str, int], float]:
    """(outcome, times each failpoint was passed, seconds) of a run nobody kills."""
    with in_memory() as folder:
        assert server.run(folder / "first") == 0  # waits for the server's imports
        started = time.monotonic()
        assert server.run(folder / "run") == 0
        seconds = time.monotonic() - started
        return outcome(folder / "run"), json.loads((folder / "run.hits").read_text()), seconds


# the store's loop samples nothing: tests/test_journal.py and test_ahead.py kill at "journal:recorded"
@pytest.mark.parametrize("name", [name for name in failpoints.FAILPOINTS if not name.startswith("journal:")])
def test_a_run_killed_at_any_failpoint_resumes_to_the_same_end(
    server: Server, undisturbed: Any, name: str, memory: Path
) -> None:
    expected, hits, _ = undisturbed
    for hit in sorted({1, (hits[name] + 1) // 2, hits[name]}):
        folder = memory / f"hit-{hit}"
        assert server.run(folder, f"{name}:{hit}") == KILLED
        assert server.run(folder) == 0
        # A kill before the last removal leaves one checkpoint too many, which the next save would remove.
        assert outcome(folder)[:3] == expected[:3]


def test_a_run_killed_twenty_times_at_random_resumes_to_the_same_end(
    server: Server, undisturbed: Any, memory: Path
) -> None:
    expected, _, duration = undisturbed
    chance, kills = random.Random(0), 0
    for number in itertools.count():
        folder = memory / f"run-{number}"
        while kills < 20 and (code := server.run(folder, kill_after=chance.uniform(0, duration))) != 0:
            assert code == KILLED
            kills += 1
        assert server.run(folder) == 0
        assert outcome(folder)[:3] == expected[:3]
        if kills == 20:
            break


def test_a_run_killed_in_every_life_still_gets_to_the_same_end(server: Server, undisturbed: Any, memory: Path) -> None:
    expected, hits, _ = undisturbed
    for name in failpoints.FAILPOINTS:
        code = server.run(memory / "run", f"{name}:2")
        assert code in (KILLED, 0)
    assert server.run(memory / "run") == 0
    assert outcome(memory / "run")[:3] == expected[:3]


def test_an_unknown_failpoint_is_an_error_at_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("step:strat", "step:start:0", "step:start:x", "3"):
        monkeypatch.setenv(failpoints.VARIABLE, value)
        with pytest.raises(ConfigError, match="is not NAME or NAME:HIT"):
            failpoints.failpoint("step:start")
    with pytest.raises(ConfigError, match="not listed in FAILPOINTS"):
        failpoints.failpoint("step:strat")


def test_the_store_places_every_failpoint_it_lists_and_no_other() -> None:
    source = "".join(path.read_text() for path in Path(failpoints.__file__).parent.glob("*.py"))
    listed = {name for name in failpoints.FAILPOINTS if not name.startswith(("step:", "journal:"))}
    assert {name for name in failpoints.FAILPOINTS if f'failpoint("{name}")' in source} == listed


def tensors_of(number: int) -> Tensors:
    """Different bytes for each number, in two groups."""
    return {"model": {"w": torch.arange(6.0) + number}, "optim": {"w": torch.full((3,), number, dtype=torch.bfloat16)}}


def save(folder: Path, step: int, number: int, keep: int = 1) -> None:
    checkpoint.save(folder, step, tensors_of(number), {"number": number}, keep)


def read_number(folder: Path) -> int | None:
    """Which save the newest checkpoint holds, every tensor compared; None when there is none."""
    saved = checkpoint.latest(folder)
    if saved is None:
        return None
    tensors, state = checkpoint.load(saved)
    for group, named in tensors_of(state["number"]).items():
        assert torch.equal(tensors[group]["w"], named["w"])
    return state["number"]


def use(monkeypatch: pytest.MonkeyPatch, disk: Any) -> None:
    monkeypatch.setattr(durable, "os", disk)
    monkeypatch.setattr(durable, "shutil", disk)


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing catches it and nothing is cleaned up."""


def with_leftovers(folder: Path) -> None:
    save(folder, 2, 1)
    (folder / "ckpt" / ".tmp-step_0000004-1").mkdir()
    (folder / "ckpt" / ".tmp-step_0000004-1" / "model.safetensors").write_bytes(b"half")


SCENARIOS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], set[int | None], int]] = {
    "the first save": (lambda f: None, lambda f: save(f, 2, 1), {None, 1}, 1),
    "a save that keeps the old one": (lambda f: save(f, 2, 1), lambda f: save(f, 4, 2, keep=2), {1, 2}, 2),
    "a save that removes the old one": (lambda f: save(f, 2, 1), lambda f: save(f, 4, 2), {1, 2}, 2),
    "a save after a kill in a save": (with_leftovers, lambda f: save(f, 4, 2), {1, 2}, 2),
    "the same step with other bytes": (lambda f: save(f, 2, 1), lambda f: save(f, 2, 2), {1, 2}, 2),
    "the same step with equal bytes": (lambda f: save(f, 2, 1), lambda f: save(f, 2, 1), {1}, 1),
}


def _load_state(tree: Tree, folder: Path) -> int | None | str:
    lay_out(tree, folder)
    try:
        return read_number(folder)
    except Exception as error:
        return f"unusable: {error}"


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_cut_at_any_moment_leaves_the_old_or_the_new_checkpoint(
    name: str, monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    prepare, action, either, new = SCENARIOS[name]
    folder = memory / "run"
    folder.mkdir()
    prepare(folder)
    found: list[int | None | str] = []
    disk = Disk(folder, lambda operation: found.extend(look()))

    def look() -> list[int | None | str]:
        return [_load_state(tree, memory / "crashed") for tree in disk.crash_states()]

    use(monkeypatch, disk)
    action(folder)
    after = look()
    assert set(found) <= either
    assert set(after) == {new}, "what save returned from must survive"
    print(f"{name}: {len(found) + len(after)} crash states")


def test_a_power_cut_after_a_replayed_save_cannot_take_the_name_a_killed_process_left_unsynced(
    monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    folder = memory / "run"
    folder.mkdir()
    save(folder, 2, 1)
    done: list[str] = []

    def die_after_rename(operation: str) -> None:
        if done[-1:] == ["rename"]:
            raise Killed
        done.append(operation)

    disk = Disk(folder, die_after_rename)
    use(monkeypatch, disk)
    with pytest.raises(Killed):
        save(folder, 4, 2)
    assert {_load_state(tree, memory / "crashed") for tree in disk.crash_states()} == {1, 2}
    disk.before = lambda operation: None
    save(folder, 4, 2)
    assert {_load_state(tree, memory / "crashed") for tree in disk.crash_states()} == {2}


@pytest.mark.parametrize("careless_about", ["files", "folders"])
def test_the_power_cut_model_finds_unusable_states_when_something_is_not_forced_to_disk(
    careless_about: str, monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    folder = memory / "run"
    folder.mkdir()
    disk = Disk(folder)
    force = disk.fsync
    monkeypatch.setattr(
        disk, "fsync", lambda d: force(d) if (disk.open_files[d] in disk.names) == (careless_about == "files") else None
    )
    use(monkeypatch, disk)
    save(folder, 2, 1)
    found = {_load_state(tree, memory / "crashed") for tree in disk.crash_states()}
    assert 1 in found and any(isinstance(state, str) for state in found)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["disk full", "I/O error"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_whichever_operation_fails_the_old_checkpoint_loads_and_the_error_is_one_line(
    name: str, code: int, lasting: bool, monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    prepare, action, either, new = SCENARIOS[name]
    failing, saved = 0, False
    while not saved:
        failing += 1
        folder = memory / f"run-{failing}"
        folder.mkdir()
        prepare(folder)
        calls = itertools.count(1)

        def fail(operation: str, failing: int = failing, calls: Iterator[int] = calls) -> None:
            if operation not in ("unlink", "rmdir"):  # removing needs no space, and cleaning up is by removing
                call = next(calls)
                if call == failing or (lasting and call > failing):
                    raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            use(patch, Disk(folder, fail))
            try:
                action(folder)
            except DiskError as error:
                assert error.exit_code == 8
                assert os.strerror(code) in str(error) and "\n" not in str(error)
            else:
                saved = True
        assert read_number(folder) in either
        assert not list(folder.glob("ckpt/.tmp-step*"))
        action(folder)  # the disk is well again
        assert read_number(folder) == new
        assert not list(folder.glob("ckpt/.tmp-*")) and not list(folder.glob("ckpt/*.old"))
    assert failing > 10, "every operation had its turn to fail"
    print(f"{name}: {failing - 1} failures")
