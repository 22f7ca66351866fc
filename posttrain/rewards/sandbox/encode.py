"""Values as bytes, without pickle or any parser that executes: two encodings and one bounded decoder.

`canonical` gives the same bytes for two values exactly where Python says they are equal: `1 == 1.0 == True`, sets and
dictionaries in any order, but `[1] != (1,)`. It is made to be compared, not read. `dumps` keeps types and order, and
`loads` gives the values back. Frames are what travels: a length of four bytes, then a tag and its content.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DEPTH, NODES = 60, 200_000
"""Deepest nesting and most values in one message."""
TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}
"""Types that can be sent, by name: some tests pass one."""

Refer = Callable[[Any], int | str]
Resolve = Callable[[int | str], Any]


class Reference:
    """Something that lives on the other side, by the name or number it has there; `loads` gives it to `resolve`."""

    def __init__(self, target: int | str) -> None:
        self.target = target


class Unsendable(ValueError):
    """A value that these bytes cannot hold: another type, NaN where values are compared, too deep or too many."""


def canonical(value: Any) -> bytes:
    """Bytes that are equal where the values are. Raises Unsendable; NaN, which equals nothing, is unsendable."""
    return _canonical(value, _Budget(), 0)


def dumps(value: Any, refer: Refer | None = None) -> bytes:
    """Bytes that `loads` reads. What is no plain data is given to `refer`, whose answer travels instead."""
    out: list[bytes] = []
    _dump(value, out, _Budget(), 0, refer)
    return b"".join(out)


def loads(data: bytes, resolve: Resolve | None = None) -> Any:
    """The value that `dumps` wrote. Raises Unsendable for any other bytes."""
    reader = _Reader(data, resolve)
    try:
        value = reader.value(0)
    except Unsendable:
        raise
    except (ValueError, TypeError, struct.error, OverflowError) as error:
        raise Unsendable(f"not a message: {error}") from None
    if reader.at != len(data):
        raise Unsendable(f"{len(data) - reader.at} bytes follow the message")
    return value


def frame(tag: bytes, content: bytes = b"") -> bytes:
    """A tag of one byte and its content, with their length in front."""
    return struct.pack(">I", len(content) + 1) + tag + content


class _Budget:
    def __init__(self) -> None:
        self.nodes = 0

    def spend(self, depth: int) -> None:
        self.nodes += 1
        if depth > DEPTH or self.nodes > NODES:
            raise Unsendable(f"nested deeper than {DEPTH} or more than {NODES} values")


def _number(value: Any) -> bytes:
    """An exact ratio, so that equal numbers of different types have one form."""
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
    raise Unsendable(f"{type(value).__name__} is no plain data")


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
        raise Unsendable(f"{type(value).__name__} is no plain data")


class _Reader:
    """Reads one message; every length is held against what is there before anything is made of it."""

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
                raise Unsendable("a reference where none can be")
            return self.resolve(target)
        return self.sized(tag, depth)

    def sized(self, tag: bytes, depth: int) -> Any:
        size = int(self.until(b":"))
        if not 0 <= size <= len(self.data) - self.at:
            raise Unsendable(f"a length of {size} with {len(self.data) - self.at} bytes left")
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
            raise Unsendable(f"{name!r} is no type that can be sent")
        return TYPES[name]

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise Unsendable("the message is cut off")
        self.at += count
        return piece

    def until(self, mark: bytes) -> bytes:
        end = self.data.find(mark, self.at)
        if end < 0:
            raise Unsendable("the message is cut off")
        piece = self.data[self.at : end]
        self.at = end + 1
        return piece
