"""Laws of the sandbox's bytes and of its system call filter, without executing anything in it."""

from __future__ import annotations

import errno
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rewards.sandbox import encode, seccomp

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.complex_numbers(allow_nan=False),
    st.text(st.characters(codec=None)), st.binary(),
    st.integers(-3, 3), st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.0**53, 1e300, 1 + 0j]),
)  # fmt: skip
hashable = st.recursive(scalars, lambda inner: st.tuples(inner) | st.frozensets(inner, max_size=3), max_leaves=5)
values = st.recursive(
    scalars | st.sets(hashable, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(hashable, inner, max_size=3),
    max_leaves=10,
)


def turned(value: Any) -> Any:
    """An equal value made of other types and in another order."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int) and abs(value) < 2**53:
        return complex(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bytes):
        return bytearray(value)
    if isinstance(value, dict):
        return {k: turned(v) for k, v in reversed(value.items())}
    if isinstance(value, list | tuple):
        return type(value)(map(turned, value))
    return frozenset(value) if type(value) is set else value


@given(values, values)
def test_canonical_bytes_are_equal_exactly_where_the_values_are(a: Any, b: Any) -> None:
    assert (encode.canonical(a) == encode.canonical(b)) == (a == b)


@given(values)
def test_canonical_bytes_do_not_depend_on_type_or_order(value: Any) -> None:
    assert turned(value) == value
    assert encode.canonical(turned(value)) == encode.canonical(value)


def typed(value: Any) -> Any:
    """A value with the type of every part, and the order of dictionaries."""
    if isinstance(value, dict):
        return dict, [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), list(map(typed, value))
    if isinstance(value, set | frozenset):
        return type(value), sorted(repr(typed(item)) for item in value)
    return type(value), repr(value)


@given(values)
def test_what_is_sent_comes_back_with_its_types_and_order(value: Any) -> None:
    assert typed(encode.loads(encode.dumps(value))) == typed(value)


@given(st.binary(max_size=60))
def test_any_other_bytes_are_a_value_or_unsendable(data: bytes) -> None:
    with suppress(encode.Unsendable):
        encode.loads(data)


@given(values, st.data())
def test_a_damaged_message_is_a_value_or_unsendable(value: Any, data: st.DataObject) -> None:
    message = bytearray(encode.dumps(value))
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with suppress(encode.Unsendable):
        encode.loads(bytes(message))


def test_a_message_is_bounded_in_depth_and_in_values() -> None:
    deep: list[Any] = []
    for _ in range(encode.DEPTH + 1):
        deep = [deep]
    loop: list[Any] = []
    loop.append(loop)
    for value in (deep, loop, [0] * encode.NODES):
        with pytest.raises(encode.Unsendable, match="levels of nesting"):
            encode.dumps(value)
        with pytest.raises(encode.Unsendable, match="levels of nesting"):
            encode.canonical(value)
    for message in (b"l1:" * 70 + b"N", b"l199999999999:", b"l9:" + b"N" * 8, b"s5:abc", b"NN", b"", b"x", b"hN"):
        with pytest.raises(encode.Unsendable):
            encode.loads(message)


def test_nan_can_travel_but_not_be_compared() -> None:
    assert math.isnan(encode.loads(encode.dumps(float("nan"))))
    with pytest.raises(encode.Unsendable, match="NaN equals nothing"):
        encode.canonical([float("nan")])


def test_built_in_types_travel_by_name() -> None:
    assert encode.loads(encode.dumps([int, {str: dict}])) == [int, {str: dict}]
    for message in (b"y4:type", b"y4:eval", b"y0:"):
        with pytest.raises(encode.Unsendable):
            encode.loads(message)
    with pytest.raises(encode.Unsendable):
        encode.dumps(type)


def test_objects_travel_as_what_they_are_called() -> None:
    thing = object()
    message = encode.dumps([thing, encode.Reference("f")], lambda value: 7 if value is thing else 8)
    assert encode.loads(message, lambda target: ("the", target)) == [("the", 7), ("the", "f")]
    for reader in (message, encode.dumps(encode.Reference(1))):
        with pytest.raises(encode.Unsendable, match="unexpected reference"):
            encode.loads(reader)


# --- the filter -----------------------------------------------------------------------------------------------------

ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+) (\d+)"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+) (\d+)"),
}
TABLES = seccomp._PLAIN | seccomp._PROCESSES | seccomp._WITH_ARGUMENTS


def decision(machine: str, number: int, *arguments: int, processes: bool = False, arch: int | None = None) -> int | str:
    """What the program says of a call: 0 allowed, an errno, or "kill". Executes it as the kernel would."""
    words = [number & 0xFFFFFFFF, ARCHITECTURE[machine] if arch is None else arch, 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF]
    program, at, held = seccomp.program(processes, machine), 0, 0
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == seccomp.LOAD:
            held = words[constant // 4]
        elif code == seccomp.AND:
            held &= constant
        elif code == seccomp.RETURN:
            return "kill" if constant == seccomp.KILL else 0 if constant == seccomp.ALLOW else constant & 0xFFFF
        else:
            truth = held == constant if code == seccomp.EQUAL else held >= constant
            at += if_true if truth else if_false


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_calls_are_those_of_the_kernels_headers(machine: str) -> None:
    header, pattern = HEADERS[machine]
    if not header.exists():
        pytest.skip(f"needs {header}")
    known = {name: int(number) for name, number in re.findall(pattern, header.read_text())}
    known.setdefault("newfstatat", known.get("fstatat", -1))  # the same call has two names
    column = list(HEADERS).index(machine)
    for name, row in TABLES.items():
        assert row[column] == known.get(name, -1), name


@pytest.mark.parametrize("machine", HEADERS)
@pytest.mark.parametrize("processes", [False, True])
def test_exactly_the_named_calls_are_allowed(machine: str, processes: bool) -> None:
    allowed = set(seccomp.numbers(processes, machine))
    column = list(HEADERS).index(machine)
    judged = {row[column] for row in seccomp._WITH_ARGUMENTS.values()}
    for number in set(range(600)) - judged:
        wanted = 0 if number in allowed else errno.EPERM
        assert decision(machine, number, processes=processes) == wanted, number


def test_calls_of_another_architecture_kill() -> None:
    assert decision("x86_64", 0x40000000) == "kill"
    assert decision("x86_64", 1, arch=0x40000003) == "kill"
    assert decision("aarch64", 64, arch=0xC000003E) == "kill"


@pytest.mark.parametrize(
    ("name", "arguments", "processes", "wanted"),
    [
        ("clone", (0x3D0F00,), False, 0),  # as the C library starts a thread
        ("clone", (17,), False, errno.EPERM),  # as it forks
        ("clone", (17,), True, 0),
        ("clone", (0x10000000 | 17,), True, errno.EPERM),  # a user namespace
        ("clone", (0x20000 | 0x3D0F00,), False, errno.EPERM),  # a mount namespace
        ("clone3", (), True, errno.ENOSYS),
        ("socketpair", (1, 1), False, 0),
        ("socketpair", (1, 1 | 0x80800), False, 0),
        ("socketpair", (1, 2), False, errno.EPERM),
        ("socketpair", (2, 1), False, errno.EPERM),
        ("sendto", (5, 6, 7, 8, 0), False, 0),
        ("sendto", (5, 6, 7, 8, 1 << 40), False, errno.EPERM),  # an address above 4 GiB
        ("fcntl", (5, 3), False, 0),
        ("fcntl", (5, 8), False, errno.EPERM),  # F_SETOWN
        ("fcntl", (5, 10), False, errno.EPERM),  # F_SETSIG
        ("ioctl", (1, 0x5412), False, errno.EPERM),  # TIOCSTI
        ("prlimit64", (0, 7, 0, 1), False, 0),
        ("prlimit64", (0, 7, 1 << 33), False, errno.EPERM),
        ("prlimit64", (9, 7, 0, 1), False, errno.EPERM),
        ("prctl", (15,), False, 0),
        ("prctl", (22,), False, errno.EPERM),
    ],
)
@pytest.mark.parametrize("machine", HEADERS)
def test_arguments_decide_for_a_few(
    machine: str, name: str, arguments: tuple[int, ...], processes: bool, wanted: int
) -> None:
    number = seccomp._WITH_ARGUMENTS[name][list(HEADERS).index(machine)]
    assert decision(machine, number, *arguments, processes=processes) == wanted


def test_another_architecture_is_refused() -> None:
    with pytest.raises(OSError, match="unsupported architecture riscv64; system calls are known for x86_64, aarch64"):
        seccomp.program(False, "riscv64")
