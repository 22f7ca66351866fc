"""Two machines as two network namespaces: what a run does when the network between them fails, or a process hangs.

It is the part `network` of tests/cluster_nightly.py, and needs Linux, root, the program `ip` and Ray. The namespaces
are the ends of a bridge in a third one. A cable is cut by setting the bridge's side of it down, so that a machine
still reaches itself. The driver is a process of its own in the first namespace; it waits at a step until the fault has
happened, and says when it has noticed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain import api, config
from posttrain.cluster.launch import Cluster
from posttrain.store.run import Event, Run
from posttrain.types import PosttrainError

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
CHECKS = {  # how soon Ray's head counts a machine as dead, in milliseconds; its defaults are tens of seconds
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
TIMEOUT = 15  # seconds, `cluster.timeout`
WITHIN = 2.0  # seconds after the timeout in which a fault is noticed


def missing() -> str:
    """Why the namespaces cannot be made here; empty if they can."""
    if os.geteuid() or not shutil.which("ip") or not find_spec("ray"):
        return "it needs root, the program ip and Ray"
    return ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def inside(space: str, command: list[str], **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(["ip", "netns", "exec", space, *command], cwd=ROOT, text=True, **more)


@dataclass
class Machines:
    """A Ray cluster on two machines, `spaces[0]` with the head and `spaces[1]`; `spaces[2]` is the bridge."""

    folder: Path
    spaces: list[str]
    environment: dict[str, str]
    nodes: list[subprocess.Popen[str]] = field(default_factory=list[subprocess.Popen[str]])

    def address(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def start(self, machine: int, cpus: int) -> None:
        """Starts Ray on a machine, and waits until it is ready."""
        of_head = ["--head", "--port=6379", "--include-dashboard=false", "--disable-usage-stats"]
        joins = [f"--address={self.address(0)}:6379"]
        command = [PYTHON, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}",
                   f"--node-ip-address={self.address(machine)}", *(joins if self.nodes else of_head)]  # fmt: skip
        log = self.folder / f"ray-{len(self.nodes)}.log"
        with log.open("w") as output:
            node = inside(self.spaces[machine], command, env=self.environment, stdout=output, stderr=output)
        self.nodes.append(node)
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            time.sleep(0.1)

    def cable(self, state: str) -> None:
        """Sets the second machine's cable `up` or `down`."""
        ip("-n", self.spaces[2], "link", "set", "port1", state)


@contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """Makes the namespaces, without Ray; ends all that runs in them."""
    spaces = [f"posttrain-{name}-{os.getpid()}" for name in ("a", "b", "bridge")]
    token = folder / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    environment = {
        **os.environ, **CHECKS, "HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    made = Machines(folder, spaces, environment)
    try:
        for space in spaces:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        ip("-n", spaces[2], "link", "add", "name", "bridge", "type", "bridge")
        ip("-n", spaces[2], "link", "set", "bridge", "up")
        for number, space in enumerate(spaces[:2]):
            ends = ("type", "veth", "peer", "name", f"port{number}", "netns", spaces[2])
            ip("link", "add", "eth0", "netns", space, *ends)
            ip("-n", space, "address", "add", f"{made.address(number)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", spaces[2], "link", "set", f"port{number}", "master", "bridge", "up")
        yield made
    finally:
        for space in spaces:
            listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
            for pid in listed.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
        for node in made.nodes:
            node.wait()


# --- a run with a fault --------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run with a fault said: its weights or the error that ended it, and when it noticed what."""

    noticed: list[tuple[float, str]]  # seconds after the fault, sentence
    weights: str = ""
    error: str = ""


def suffer(made: Machines, request: dict[str, Any], fault: Callable[[list[dict[str, Any]]], None]) -> Outcome:
    """Runs, and calls `fault` with the run's workers when the step `request["at"]` has ended."""
    driver = inside(
        made.spaces[0], [PYTHON, "-m", "tests.cluster_network"], env=made.environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=(made.folder / "driver.log").open("a"),
    )  # fmt: skip
    assert driver.stdin and driver.stdout
    print(json.dumps(request), file=driver.stdin, flush=True)
    began, out = float("inf"), Outcome([])
    for line in driver.stdout:
        said = json.loads(line)
        if "workers" in said:
            fault(said["workers"])
            began = time.monotonic()
            print("go on", file=driver.stdin, flush=True)
        elif "note" in said:
            out.noticed.append((said["at"] - began, said["note"]))
        else:
            out.weights, out.error = said["weights"], said["error"]
    assert driver.wait() == 0, (made.folder / "driver.log").read_text()[-2000:]
    return out


def drive() -> None:
    """The driver: reads what to run, and writes lines of JSON."""
    request = json.loads(sys.stdin.readline())
    out, sys.stdout = sys.stdout, sys.stderr
    clusters: list[Cluster] = []
    enter, note, store_note = Cluster.__enter__, Cluster.note, Run.note

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    def entered(self: Cluster) -> Cluster:
        clusters.append(self)
        return enter(self)

    def noted(self: Cluster, text: str) -> None:
        say(note=text, at=time.monotonic())
        note(self, text)

    def stored(self: Run, step: int, event: Event) -> None:
        if "start anew" in event.message:
            say(note=event.message, at=time.monotonic())
        store_note(self, step, event)

    def on_step(step: int, values: Any) -> None:
        if step == request["at"] and len(asked) == 0:
            asked.append(step)
            rows = clusters[-1].record.as_dict()["workers"]
            say(workers=[row for row in rows if row["state"] == "alive"])
            sys.stdin.readline()

    asked: list[int] = []
    Cluster.__enter__, Cluster.note, Run.note = entered, noted, stored
    weights = error = ""
    try:
        recipe = config.resolve(request["algorithm"], {}, request["settings"])
        result = api.start(request["algorithm"], recipe, on_step)
        assert result.summary is not None
        weights = result.summary["weights"]
    except PosttrainError as failure:
        error = f"{type(failure).__name__}: {failure}"
    say(weights=weights, error=error)


if __name__ == "__main__":
    drive()
