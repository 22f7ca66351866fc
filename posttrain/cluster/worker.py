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
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from posttrain import __version__
from posttrain.cluster.messages import Buffer, decode, encode, read, write
from posttrain.types import ConfigError

Reply = tuple[str, list[Buffer]]
ADDRESS = "POSTTRAIN_NODE_ADDRESS"  # where other workers reach this one; set by the backend
LOADED = ("posttrain.cluster.rank", "posttrain.cluster.sampler", "posttrain.cluster.judges")
UNKNOWN = -1  # the exit status of a process that another has forked
LOOK = 1.0  # seconds between two looks whether the driver is alive
FORK, WAIT = b"f", b"w"  # requests: fork a worker for the two descriptors sent along; wait for a worker's end


class Host:
    """Holds a worker's object and answers calls; every backend uses it."""

    def __init__(self) -> None:
        self._object: Any = None
        self._unmade: Exception | None = None  # why there is no object

    def answer(self, parts: Sequence[Buffer]) -> Iterator[Reply]:
        """Runs a call, (method, arguments). Yields a "part" for each value of a generator, then "done" or "raised".

        "make" makes the object; "about" is answered for every object, and without one.
        """
        try:
            method, arguments = decode(parts)
            if self._unmade is not None:
                raise self._unmade
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
            if self._object is None:
                self._unmade = error
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
    """Loads the package, then forks workers until the driver closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    driver = os.getppid()
    sock = socket.socket(fileno=descriptor)
    _load(driver)
    workers: set[int] = set()  # that have not been waited for
    try:
        while True:
            _answer(sock, driver, workers)
    except ConnectionError:  # the driver has died before it got its answer
        _end(workers)


def _answer(sock: socket.socket, driver: int, workers: set[int]) -> None:
    """Waits for a request and answers it; ends if the driver has died."""
    while not select.select([sock], [], [], LOOK)[0]:
        if os.getppid() != driver:  # another process may hold the connection, if the driver has forked
            _end(workers)
    request, descriptors, _, _ = socket.recv_fds(sock, 1, 2)
    size = sock.recv(8, socket.MSG_WAITALL) if request else b""
    if len(size) < 8:
        _end(workers)
    body = json.loads(sock.recv(struct.unpack("<Q", size)[0], socket.MSG_WAITALL))
    if request == WAIT:
        known = body in workers  # not if it was forked by a process before this one, which has died
        sock.sendall(struct.pack("<q", os.waitpid(body, 0)[1] if known else UNKNOWN))
        workers.discard(body)
        return
    pid = os.fork()
    if pid == 0:
        sock.close()
        connection, output = descriptors
        _begin(connection, output, body)
    with suppress(OSError):  # it may have ended
        os.setpgid(pid, pid)  # here too, so that it can be ended as a group from now on
    workers.add(pid)
    for one in descriptors:
        os.close(one)
    sock.sendall(struct.pack("<q", pid))


def _load(driver: int) -> None:
    """Imports what workers need; ends if the driver dies meanwhile."""
    loaded = threading.Event()

    def watch() -> None:
        while not loaded.wait(LOOK):
            if os.getppid() != driver:
                os._exit(0)

    watching = threading.Thread(target=watch)
    watching.start()
    for module in LOADED:
        import_module(module)
    loaded.set()
    watching.join()  # a process with threads must not fork


def _end(workers: set[int]) -> NoReturn:
    """Ends with all workers: also those that are stopped, and what they have started."""
    for pid in workers:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def _begin(connection: int, output: int, environment: dict[str, str]) -> None:
    """The life of a forked worker; never returns."""
    try:
        with suppress(PermissionError):  # the parent has done it
            os.setpgid(0, 0)  # so that it is ended together with what it starts
        for standard in (1, 2):
            os.dup2(output, standard)
        os.close(output)
        os.environ.clear()
        os.environ.update(environment)
        serve(socket.socket(fileno=connection))
    except BaseException:  # SystemExit, too: the driver repeats what it said
        traceback.print_exc()
    finally:
        os._exit(1)


def _fill_standard() -> None:
    """Opens what is closed of the descriptors 0, 1 and 2, so that no connection gets their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


if __name__ == "__main__":
    _fill_standard()
    main(int(sys.argv[1]))
