"""A server process: its start, its log, its end. It cannot outlive the process that started it (watch.py)."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from posttrain.rollout.servers import client, watch

POLL = 0.05  # seconds between two looks at a server that starts
LAST_LINES, LONGEST_LINE = 3, 200  # of the log, in errors
LONGEST_PATH = 100  # bytes; the kernel's limit for the address of a Unix socket is 107
CAUSE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+)")
NOT_A_CAUSE = re.compile(r"See (root cause|stack trace)|WARNING")  # what vLLM raises after the error that matters


class StartError(Exception):
    """The server did not start; the message ends with its log's last lines."""


class Server:
    """A running server with an HTTP API at the Unix socket `socket`. `pid` is the server's, not the watchdog's."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], health: str, limit: float
    ) -> None:
        """Starts `command`, to which the socket's path is added as `--uds`, and waits until `health` answers.

        `folder` is the caller's temporary folder; it is removed if this process dies. Raises StartError if the server
        ends, or does not answer within `limit` seconds.
        """
        self.socket, self.log = folder / "s", folder / "log"
        self.socket.unlink(missing_ok=True)
        self.log.write_bytes(b"")
        self._watchdog = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                watch.__file__,
                str(self.log),
                str(folder),
                *command,
                "--uds",
                str(self.socket),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment},
            start_new_session=True,
        )
        assert self._watchdog.stdout is not None
        line = self._watchdog.stdout.readline()
        if not line:
            self._watchdog.wait()
            raise StartError(f"{command[0]} cannot be executed")
        self._watchdog.stdout.close()
        self.pid = int(line)
        self._wait(health, limit)

    def _wait(self, health: str, limit: float) -> None:
        begun = time.monotonic()
        while True:
            try:
                client.call(self.socket, health, timeout=max(1.0, limit / 10))
                return
            except client.ServerLost:
                status = self._watchdog.poll()
            if status is not None:
                raise StartError(f"it ended with exit status {status}: {self.last_words()}")
            if time.monotonic() - begun > limit:
                self.kill()
                raise StartError(f"it did not answer within {limit:g} s: {self.last_words()}")
            time.sleep(POLL)

    @property
    def alive(self) -> bool:
        """Whether the process exists; a hanging one does."""
        return self._watchdog.poll() is None

    def kill(self) -> None:
        """Ends the server and everything it started."""
        pipe = self._watchdog.stdin
        if pipe is None or pipe.closed:
            return
        with suppress(BrokenPipeError):  # the watchdog and so the server ended before
            pipe.write(b"k")
            pipe.flush()
        self._watchdog.wait()
        with suppress(BrokenPipeError):
            pipe.close()

    def last_words(self) -> str:
        """The first error in the log, if one is recognised, and the last lines."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        found = (CAUSE.search(line) for line in lines if not NOT_A_CAUSE.search(line))
        cause = next((match[1] for match in found if match), "")
        last = " | ".join(line[:LONGEST_LINE] for line in lines[-LAST_LINES:]) or "nothing"
        return f"{cause[: 2 * LONGEST_LINE]} (its log ends with: {last})" if cause else f"its log ends with: {last}"
