"""Drivers of clusters that are killed, forked from a process that has loaded everything, and so are their workers.

It reads one JSON request per line, with "folder", "algorithm" and "settings" of a run, and when it is to be killed:
"failpoint", "kill_after" or "kill_at_step", with "signal". It starts or resumes the run, and answers with the exit code
of its process and the seconds that any other process of the run has lived longer; LONGEST if one is still there.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from posttrain import api, config
from posttrain.cluster import processes, worker
from posttrain.models.kernels.build import library
from posttrain.store import failpoints
from tests.run_server import steps_of

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: processes whose parents have died become children of this one
LONGEST = 10.0  # seconds


class Forked:
    """What processes.py asks of the process that forks workers."""

    def __init__(self, pid: int) -> None:
        self.pid, self._status = pid, None

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.01)
        return status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def spawn(end: socket.socket) -> Any:
    """Forks the process that forks workers, instead of starting Python once more."""
    if pid := os.fork():
        return Forked(pid)
    os.setsid()
    os.dup2(end.fileno(), 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))  # the driver's end too
    worker.main(3)


def live(request: dict[str, Any]) -> None:
    """One life: starts the run, or resumes it where the folder has one."""
    folder = Path(request["folder"])
    os.environ |= {failpoints.VARIABLE: request.get("failpoint") or ""}
    processes.spawn = spawn
    processes.open(config.ClusterConfig())
    if (folder / "run.json").exists():
        result = api.resume(folder)
    else:
        algorithm = request["algorithm"].split("+")[0]
        settings = request["settings"] | {"run.out": str(folder)}
        result = api.start(algorithm, config.resolve(algorithm, {}, settings))
    Path(f"{folder}.hits").write_text(json.dumps(failpoints.hits))
    os._exit(0 if result.summary else 40 + result.stopped_by)


def serve() -> None:
    """Answers requests until the input closes."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    library()
    for module in worker.LOADED:
        import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            os.setpgid(0, 0)
            try:
                live(request)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        number = request.get("signal", signal.SIGKILL)
        if request.get("kill_at_step") is not None:
            ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while steps_of(Path(request["folder"])) < request["kill_at_step"] and not os.waitid(os.P_PID, child, ended):
                time.sleep(0.01)
            os.killpg(child, number)  # as Ctrl-C in a terminal
        elif request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([code, outlived()]), flush=True)


def outlived() -> float:
    """Waits for the processes that a driver has left, which are now children of this one; returns the seconds."""
    began = time.monotonic()
    while time.monotonic() - began < LONGEST:
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # none
            return time.monotonic() - began
        time.sleep(0.01)
    return LONGEST


if __name__ == "__main__":
    serve()
