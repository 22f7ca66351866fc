"""HTTP to a server on this machine over a Unix socket, with the standard library.

A Unix socket in a folder that only the user can enter, rather than a port of 127.0.0.1: vLLM's development routes run
whatever they are told and check no key, and every user of the machine can reach a port.
"""

from __future__ import annotations

import json
import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from posttrain.types import JsonView, RolloutError

SHOWN = 300  # characters of a reply that an error repeats


class ServerLost(Exception):
    """The server died, hangs or failed inside; another one may answer the same request."""


class _Connection(HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def call(path: Path, route: str, body: JsonView | None = None, timeout: float = 60.0) -> Any:
    """Sends one request (POST with a body, GET without) and returns the JSON of the reply, None for an empty one.

    Raises ServerLost if the server is dead, does not answer within `timeout` seconds or fails inside (HTTP 5xx), and
    RolloutError if it refuses the request.
    """
    connection = _Connection(path, timeout)
    try:
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        connection.request(method, route, data, {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            status, text = response.status, response.read().decode("utf-8", "replace")
    except TimeoutError:
        raise ServerLost(f"{route} was not answered within {timeout:g} s") from None
    except (OSError, HTTPException) as error:
        raise ServerLost(f"{route} failed ({type(error).__name__}: {error})") from None
    finally:
        connection.close()
    if status >= 500:
        raise ServerLost(f"{route} gave HTTP {status}: {_shown(text)}")
    if status != 200:
        raise RolloutError(f"the vLLM server refused {route}: HTTP {status}: {_shown(text)}.", boundary="generator")
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise ServerLost(f"{route} gave no JSON: {_shown(text)}") from None


def _shown(text: str) -> str:
    return " ".join(text[:SHOWN].split())
