"""Safe serialisation of plain values: two encodings and a bounded decoder, without pickle or code execution.

`canonical` produces the same bytes for two values exactly if they are equal in Python: `1 == 1.0 == True`, sets and
dictionaries in any order, but `[1] != (1,)`. It is only for comparison. `dumps` keeps types and order, and `loads`
restores the values. Messages are sent as frames: a length of four bytes, then a tag and its content.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DEPTH, NODES = 60, 200_000
"""Maximum nesting depth and number of values in one message."""
TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}
"""Types that can be sent as values, by name; some tests pass one."""

Refer = Callable[[Any], int | str]
Resolve = Callable[[int | str], Any]


class Reference:
    """A reference to an object on the other side, by name or number; `loads` passes it to `resolve`."""

    def __init__(self, target: int | str) -> None:
        self.target = target


class Unsendable(ValueError):
    """A value that cannot be encoded: unsupported type, NaN in a comparison, too deeply nested or too large."""


def canonical(value: Any) -> bytes:
    """Bytes that are equal if and only if the values are. Raises Unsendable, also for NaN, which equals nothing."""
    return _canonical(value, _Budget(), 0)


def dumps(value: Any, refer: Refer | None = None) -> bytes:
    """Encodes a value for `loads`. Anything but plain data is replaced by the name or number from `refer`."""
    out: list[bytes] = []
    _dump(value, out, _Budget(), 0, refer)
    return b"".join(out)


def loads(data: bytes, resolve: Resolve | None = None) -> Any:
    """Decodes a value written by `dumps`. Raises Unsendable for invalid bytes."""
    reader = _Reader(data, resolve)
    try:
        value = reader.value(0)
    except Unsendable:
        raise
    except (ValueError, TypeError, struct.error, OverflowError) as error:
        raise Unsendable(f"invalid message: {error}") from None
    if reader.at != len(data):
        raise Unsendable(f"{len(data) - reader.at} extra bytes after the message")
    return value


def frame(tag: bytes, content: bytes = b"") -> bytes:
    """A frame: the length, a tag of one byte, and the content."""
    return struct.pack(">I", len(content) + 1) + tag + content


class _Budget:
    def __init__(self) -> None:
        self.nodes = 0

    def spend(self, depth: int) -> None:
        self.nodes += 1
        if depth > DEPTH or self.nodes > NODES:
            raise Unsendable(f"more than {DEPTH} levels of nesting or {NODES} values")


def _number(value: Any) -> bytes:
    """Encodes a number as an exact ratio, so that equal numbers of different types get the same bytes."""
    if isinstance(value, complex) and value.imag:
        return b"c" + _number(value.real) + _number(value.imag)
    real = value.real
    if isinstance(real, float):
        if real != real:
            raise Unsendable("NaN equals nothing")
        if real in (float("inf"), -float("inf")):
            return b"q%s;" % (b"inf" if real > 0 else b"-inf")
    over, under = real.as_integer_ratio()
    return b"q%x/%x;" % (over, under)


def _canonical(value: Any, budget: _Budget, depth: int) -> bytes:
    budget.spend(depth)
    if value is None:
        return b"N"
    if isinstance(value, int | float | complex):
        return _number(value)
    if isinstance(value, str):
        content = value.encode("utf-8", "surrogatepass")
        return b"s%d:%s" % (len(content), content)
    if isinstance(value, bytes | bytearray):
        return b"b%d:%s" % (len(value), bytes(value))
    if isinstance(value, Mapping):
        pairs = ((_canonical(k, budget, depth + 1), _canonical(v, budget, depth + 1)) for k, v in value.items())
        parts = [k + v for k, v in sorted(pairs)]
        return b"d%d:%s" % (len(parts), b"".join(parts))
    tag = _tag(value)
    parts = [_canonical(item, budget, depth + 1) for item in value]
    if tag in b"SZ":
        tag, parts = b"S", sorted(parts)
    return b"%s%d:%s" % (tag, len(parts), b"".join(parts))


def _tag(value: Any) -> bytes:
    for tag, kind in ((b"l", list), (b"t", tuple), (b"S", set), (b"Z", frozenset)):
        if isinstance(value, kind):
            return tag
    raise Unsendable(f"{type(value).__name__} is not plain data")


def _dump(value: Any, out: list[bytes], budget: _Budget, depth: int, refer: Refer | None) -> None:
    budget.spend(depth)
    if value is None or value is True or value is False:
        out.append({None: b"N", True: b"T", False: b"F"}[value])
    elif isinstance(value, int):
        out.append(b"i%x;" % value)
    elif isinstance(value, float):
        out.append(b"f" + struct.pack(">d", value))
    elif isinstance(value, complex):
        out.append(b"c" + struct.pack(">dd", value.real, value.imag))
    elif isinstance(value, str):
        content = value.encode("utf-8", "surrogatepass")
        out.append(b"s%d:%s" % (len(content), content))
    elif isinstance(value, bytes | bytearray):
        out.append(b"b%d:%s" % (len(value), bytes(value)))
    elif isinstance(value, list | tuple | set | frozenset):
        out.append(b"%s%d:" % (_tag(value), len(value)))
        for item in value:
            _dump(item, out, budget, depth + 1, refer)
    elif isinstance(value, dict):
        out.append(b"d%d:" % len(value))
        for pair in value.items():
            for item in pair:
                _dump(item, out, budget, depth + 1, refer)
    elif isinstance(value, type) and TYPES.get(value.__name__) is value:
        out.append(b"y%d:%s" % (len(value.__name__), value.__name__.encode()))
    elif isinstance(value, Reference):
        out.append(b"h")
        _dump(value.target, out, budget, depth + 1, None)
    elif refer is not None:
        out.append(b"h")
        _dump(refer(value), out, budget, depth + 1, None)
    else:
        raise Unsendable(f"{type(value).__name__} is not plain data")


class _Reader:
    """Decodes one message; every length is checked against the remaining bytes before anything is allocated."""

    def __init__(self, data: bytes, resolve: Resolve | None) -> None:
        self.data, self.at, self.budget, self.resolve = data, 0, _Budget(), resolve

    def value(self, depth: int) -> Any:
        self.budget.spend(depth)
        tag = self.take(1)
        if tag in b"NTF":
            return {b"N": None, b"T": True, b"F": False}[tag]
        if tag == b"i":
            return int(self.until(b";"), 16)
        if tag == b"f":
            return struct.unpack(">d", self.take(8))[0]
        if tag == b"c":
            return complex(*struct.unpack(">dd", self.take(16)))
        if tag == b"h":
            target = self.value(depth + 1)
            if self.resolve is None or not isinstance(target, int | str):
                raise Unsendable("unexpected reference")
            return self.resolve(target)
        return self.sized(tag, depth)

    def sized(self, tag: bytes, depth: int) -> Any:
        size = int(self.until(b":"))
        if not 0 <= size <= len(self.data) - self.at:
            raise Unsendable(f"length {size} with only {len(self.data) - self.at} bytes left")
        if tag == b"s":
            return self.take(size).decode("utf-8", "surrogatepass")
        if tag == b"b":
            return self.take(size)
        if tag == b"y":
            return self.type_named(self.take(size).decode("ascii", "replace"))
        if tag == b"d":
            return {self.value(depth + 1): self.value(depth + 1) for _ in range(size)}
        kinds: dict[bytes, Callable[[Iterator[Any]], Any]] = {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset}
        if tag not in kinds:
            raise Unsendable(f"unknown tag {tag!r}")
        return kinds[tag](self.value(depth + 1) for _ in range(size))

    def type_named(self, name: str) -> type:
        if name not in TYPES:
            raise Unsendable(f"the type {name!r} cannot be sent")
        return TYPES[name]

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise Unsendable("the message is truncated")
        self.at += count
        return piece

    def until(self, mark: bytes) -> bytes:
        end = self.data.find(mark, self.at)
        if end < 0:
            raise Unsendable("the message is truncated")
        piece = self.data[self.at : end]
        self.at = end + 1
        return piece
