"""`posttrain cluster`, `posttrain doctor --cluster`, and `posttrain resume` with other workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from posttrain import config
from posttrain.cli.main import main
from posttrain.cluster import node, on_ray, processes, record
from posttrain.cluster.actors import RUN_ENDED, STARTED_ANEW, WorkerDied, call
from posttrain.cluster.launch import Cluster
from posttrain.cluster.messages import encode
from posttrain.config import ClusterConfig
from posttrain.store import workers as stored
from posttrain.types import ConfigError
from tests.test_cluster import kept, of, place, settings, trained, workers  # noqa: F401 - `place` is a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(done: Result, *said: str) -> None:
    """Exit code 2 and one message with these words."""
    assert done.exit_code == 2 and not isinstance(done.exception, Exception), done.output
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    for part in said:
        assert part in done.stderr


# --- who works for a run -----------------------------------------------------------------------------------------


def test_the_record_says_who_is_alive_dead_or_ended_and_what_they_did(tmp_path: Path) -> None:
    found = record.Record("processes")
    found.write_to(tmp_path)
    assert stored.read(tmp_path) is None  # no workers, no file
    actors = [processes.start(f"sampler-{n}", "tests.test_cluster:Echo", ("echo",)) for n in range(3)]
    for actor in actors:
        found.add("sampler", actor)
    assert len(stored.read(tmp_path)["workers"]) >= 1  # pyright: ignore[reportOptionalSubscript]
    assert actors[0].send(encode(("count", (3,)))).result(60) is None
    os.kill(actors[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        call(actors[1], "wait").result(60)
    actors[2].kill(RUN_ENDED)
    found.close()
    rows = (stored.read(tmp_path) or {})["workers"]
    assert [row["state"] for row in rows] == ["alive", "dead", "ended"]
    assert "SIGKILL" in rows[1]["reason"] and rows[1]["ended"] >= rows[1]["started"]
    assert rows[0]["done"] == 3 and rows[0]["where"].startswith(f"pid {actors[0].pid} on ")
    actors[0].kill(RUN_ENDED)


def test_deaths_and_restarts_are_counted_by_role() -> None:
    def row(role: str, state: str, started: float, ended: float | None = None, reason: str = "") -> dict[str, Any]:
        return {"role": role, "state": state, "started": started, "ended": ended, "reason": reason}

    rows = [
        row("learner", "dead", 0, 5), row("learner", "ended", 0, 5, STARTED_ANEW), row("learner", "alive", 6),
        row("learner", "alive", 6), row("sampler", "ended", 0, 5, STARTED_ANEW), row("sampler", "alive", 6),
        row("judge", "alive", 0), row("judge", "dead", 0, 3), row("judge", "alive", 3),
    ]  # fmt: skip
    assert stored.counts({"workers": rows}) == {"learner": (1, 2), "sampler": (0, 1), "judge": (1, 1)}


def test_status_shows_the_workers_of_a_run_and_their_deaths(
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = workers("sampler", monkeypatch)

    def shoot(step: int, values: Any) -> None:
        if step == 1:
            alive = json.loads(run("cluster", "status", tmp_path / "run", "--json").stdout)
            assert alive["running"] and any(row["state"] == "alive" for row in alive["workers"])
            os.kill(started[0].pid, signal.SIGKILL)

    trained(tmp_path / "run", "grpo", settings(place, "grpo") | of(1, 1, 1), on_step=shoot)
    found = json.loads(run("cluster", "status", tmp_path / "run", "--json").stdout)
    states = {row["name"]: row["state"] for row in found["workers"]}
    assert states == {"judge-0": "ended", "sampler-0": "dead", "sampler-1": "ended"} and not found["running"]
    judge = next(row for row in found["workers"] if row["name"] == "judge-0")
    assert judge["done"] >= 2 * 4 * 4  # completions of two steps
    shown = run("cluster", "status", tmp_path / "run").output
    for part in ("samplers: 1 died, 1 started again", "judges: 0 died, 0 started again", "sampler-0 died: killed by"):
        assert part in shown


def test_notes_that_a_dead_learner_kept_from_being_stored_are_stored_by_the_next_attempt(tmp_path: Path) -> None:
    cluster = Cluster(config.resolve("grpo", {}, {}))
    first, second = list[str](), list[str]()
    cluster.attach(tmp_path, first)
    cluster.note("a sampler died")
    cluster.attach(tmp_path, second)
    cluster.note("another one died")
    assert second == ["a sampler died", "another one died"]


def test_status_of_a_run_whose_process_is_gone_shows_no_worker_as_alive(tmp_path: Path) -> None:
    row = {"name": "judge-0", "role": "judge", "state": "alive", "reason": ""}
    found: dict[str, Any] = {"workers": [row, {**row, "state": "dead", "reason": "killed"}]}
    stored.ended(found)
    assert [row["state"] for row in found["workers"]] == ["ended", "dead"]


def test_a_run_continues_with_other_workers_from_the_command_line(place: Path, tmp_path: Path) -> None:  # noqa: F811
    given = settings(place, "sft")
    alone = trained(tmp_path / "alone", "sft", given)
    trained(tmp_path / "parts", "sft", given | {"train.steps": 1})
    shown = run("cluster", "status", tmp_path / "parts")
    assert shown.exit_code == 0 and "has no workers: everything is computed in its own process." in shown.output
    done = run("resume", tmp_path / "parts", "--steps", 2, "--cluster.learners", 2, "--cluster.timeout=60", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["summary"]["weights"] == alone["weights"]
    both = kept(tmp_path / "parts")
    assert both["optim.safetensors"] == alone["optim.safetensors"]
    roles = [
        row["role"] for row in json.loads(run("cluster", "status", tmp_path / "parts", "--json").stdout)["workers"]
    ]
    assert roles == ["learner", "learner"]
    refused(run("resume", tmp_path / "parts", "--train.lr", "1"), "--train.lr cannot be changed")
    refused(run("resume", tmp_path / "parts", "--steps", 3, "--cluster.learners", 3), "cluster.learners=3")
    refused(run("resume", tmp_path / "parts", "--cluster.lerners", 2), "lerners")
    refused(run("resume", "--cluster.learners", 2), "name one run")


# --- a Ray cluster on this machine -------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder of its own, for the token and the record of the head."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(root))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", node.TOKEN_PATH):
            patch.delenv(name, raising=False)
        yield root


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[dict[str, Any]]:
    done = run("cluster", "up", "--port", free_port(), "--cpus", 4, "--json")
    assert done.exit_code == 0, done.output
    yield json.loads(done.stdout)
    stopped = run("cluster", "down")
    assert stopped.exit_code == 0 and "has stopped" in stopped.output


def listening(session: int) -> set[str]:
    """The addresses, in hexadecimal, at which the processes of a session listen (Linux)."""
    sockets: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                sockets |= {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue  # it has ended
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def test_a_cluster_needs_a_token_and_listens_on_loopback_only(head: dict[str, Any], home: Path) -> None:
    token = home / ".ray" / "auth_token"
    assert head["token"] == str(token) and stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    found = listening(head["pid"])
    assert found and found <= loopback
    refused(run("cluster", "up", "--port", free_port()), "already runs at", "posttrain cluster down")


def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "posttrain", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_run_on_a_ray_cluster_has_the_bits_of_a_run_in_one_process(
    head: dict[str, Any],
    place: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = settings(place, "grpo") | {"cluster.timeout": 300}
    alone = trained(tmp_path / "alone", "grpo", given)
    spread = given | of(2, 1) | {"cluster.backend": "ray", "cluster.address": head["address"]}
    words = [f"--{name}={value}" for name, value in spread.items()]
    done = command("grpo", *words, "--out", tmp_path / "spread", "--json")
    assert done.returncode == 0, done.stderr
    weights = json.loads(done.stdout)["summary"]["weights"]
    assert kept(tmp_path / "spread") | {"weights": weights} == alone
    rows = json.loads(run("cluster", "status", tmp_path / "spread", "--json").stdout)["workers"]
    assert {row["role"] for row in rows} == {"learner", "sampler"} and all(row["ready"] for row in rows)
    assert all(row["where"].endswith(" on 127.0.0.1") and row["state"] == "ended" for row in rows)


KILLED = """
import os, signal
from posttrain.cluster import on_ray
from posttrain.cluster.actors import WorkerDied, call
from posttrain.config import ClusterConfig
from posttrain.types import ConfigError
on_ray.open(ClusterConfig(judges=1, backend="ray"))
actor = on_ray.start("judge-0", "builtins:object", ())
assert len(call(actor, "about").result(100)) == 3
os.kill(int(actor.where.split()[1]), signal.SIGKILL)
try:
    call(actor, "about").result(60)
