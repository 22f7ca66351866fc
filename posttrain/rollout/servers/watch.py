"""Watchdog of a server: starts it, and kills it with everything it started once this process's standard input closes.

    python watch.py LOG FOLDER COMMAND …

The parent holds the other end of the pipe, so its death, also by SIGKILL, closes it; then FOLDER is removed as well. A
byte from the parent asks for the server's end. (PR_SET_PDEATHSIG would not do: it reports the end of the thread that
started the server, and does not reach the processes that the server started.) The server's output goes to LOG. Runs
with the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def main(log: str, folder: str, command: list[str]) -> int:
    """Runs the server until it ends or the pipe closes; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the server when it is ready to
    with open(log, "ab") as output:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    print(server.pid, flush=True)

    def listen() -> None:
        while os.read(0, 1):
            _end(server.pid)
        _end(server.pid)
        shutil.rmtree(folder, ignore_errors=True)

    threading.Thread(target=listen, daemon=True).start()
    status = server.wait()
    _end(server.pid)  # processes that the server left behind
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
