"""The process of one worker: makes an object and runs its methods for the driver, one call at a time, in order.

`python -m posttrain.cluster.worker FD` is started once by cluster/processes.py. It loads the package and forks a worker
for each request, so that a worker starts in a moment. A worker ends when the driver closes its connection or dies,
whatever it is computing.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import signal
import socket
import struct
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from posttrain import __version__
from posttrain.cluster.messages import Buffer, decode, encode, read, write
from posttrain.types import ConfigError

Reply = tuple[str, list[Buffer]]
ADDRESS = "POSTTRAIN_NODE_ADDRESS"  # where other workers reach this one; set by the backend
LOADED = ("posttrain.cluster.rank", "posttrain.cluster.sampler", "posttrain.cluster.judges")
FORK, WAIT = b"f", b"w"  # requests: fork a worker for the two descriptors sent along; wait for a worker's end


class Host:
    """Holds a worker's object and answers calls; every backend uses it."""

    def __init__(self) -> None:
        self._object: Any = None

    def answer(self, parts: Sequence[Buffer]) -> Iterator[Reply]:
        """Runs a call, (method, arguments). Yields a "part" for each value of a generator, then "done" or "raised".

        "make" makes the object; "about" is answered for every object, and without one.
        """
        try:
            method, arguments = decode(parts)
            if method == "make":
                kind, arguments = arguments[0], arguments[1:]
                module, _, name = kind.partition(":")
                check_versions(arguments[0])
                self._object = getattr(import_module(module), name)(*arguments[1:])
                result = None
            elif method == "about":
                result = about()
            else:
                result = getattr(self._object, method)(*arguments)
            if isinstance(result, Generator):
                for value in result:
                    yield "part", encode(value)
                result = None
            yield "done", encode(result)
        except Exception as error:
            yield "raised", _encoded(error)


def versions() -> dict[str, str]:
    """What must be equal on all machines of a cluster, so that they compute the same."""
    torch, transformers = import_module("torch"), import_module("transformers")
    return {
        "posttrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "CPU": torch.backends.cpu.get_cpu_capability(),
    }


def about() -> tuple[dict[str, str], int, dict[str, bool]]:
    """This process's versions and CPU threads, and which sandbox tiers work on its machine."""
    tiers = import_module("posttrain.rewards.sandbox.pool").probe() if platform.system() == "Linux" else []
    return versions(), import_module("torch").get_num_threads(), {name: works for name, works, _ in tiers}


def check_versions(expected: Mapping[str, str]) -> None:
    """Raises ConfigError if this machine has other versions than the driver's."""
    for name, own in versions().items():
        if own != expected[name]:
            raise ConfigError(
                f"a worker on {platform.node()} has {name} {own}, but the run's process has {expected[name]}. All "
                "machines of a cluster must be alike."
            )


def _encoded(error: Exception) -> list[Buffer]:
    """An exception for the driver; one that cannot be pickled becomes a RuntimeError with its text."""
    try:
        parts = encode(error)
        decode(parts)
        return parts
    except Exception:
        return encode(RuntimeError(f"{type(error).__name__}: {error}"))


def serve(sock: socket.socket) -> None:
    """Serves the driver until it closes the connection."""
    calls: queue.SimpleQueue[list[Buffer]] = queue.SimpleQueue()

    def listen() -> None:
        while (parts := read(sock)) is not None:
            calls.put(parts)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    host = Host()

    while True:
        for kind, parts in host.answer(calls.get()):
            write(sock, [kind.encode(), *parts])


def main(descriptor: int) -> None:
    """Loads the package, then forks workers until the driver closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    sock = socket.socket(fileno=descriptor)
    for module in LOADED:
        import_module(module)
    while True:
        request, descriptors, _, _ = socket.recv_fds(sock, 1, 2)
        if not request:
            os._exit(0)
        size = struct.unpack("<Q", sock.recv(8, socket.MSG_WAITALL))[0]
        body = json.loads(sock.recv(size, socket.MSG_WAITALL))
        if request == WAIT:
            status = int(signal.SIGKILL)  # unknown for a worker that an earlier process has forked
            with suppress(ChildProcessError):
                status = os.waitpid(body, 0)[1]
            sock.sendall(struct.pack("<q", status))
            continue
        pid = os.fork()
        if pid == 0:
            sock.close()
            _begin(*descriptors, body)
        for one in descriptors:
            os.close(one)
        sock.sendall(struct.pack("<q", pid))


def _begin(connection: int, output: int, environment: dict[str, str]) -> None:
    """The life of a forked worker; never returns."""
    try:
        os.setsid()  # so that it is ended together with what it starts
        for standard in (1, 2):
            os.dup2(output, standard)
        os.close(output)
        os.environ.clear()
        os.environ.update(environment)
        serve(socket.socket(fileno=connection))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
