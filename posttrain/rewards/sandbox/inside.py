"""What an execution does once it is sealed: run a program, answer calls, or hold tests that call into another one.

This code shares its process with the candidate, which may read and change all of it. That is no loss: it knows no
answers, and to forge what it sends is to answer.
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
"""File descriptor through which frames come and go."""


def run(order: Mapping[str, Any]) -> int:
    """Does what `order["mode"]` says; returns the exit code of the process."""
    if order["mode"] == "program":
        return program(order["source"])
    if order["mode"] == "serve":
        return serve(order["source"], encode.canonical if order["canonical"] else None)
    return examine(order["setup"], order["source"], order["names"], order["entry"])


def program(source: str) -> int:
    """Runs a source as Python runs a file, to the last thread and exit hook; its exit code."""
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
    """Loads a source and answers requests until the channel ends. The first frame says whether it could be loaded.

    Replies are `reply_with` of the value, or without it `dumps`, in which objects that are no data stay here and are
    known outside by a number.
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
    """Runs tests in which `names` stand for the candidate's, elsewhere. The last frame says whether they passed."""
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
    """Something of the candidate's, by name or number: it can be called and looked into, never compared or believed."""

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
        raise TypeError("what the candidate returned is no plain data and cannot be compared")

    def __bool__(self) -> bool:
        raise TypeError("what the candidate returned is no plain data and has no truth value")

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
    """One request to the candidate and its reply; an exception there is raised here under the same built-in name."""
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
    except TypeError:  # a few cannot be made without arguments
        error = RuntimeError(name)
    raise error


def _target_of(value: Any) -> int | str:
    if type(value) is not Remote:
        raise encode.Unsendable(f"tests pass {type(value).__name__} to the candidate, which is no plain data")
    return object.__getattribute__(value, "_target")


def _executed(source: str, name: str) -> dict[str, Any]:
    """The namespace of a source run as a module; SystemExit ends it, and its code is under `__exit__`."""
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
    """The next frame, or None when the other side is done."""
    head = _exactly(4)
    return None if head is None else _exactly(struct.unpack(">I", head)[0])


def _exactly(count: int) -> bytes | None:
    pieces: list[bytes] = []
    while count:
        piece = os.read(CHANNEL, min(count, 1 << 16))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
