"""The lock of a run folder belongs to one process, and goes with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.store.durable import FolderLock, is_locked
from posttrain.types import ResumeError

CHILD = """
import os, sys, time
from pathlib import Path
from posttrain.store.durable import FolderLock
lock = FolderLock(Path(sys.argv[1]))
worker = os.fork()  # as a reward's process pool does
if worker == 0:
    time.sleep(600)
print(worker, flush=True)
time.sleep(600)
"""


def test_a_forked_worker_does_not_keep_the_lock_of_a_run_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            assert is_locked(tmp_path)
            with pytest.raises(ResumeError, match="in use by another process"):
                FolderLock(tmp_path, patience=0)
            process.kill()
            process.wait()
            os.kill(worker, 0)  # it lives on
            assert not is_locked(tmp_path)
            FolderLock(tmp_path, patience=0).release()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_fork_does_not_take_the_lock_away_either(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    worker = os.fork()
    if worker == 0:
        os._exit(0)
    os.waitpid(worker, 0)
    assert is_locked(tmp_path)
    lock.release()
    assert not is_locked(tmp_path)
