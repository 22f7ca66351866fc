"""The process of one worker: makes an object and runs its methods for the driver, one call at a time, in order.

`python -m posttrain.cluster.worker FD` is what cluster/processes.py starts; FD is a connected socket. The worker ends
when the driver closes the connection or dies, whatever it is computing.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from importlib import import_module
from typing import Any

from posttrain.cluster.messages import Buffer, decode, encode, read, write

Reply = Callable[[str, list[Buffer]], None]


class Host:
    """Holds a worker's object and answers calls; every backend uses it."""

    def __init__(self) -> None:
        self._object: Any = None

    def answer(self, parts: list[Buffer], reply: Reply) -> None:
        """Runs one call, (method, arguments). Replies "part" for each value of a generator, then "done" or "raised"."""
        try:
            method, arguments = decode(parts)
            if method == "make":
                kind, arguments = arguments[0], arguments[1:]
                module, _, name = kind.partition(":")
                self._object = getattr(import_module(module), name)(*arguments)
                result = None
            else:
                result = getattr(self._object, method)(*arguments)
            if isinstance(result, Generator):
                for value in result:
                    reply("part", encode(value))
                result = None
            reply("done", encode(result))
        except Exception as error:
            reply("raised", _encoded(error))


def _encoded(error: Exception) -> list[Buffer]:
    """An exception for the driver; one that cannot be pickled becomes a RuntimeError with its text."""
    try:
        parts = encode(error)
        decode(parts)
        return parts
    except Exception:
        return encode(RuntimeError(f"{type(error).__name__}: {error}"))


def main(descriptor: int) -> None:
    """Serves the driver until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    sock = socket.socket(fileno=descriptor)
    calls: queue.SimpleQueue[list[Buffer]] = queue.SimpleQueue()

    def listen() -> None:
        while (parts := read(sock)) is not None:
            calls.put(parts)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    host = Host()

    def reply(kind: str, parts: list[Buffer]) -> None:
        write(sock, [kind.encode(), *parts])

    while True:
        host.answer(calls.get(), reply)


if __name__ == "__main__":
    main(int(sys.argv[1]))
