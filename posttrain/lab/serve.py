"""Runs the lab's web server until Ctrl-C."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from posttrain.lab.app import make_app
from posttrain.types import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(root: Path, host: str, port: int, expose: bool, say: Callable[[str], None]) -> None:
    """Serves the runs in `root` until it is stopped. Raises ConfigError if the address cannot be used."""
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; `posttrain lab` expects a folder of runs, a run or a pipeline.")
    beyond = not is_loopback(host)
    if beyond and not expose:
        raise ConfigError(
            f"--host {host} exposes prompts, completions and settings of every run in {root} to other machines. "
            "Add --expose to allow that, or omit --host."
        )
    sock = bind(host, port)
    token = secrets.token_urlsafe(32)
    own = sock.getsockname()[1]
    app = make_app(root, hosts(host, own), token, beyond)
    if beyond:
        say(f"Prompts, completions and settings of all runs in {root} are exposed, unencrypted, to every machine")
        say(f"that can reach {host} and has this address with its token:")
    address = f"http://{_bracketed(host)}:{own}/" + (f"?token={token}" if beyond else "")
    say(f"The lab is running at {address}")
    say("Press Ctrl-C to stop it; runs keep going.")
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off",
                              ws="websockets-sansio", ws_max_size=1 << 16, timeout_graceful_shutdown=2)  # fmt: skip
    sys.setswitchinterval(0.001)  # computing threads yield to the event loop after 1 ms instead of 5
    uvicorn.Server(settings).run(sockets=[sock])


def is_loopback(host: str) -> bool:
    """Whether an address is a loopback address, which no other machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def hosts(host: str, port: int) -> frozenset[str]:
    """The accepted values of the Host header; for a wildcard address, all names and addresses of this machine."""
    named = {_bracketed(host).lower()} | (set(LOOPBACK) if is_loopback(host) else set())
    if host in ("0.0.0.0", "::", "[::]"):
        named = {*LOOPBACK, *(_bracketed(address).lower() for address in _addresses())}
    return frozenset(f"{name}:{port}" for name in named) | frozenset(named if port == 80 else ())


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free port. Raises ConfigError if the port cannot be used."""
    plain = host.strip("[]")
    family = socket.AF_INET6 if ":" in plain else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((plain, port))
        sock.listen(128)  # clients that connect before the server is ready wait instead of being refused
    except (OSError, OverflowError) as error:
        sock.close()
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the lab cannot listen on {host} port {port}: {said}. Choose another port with --port."
        ) from None
    return sock


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _addresses() -> set[str]:
    """This machine's host name and its known addresses."""
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError:
        found = set()
    return {name, *found}