except WorkerDied as died:
    assert not actor.alive and actor.reason in str(died)
    print(died)
on_ray._gpus, on_ray._asked = 1.0, ClusterConfig(samplers=1)  # as if the machine with the GPU had been lost since
waits = on_ray.start("sampler-0", "builtins:object", ())
for _ in range(2):
    try:
        call(waits, "about").result(60)
    except ConfigError as lost:
        assert not waits.alive and waits.reason == str(lost)
        print(lost)
"""


def test_a_death_and_a_lost_machine_are_noticed_on_ray_and_only_the_program_writes_to_stdout(
    head: dict[str, Any],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        env={**os.environ, "RAY_ADDRESS": head["address"]}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    died, *lost = done.stdout.splitlines()
    assert died.startswith("judge-0 died: ")
    assert len(lost) == 2 and all(
        line.startswith("the Ray cluster has 0 GPUs, but cluster.learners=1") for line in lost
    )


def test_a_cluster_with_too_little_names_the_resource() -> None:
    small = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0})
    with pytest.raises(ConfigError, match="has 4 CPUs, but cluster.learners=2, samplers=3 and judges=1 need 6"):
        on_ray.check_resources(small, ClusterConfig(learners=2, samplers=3, judges=1), 0)
    on_ray.check_resources(small, ClusterConfig(learners=2, samplers=2), 0)
    with pytest.raises(ConfigError, match="has 1 GPUs"):
        full = SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": 1.0})
        on_ray.check_resources(full, ClusterConfig(learners=2), 1)


def test_a_run_without_the_clusters_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (*node.QUIET, *node.LOOPBACK):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # which the command sets
    ray = ("--cluster.backend=ray", "--cluster.address=127.0.0.1:1", "--cluster.samplers=1")
    refused(run("grpo", "demo", *ray, "--out", tmp_path / "run"), "needs its token", str(tmp_path / ".ray"))


def test_up_refuses_a_port_in_use_a_readable_token_and_a_machine_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "No cluster runs on this machine." in run("cluster", "down").output
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        refused(run("cluster", "up", "--port", port), f"cannot listen at 127.0.0.1:{port}", "--port")
    (tmp_path / "token").write_text("a" * 64)
    (tmp_path / "token").chmod(0o644)
    monkeypatch.setenv(node.TOKEN_PATH, str(tmp_path / "token"))
    refused(run("cluster", "up", "--port", free_port()), "other users can read", "chmod 600")
    monkeypatch.setattr(node, "find_spec", lambda name: None)
    refused(run("cluster", "up"), "Ray is not installed. Install posttrain[ray].")


# --- the check of a cluster --------------------------------------------------------------------------------------


def test_doctor_starts_a_worker_of_each_kind_and_shows_what_they_say() -> None:
    done = run("doctor", "--cluster", "--train.threads", 1, "--json")
    assert done.exit_code == 0, done.output
    found = {fact["name"]: fact for fact in json.loads(done.stdout)}
    names = ["the run's process", "sampler-0", "judge-0", "learner-0", "learner-1", "time"]
    assert list(found) == names
    for name in names[1:-1]:
        assert found[name]["ok"] is True
        for part in ("pid ", "started in ", "posttrain ", "torch ", "python ", "CPU ", "threads 1", "sandbox: "):
            assert part in found[name]["value"], (name, part)


def test_doctor_refuses_settings_without_a_cluster_and_runs_with_one() -> None:
    refused(run("doctor", "--cluster.learners", 2), "need --cluster")
    refused(run("doctor", "runs/a", "--cluster"), "runs/a")
    refused(run("doctor", "--cluster", "--cluster.lerners", 2), "lerners")
