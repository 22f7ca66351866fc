"""Runs inside a sealed execution: a program, a server for function calls, or tests that call a candidate elsewhere.

This code shares its process with the candidate, which can read and change all of it. That is harmless: it holds no
expected values, and forging a reply is no different from returning it.
"""

from __future__ import annotations

import atexit
import builtins
import os
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from posttrain.rewards.sandbox import encode

CHANNEL = 3
"""File descriptor for frames in both directions."""


def run(order: Mapping[str, Any]) -> int:
    """Executes an order by its `mode` and returns the exit code of the process."""
    if order["mode"] == "program":
        return program(order["source"])
    if order["mode"] == "serve":
        return serve(order["source"], encode.canonical if order["canonical"] else None)
    return examine(order["setup"], order["source"], order["names"], order["entry"])


def program(source: str) -> int:
    """Runs a source like `python FILE`, including threads and exit hooks; returns its exit code."""
    try:
        code = _exit_code(_executed(source, "__main__"))
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code


def serve(source: str, reply_with: Callable[[Any], bytes] | None) -> int:
    """Loads a source and answers requests until the channel closes. The first frame reports whether it was loaded.

    Replies are encoded by `reply_with`, or by default with `dumps`, where objects that are not plain data stay in this
    process and are referred to by a number.
    """
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def refer(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    def resolve(target: int | str) -> Any:
        return objects[target] if isinstance(target, int) else namespace[target]

    def answer(request: bytes) -> bytes:
        operation, target, *rest = encode.loads(request, resolve)
        value = _OPERATIONS[operation](target, *rest)
        return reply_with(value) if reply_with else encode.dumps(value, refer)

    try:
        namespace = _executed(source, "candidate")
    except BaseException as error:
        _send(b"e", _name_of(error))
        return 1
    _send(b"v", b"")
    while (request := _receive()) is not None:
        try:
            reply = answer(request)
        except BaseException as error:
            _send(b"e", _name_of(error))
        else:
            _send(b"v", reply)
    return 0


def examine(setup: str, tests: str, names: list[str], entry: str) -> int:
    """Runs tests in which `names` refer to a candidate in another process. The last frame reports if they passed."""
    try:
        namespace = _executed(setup, "tests")
        namespace |= {name: Remote(name) for name in names}
        exec(compile(tests, "<tests>", "exec"), namespace)
        if entry and "check" in namespace:
            namespace["check"](namespace[entry])
    except BaseException as error:
        _send(b"e", _name_of(error))
        return 1
    _send(b"v", b"")
    return 0


class Remote:
    """Proxy for an object of the candidate: it supports calls and attributes, but no comparison or truth value."""

    __slots__ = ("_target",)

    def __init__(self, target: int | str) -> None:
        object.__setattr__(self, "_target", target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("set", self, name, value)

    def __iter__(self) -> Any:
        return iter(_ask("list", self))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            return object.__getattribute__(self, "_target") == object.__getattribute__(other, "_target")
        raise TypeError("the candidate returned something that is not plain data, which cannot be compared")

    def __bool__(self) -> bool:
        raise TypeError("the candidate returned something that is not plain data, which has no truth value")

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _set(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": _set,
    "list": list,
}


def _ask(*request: Any) -> Any:
    """Sends a request to the candidate and returns the reply; re-raises its exceptions by their built-in name."""
    _send(b"c", encode.dumps(request, lambda value: _target_of(value)))
    reply = _receive()
    if reply is None:
        raise ConnectionError("the candidate has ended")
    if reply[:1] == b"v":
        return encode.loads(reply[1:], Remote)
    name = reply[1:].decode("utf-8", "replace")
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise RuntimeError(name)
    try:
        error = kind()
    except TypeError:  # a few cannot be constructed without arguments
        error = RuntimeError(name)
    raise error


def _target_of(value: Any) -> int | str:
    if type(value) is not Remote:
        raise encode.Unsendable(f"tests pass {type(value).__name__} to the candidate, which is not plain data")
    return object.__getattribute__(value, "_target")


def _executed(source: str, name: str) -> dict[str, Any]:
    """Runs a source as a module and returns its namespace; the code of a SystemExit is stored in `__exit__`."""
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(source.removeprefix("\ufeff"), f"<{name}>", "exec"), module.__dict__)
    except SystemExit as stop:
        if name != "__main__":
            raise
        module.__dict__["__exit__"] = stop.code
    return module.__dict__


def _exit_code(namespace: Mapping[str, Any]) -> int:
    code = namespace.get("__exit__")
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _name_of(error: BaseException) -> bytes:
    return type(error).__name__[:80].encode("utf-8", "replace")


def _send(tag: bytes, content: bytes) -> None:
    rest = memoryview(encode.frame(tag, content))
    while rest:
        rest = rest[os.write(CHANNEL, rest) :]


def _receive() -> bytes | None:
    """The next frame, or None if the other side has closed the channel."""
    head = _read_exactly(4)
    return None if head is None else _read_exactly(struct.unpack(">I", head)[0])


def _read_exactly(count: int) -> bytes | None:
    pieces: list[bytes] = []
    while count:
        piece = os.read(CHANNEL, min(count, 1 << 16))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
