"""Starts and stops the head of a Ray cluster on this machine, with a token, without a dashboard or usage reports."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from posttrain.types import ConfigError

TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes Ray listen on 127.0.0.1 alone, as it does on macOS; otherwise it replaces that by the machine's own address."""
STARTED = "Ray runtime started"  # what `ray start` prints when the node is ready
PATIENCE = 120.0  # seconds for Ray to start, and to stop


@dataclass(frozen=True)
class Head:
    """A head node that `start` has started: where it listens, its process and the file with its token."""

    host: str
    port: int
    pid: int
    token: str

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def is_loopback(address: str) -> bool:
    """Whether an address, with or without a port, is of this machine alone."""
    return address.partition(":")[0] in ("127.0.0.1", "localhost")


def token_file() -> Path:
    """Where Ray looks for the token of a cluster: RAY_AUTH_TOKEN_PATH, else `~/.ray/auth_token`."""
    return Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def _record() -> Path:
    return Path.home() / ".ray" / "posttrain-head.json"


def running() -> Head | None:
    """The head node that was started here and still runs."""
    try:
        head = Head(**json.loads(_record().read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    return head if _alive(head.pid) else None


def start(host: str, port: int, cpus: int | None = None) -> Head:
    """Starts a head node that listens at `host`:`port`, and returns when it is ready.

    `cpus` is how many workers it takes; None is one for each CPU of the machine.

    Raises ConfigError if Ray is not installed, the port is in use, one already runs, or other users can read the token.
    """
    if find_spec("ray") is None:
        raise ConfigError("Ray is not installed. Install posttrain[ray].")
    if head := running():
        raise ConfigError(f"a cluster already runs at {head.address}. Stop it with `posttrain cluster down`.")
    _check_port(host, port)
    token = _token()
    environment = {**os.environ, **QUIET, TOKEN_PATH: str(token)} | (LOOPBACK if is_loopback(host) else {})
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--node-ip-address={host}",
               f"--port={port}", "--include-dashboard=false", "--disable-usage-stats"]  # fmt: skip
    command += [f"--num-cpus={cpus}"] if cpus else []
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE
        while STARTED not in (said := _read(output.fileno())):
            if process.poll() is not None or time.monotonic() > deadline:
                _stop(process.pid)
                lines = [line.strip() for line in said.splitlines() if line.strip()]
                raise ConfigError(f"Ray did not start at {host}:{port}: {lines[-1] if lines else 'it said nothing'}")
            time.sleep(0.1)
    process.returncode = 0  # it outlives this process, which Popen would warn about
    head = Head(host, port, process.pid, str(token))
    _record().parent.mkdir(mode=0o700, exist_ok=True)
    _record().write_text(json.dumps(asdict(head)) + "\n", encoding="utf-8")
    return head


def stop() -> Head | None:
    """Stops the head node that `start` has started, and what runs on this machine for it; None if there is none."""
    head = running()
    if head is not None:
        _stop(head.pid)
    _record().unlink(missing_ok=True)
    return head


def join_command(head: Head) -> str:
    """What to run on another machine that has a copy of the token's file."""
    settings = " ".join(f"{name}={value}" for name, value in joining(head).items())
    return f"{settings} ray start --address={head.address}"


def joining(head: Head) -> Mapping[str, str]:
    """Environment variables for a machine that joins."""
    default = Path.home() / ".ray" / "auth_token"
    return QUIET if Path(head.token) == default else {**QUIET, TOKEN_PATH: head.token}


def _token() -> Path:
    """The token's file, which is made if there is none. Raises ConfigError if other users can read it."""
    path = token_file()
    with suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"other users can read or change the cluster's token, {path}, and whoever has it can run programs as you. "
            f"Make a new one (rm {path}), or chmod 600 {path} if nobody has read it."
        )
    return path


def _check_port(host: str, port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host}:{port}: {error.strerror}. Choose another --port or --host."
            ) from None


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 20, 0).decode("utf-8", "replace")


def _stop(pid: int) -> None:
    """Ends `ray start --block`, which ends what it has started; by force when it takes too long."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    """Whether the process runs `ray start`; a child that has ended is waited for."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    done = subprocess.run(["ps", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True)
    return "start --head" in done.stdout and not done.stdout.strip().startswith("Z")
