"""Code that a model wrote: no wrong answer is paid, nothing outside is touched, and who is to blame is clear."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.rewards.sandbox.host import Execution, Limits, Lost, Report
from posttrain.rewards.sandbox.pool import TIERS, Sandbox, Slot, start_zygote
from posttrain.rewards.sandbox.tasks import Grade, grade, run_python
from posttrain.types import ConfigError, RolloutError
from tests.conftest import SHARED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

CASES_FILE = SHARED / "sandbox" / "cases.jsonl"
CASES = [json.loads(line) for line in CASES_FILE.read_text("utf-8").splitlines()] if CASES_FILE.exists() else []
SECRET = "the-secret-of-the-host"
SUMS = [{"args": [1, 2], "expected": 3}, {"args": [10, -4], "expected": 6}, {"args": [123, 456], "expected": 579}]
CALL = {"kind": "call", "entry": "solve", "cases": SUMS}
STDIN = {
    "kind": "stdin",
    "cases": [{"stdin": "3 4\n", "stdout": "7\n12\n"}, {"stdin": "10 -2\n", "stdout": "8\n-20\n"}],
}
HONEST = "def solve(a, b):\n    return a + b\n"
QUICK, PATIENT = 0.4, 20.0
"""Seconds for what must not pass, which often is an endless loop, and for what must, on a busy machine."""


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Each tier that this machine has, with a secret in the environment that it must not hand on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN", SECRET)
        try:
            made = Sandbox(request.param, slots=1)
        except ConfigError as error:
            pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list[object]]]:
    """A folder with a secret, a port that is listened on, and who has connected to it."""
    folder = tmp_path_factory.mktemp("canary")
    (folder / "secret").write_text(SECRET)
    visitors: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    visitors.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=listen, daemon=True).start()
        yield folder, server.getsockname()[1], visitors
        server.shutdown(socket.SHUT_RDWR)


def graded(sandbox: Sandbox, code: str, spec: Mapping[str, Any] = CALL, seconds: float = QUICK) -> Grade:
    return grade(sandbox, {**spec, "seconds": seconds}, code)


def executed(sandbox: Sandbox, code: str, seconds: float = PATIENT, processes: bool = False) -> Report:
    order = {"mode": "program", "source": code}
    return sandbox.attempt(lambda slot: slot.candidate.start(order, b"", seconds, processes).wait())


def process(execution: Execution) -> subprocess.Popen[bytes]:
    """The zygote's process, seen from outside."""
    assert execution.zygote.process is not None
    return execution.zygote.process


def passes(sandbox: Sandbox) -> bool:
    return graded(sandbox, HONEST, seconds=PATIENT).how == "passed"


# --- the catalogue --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_catalogued_program_ends_as_it_should_and_leaves_the_host_as_it_was(
    sandbox: Sandbox, canary: tuple[Path, int, list[object]], case: dict[str, Any]
) -> None:
    folder, port, visitors = canary
    code = case["code"].replace("/canary", str(folder)).replace("CANARY_PORT", str(port))
    spec = {**(CALL if case["kind"] == "call" else STDIN), "processes": case["procs"]}
    found = graded(sandbox, code, spec, PATIENT if case["expect"] == "one" else QUICK)
    if case["expect"] != "safe":
        assert found.how == "passed" if case["expect"] == "one" else found.how != "passed", found
    if case["group"] == "escape":
        report = executed(sandbox, code, QUICK, case["procs"])
        assert SECRET.encode() not in report.stdout + report.stderr
        assert (
            b"PERSISTED" not in report.stdout and b"connected" not in report.stdout and b"opened" not in report.stdout
        )
    assert {path.name for path in folder.iterdir()} == {"secret"} and (folder / "secret").read_text() == SECRET
    assert not visitors
    assert passes(sandbox)


# --- no wrong answer is paid ----------------------------------------------------------------------------------------

FORGERIES = {
    "a_number_equal_to_all": "class N(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
    "def solve(a, b): return N(0)",
    "a_text_equal_to_all": "class S(str):\n    __eq__ = lambda s, o: True\ndef solve(a, b): return S('x')",
    "a_liar_about_its_class": "class L:\n    __class__ = property(lambda s: int)\ndef solve(a, b): return L()",
    "frames_of_its_own": "import os\nos.write(3, (b'\\0\\0\\0\\1v' * 9))\ndef solve(a, b): return None",
    "a_frame_too_long": "import os\nos.write(3, b'\\xff\\xff\\xff\\xff')\nimport time; time.sleep(9)",
    "half_a_frame": "import os\nos.write(3, b'\\0\\0\\0\\9v'); os._exit(0)",
    "a_closed_channel": "import os\nos.close(3)\ndef solve(a, b): return a + b",
    "a_closed_channel_kept_running": "import os, time\ndef solve(a, b):\n    os.close(3); time.sleep(9)",
    "a_report_of_its_own": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'R')\n    except OSError: pass\n"
    "os._exit(0)",
    "nesting_without_end": "def solve(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "a_list_in_itself": "def solve(a, b):\n    x = []; x.append(x); return x",
    "more_than_is_read": "def solve(a, b): return 'x' * (1 << 25)",
    "a_number_of_many_digits": "def solve(a, b): return 1 << (1 << 27)",
    "not_a_number": "def solve(a, b): return float('nan')",
    "infinity": "def solve(a, b): return float('inf')",
    "a_list_around_it": "def solve(a, b): return [a + b]",
    "the_answer_as_text": "def solve(a, b): return str(a + b)",
    "a_coroutine": "async def solve(a, b): return a + b",
    "a_generator": "def solve(a, b): yield a + b",
    "an_error_named_v": "class v(Exception): pass\ndef solve(a, b): raise v",
    "an_encoder_of_its_own": "import gc\nfor f in gc.get_objects():\n"
    "    if getattr(f, '__name__', '') == 'canonical': f.__code__ = (lambda value: b'').__code__\n"
    "def solve(a, b): return 0",
    "right_once": "def solve(a, b, seen=[]):\n    seen.append(a); return a + b if len(seen) == 1 else 0",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES.keys())
def test_what_only_looks_like_an_answer_is_not_paid(sandbox: Sandbox, code: str) -> None:
    assert graded(sandbox, code).how not in ("passed",)
    assert passes(sandbox)


def test_an_answer_that_is_given_before_the_time_is_up_counts_whatever_the_program_leaves_behind(
    sandbox: Sandbox,
) -> None:
    code = "import threading, time, atexit\natexit.register(lambda: time.sleep(99))\n"
    code += "threading.Thread(target=lambda: time.sleep(99)).start()\n" + HONEST
    assert graded(sandbox, code, seconds=PATIENT).how == "passed"


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (HONEST, "passed"),
        ("\ufeff" + HONEST, "passed"),
        ("def solve(a, b): return a - b", "wrong"),
        ("def solve(a, b): return 1 // 0", "error"),
        ("def solve(a, b", "error"),
        ("def other(a, b): return a + b", "error"),
        ("def solve(a, b):\n    while True: pass", "timeout"),
        ("import os\ndef solve(a, b): os._exit(0)", "wrong"),
        ("import ctypes\ndef solve(a, b): ctypes.string_at(0)", "crashed"),
        ("import sys\ndef solve(a, b):\n    while True: print('x' * 9999)", "flood"),
    ],
)
def test_each_way_to_end_has_its_name(sandbox: Sandbox, code: str, how: str) -> None:
    seconds = QUICK if how == "timeout" else PATIENT
    assert graded(sandbox, code, seconds=seconds).how == how


def test_the_share_of_right_cases_is_kept_but_pays_nothing(sandbox: Sandbox) -> None:
    found = graded(sandbox, "def solve(a, b): return a + b if a < 100 else 0", seconds=PATIENT)
    assert (found.how, round(found.share, 3)) == ("wrong", 0.667)
    assert "case 3 of 3" in found.detail


def test_values_are_compared_as_python_compares_them(sandbox: Sandbox) -> None:
    spec = {"kind": "call", "entry": "f", "literals": True}
    same = [("{1: 2, 3: {4}}", "{3: {4}, 1: 2}"), ("(1, 2.0)", "(True, 2)"), ("'é\\ud800'", "'é\\ud800'")]
    other = [("[1]", "(1,)"), ("'1'", "1"), ("b'x'", "'x'"), ("{1}", "[1]"), ("0.1 + 0.2", "0.3"), ("None", "0")]
    for given, expected in [*same, *other]:
        cases = [{"args": [], "expected": expected}]
        found = graded(sandbox, f"def f(): return {given}", {**spec, "cases": cases}, PATIENT)
        assert (found.how == "passed") == ((given, expected) in same), (given, expected)


def test_a_tolerance_lets_numbers_differ_and_nothing_else(sandbox: Sandbox) -> None:
    spec = {"kind": "call", "entry": "f", "tolerance": 1e-6}
    cases = [{"args": [], "expected": [0.3, {"a": 1}]}]
    verdicts = {
        given: graded(sandbox, f"def f(): return {given}", {**spec, "cases": cases}, PATIENT).how == "passed"
        for given in ("[0.1 + 0.2, {'a': 1}]", "[0.3001, {'a': 1}]", "(0.3, {'a': 1})", "[0.3, {'b': 1}]", "[f, 1]")
    }
    assert list(verdicts.values()) == [True, False, False, False, False], verdicts


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("a, b = map(int, input().split()); print(a + b); print(a * b)", "passed"),
        ("a, b = map(int, input().split()); print(a + b, ' \\n', a * b, '\\n\\n', sep='')", "passed"),
        ("import threading\na, b = map(int, input().split())\n"
         "threading.Timer(0.05, lambda: print(a + b, a * b, sep='\\n')).start()", "passed"),
        ("import atexit\na, b = map(int, input().split())\natexit.register(lambda: print(a * b))\n"
         "print(a + b)", "passed"),
        ("a, b = map(int, input().split()); print(a + b)", "wrong"),
        ("a, b = map(int, input().split()); print(a + b); print(a * b); print()\nprint('x')", "wrong"),
        ("a, b = map(int, input().split()); print(a + b); print(a * b); raise SystemExit(3)", "error"),
        ("a, b = map(int, input().split()); print(a + b); print(a * b); 1 / 0", "error"),
        ("import os\na, b = map(int, input().split()); print(a + b); print(a * b); os.abort()", "crashed"),
    ],
)  # fmt: skip
def test_a_program_is_judged_by_all_it_prints_and_its_exit_code(sandbox: Sandbox, code: str, how: str) -> None:
    assert graded(sandbox, code, STDIN, PATIENT).how == how


# --- tests that are code --------------------------------------------------------------------------------------------

CHECK = {"kind": "check", "entry": "f", "tests": "def check(candidate):\n    assert candidate(2) == 4\n"}


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("def f(x): return 2 * x", "passed"),
        ("def f(x): return 5", "wrong"),
        ("def f(x): raise ValueError", "error"),
        ("class E:\n    __eq__ = lambda s, o: True\ndef f(x): return E()", "error"),
        ("def f(x):\n    while True: pass", "timeout"),
        ("import os\ndef f(x): os._exit(0)", "wrong"),
        ("import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 0", "wrong"),
        ("def check(candidate): pass\ndef f(x): return 0", "wrong"),
        ("import os\nos.write(3, b'\\0\\0\\0\\1v' * 5)\ndef f(x): return 0", "error"),
    ],
)
def test_tests_run_apart_from_the_candidate(sandbox: Sandbox, code: str, how: str) -> None:
    assert graded(sandbox, code, CHECK, QUICK if how == "timeout" else PATIENT).how == how


def test_a_candidate_whose_time_is_up_before_it_is_asked_is_late(sandbox: Sandbox) -> None:
    """Its channel is closed when it is asked, and the word of why has not been read yet."""
    slow = {**CHECK, "setup": f"import time; time.sleep({1.5 * QUICK})"}
    found = graded(sandbox, "def f(x): return 2 * x", slow, QUICK)
    assert (found.how, found.detail) == ("timeout", f"timed out after {QUICK} s")


def test_a_candidate_that_takes_no_more_is_ended_when_it_is_asked(sandbox: Sandbox) -> None:
    code = (
        "import os, socket, time\nos.write(3, b'\\0\\0\\0\\1v')\n"
        "socket.socket(fileno=3).shutdown(socket.SHUT_RDWR)\ntime.sleep(99)"
    )

    def work(slot: Slot) -> Report | None:
        execution = slot.candidate.start({"mode": "serve", "source": code, "canonical": True}, b"", PATIENT, False)
        assert execution.frame() == b"v"
        while execution.listening:
            execution._pump()
        assert execution.ask(b"anything") is None
        return execution.report

    report = sandbox.attempt(work)
    assert report is not None and report.how == "killed" and report.seconds < PATIENT


def test_tests_may_make_and_use_objects_of_the_candidate(sandbox: Sandbox) -> None:
    tests = "n = Node(1)\nn.next = Node(2)\nassert total(n) == 3 and n.value == 1 and list(Node(3)) == [3, 4]"
    spec = {"kind": "check", "names": ["Node", "total"], "tests": tests}
    code = (
        "class Node:\n    def __init__(self, value): self.value, self.next = value, None\n"
        "    def __iter__(self): return iter([self.value, self.value + 1])\n"
        "def total(node): return node.value + (total(node.next) if node.next else 0)\n"
    )
    assert graded(sandbox, code, spec, PATIENT).how == "passed"
    assert graded(sandbox, code.replace("node.value +", "0 +"), spec, PATIENT).how == "wrong"


def test_an_object_is_never_taken_for_true(sandbox: Sandbox) -> None:
    spec = {"kind": "check", "names": ["f"], "tests": "assert f(1)"}
    assert graded(sandbox, "def f(x): return object()", spec, PATIENT).how == "error"
    assert graded(sandbox, "def f(x): return True", spec, PATIENT).how == "passed"


def test_an_exception_of_the_candidate_reaches_the_tests_by_name(sandbox: Sandbox) -> None:
    tests = "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False"
    spec = {"kind": "check", "names": ["f"], "tests": tests}
    assert graded(sandbox, "def f(x): return {}[x]", spec, PATIENT).how == "passed"
    assert graded(sandbox, "def f(x): return [][x]", spec, PATIENT).how == "error"


# --- what is out of reach -------------------------------------------------------------------------------------------

ATTEMPTS = {
    "a signal through a file's owner": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 8, os.getppid())",
    "a file's rights": "import os\nos.chmod(os.getcwd(), 0)",
    "emptying the standard library": "import os\nos.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "a program": "import os\nos.execv('/bin/sh', ['sh'])",
    "a datagram": "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "another's limits": "import resource\nresource.prlimit(1 if __import__('os').getpid() != 1 else 2, 7)",
    "a namespace": "import ctypes, os\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError",
    "the password file": "open('/etc/passwd')",
    "other processes": "import os\nos.listdir('/proc')",
    "a fork": "import os\nos.fork()",
    "a home": "import os\nos.listdir('/home')",
}


@pytest.mark.parametrize("code", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_a_program_gets_an_error_for(sandbox: Sandbox, code: str) -> None:
    report = executed(
        sandbox, f"try:\n    exec({code!r})\nexcept OSError:\n    print('refused')\nelse:\n    print('got it')"
    )
    assert report.stdout == b"refused\n", report


def test_nothing_of_one_candidate_is_in_the_memory_of_the_next(sandbox: Sandbox) -> None:
    assert executed(sandbox, "first_" + "candidate = 1\n" * 500 + "print(first_candidate)").stdout == b"1\n"
    code = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None); libc.sbrk.restype = ctypes.c_size_t\n"
        "heap = ctypes.string_at(libc.sbrk(0) - (1 << 18), 1 << 18)\n"
        "print(len(set(heap)) > 99, bytes(reversed(b'\\n1 = etadidnac')) in heap)\n"
    )
    assert executed(sandbox, code).stdout == b"True False\n"


def test_two_runs_print_the_same(sandbox: Sandbox) -> None:
    code = "import random\nprint(random.random(), hash('abc'), list({'a', 'b', 'c', 'd'}))"
    first = executed(sandbox, code).stdout
    sandbox.close()
    assert executed(sandbox, code).stdout == first != b""


# --- candidate or infrastructure ------------------------------------------------------------------------------------


def test_a_sandbox_that_is_lost_before_the_candidate_runs_is_tried_twice_more_and_then_an_error(
    sandbox: Sandbox,
) -> None:
    calls: list[Slot] = []

    def work(slot: Slot) -> None:
        calls.append(slot)
        raise Lost("somebody pulled the plug")

    with pytest.raises(RolloutError, match=r"failed 3 times.*pulled the plug") as caught:
        sandbox.attempt(work)
    assert caught.value.boundary == "sandbox" and len(calls) == 3
    assert passes(sandbox)


def test_a_set_up_that_takes_too_long_is_no_verdict(sandbox: Sandbox) -> None:
    def work(slot: Slot) -> Report:
        slot.candidate.limits = limits
        assert slot.candidate.process is not None
        slot.candidate.process.send_signal(signal.SIGSTOP)  # so that it cannot be quicker than the host's first look
        return slot.candidate.start({"mode": "program", "source": ""}, b"", PATIENT, False).wait()

    limits = Limits(seconds_to_start=-100.0)  # also what the host waits for
    with pytest.raises(RolloutError, match="did not report in time"):
        sandbox.attempt(work)
    assert passes(sandbox)


def test_a_zygote_killed_once_costs_a_repetition_and_not_the_verdict(sandbox: Sandbox) -> None:
    kills = [signal.SIGKILL]

    def work(slot: Slot) -> str:
        execution = slot.candidate.start({"mode": "serve", "source": HONEST, "canonical": True}, b"", PATIENT, False)
        if kills:
            process(execution).send_signal(kills.pop())
        loaded = execution.frame()
        return execution.kill().how if loaded is None else "loaded" * bool(execution.kill())

    assert sandbox.attempt(work) == "loaded"
    sandbox.close()


def test_a_candidate_that_takes_its_zygote_along_every_time_has_failed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = Execution.frame

    def kills_first(self: Execution) -> bytes | None:
        found = frame(self)
        process(self).kill()
        return found

    monkeypatch.setattr(Execution, "frame", kills_first)
    found = graded(sandbox, "import time\ndef solve(a, b): time.sleep(99)", seconds=PATIENT)
    monkeypatch.undo()
    assert found.how == "crashed" and found.share == 0
    assert passes(sandbox)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "kind is None"),
        ({"kind": "shell"}, "kind is 'shell'"),
        ({"kind": "call", "entry": "f", "cases": []}, "needs 'cases'"),
        ({"kind": "call", "entry": "f", "cases": [{"args": [1]}]}, "a case needs 'expected'"),
        ({"kind": "call", "entry": "f", "cases": [{"args": [], "expected": float("nan")}]}, "NaN equals nothing"),
        ({"kind": "check"}, "needs 'tests'"),
    ],
)
def test_a_task_that_cannot_be_graded_is_nobodys_score(sandbox: Sandbox, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutError, match=message) as caught:
        grade(sandbox, spec, HONEST)
    assert caught.value.boundary == "reward"


# --- nothing is left ------------------------------------------------------------------------------------------------


def descendants() -> set[int]:
    """Processes whose line of parents leads here."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {os.getpid()}} - found:
        found |= more
    return found


def test_many_gradings_leave_no_process_descriptor_or_file(sandbox: Sandbox) -> None:
    assert passes(sandbox) and graded(sandbox, "def f(x): return 2 * x", CHECK, PATIENT).how == "passed"
    open_before, running_before = len(os.listdir("/proc/self/fd")), descendants()
    hostile = [
        "import os\nos._exit(0)",
        "def solve(a, b):\n    while True: print('x' * 9999)",
        "def solve(",
        *FORGERIES.values(),
    ]
    for i in range(40):
        graded(sandbox, hostile[i % len(hostile)], seconds=0.1)
        assert passes(sandbox)
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert descendants() == running_before


def test_a_closed_sandbox_leaves_nothing_and_can_be_used_again(sandbox: Sandbox) -> None:
    before = descendants()
    own = Sandbox(sandbox.tier, slots=2)
    groups = [folder for slot in own._all for folder in (slot.candidate.group.folders if slot.candidate.group else [])]
    assert descendants() > before and all(folder.exists() for folder in groups)
    own.close()
    deadline = time.monotonic() + 5
    while descendants() != before and time.monotonic() < deadline:
        time.sleep(0.01)  # a namespace's first process dies a moment after its parent
    assert descendants() == before and not any(folder.exists() for folder in groups)
    assert passes(own)
    own.close()


def test_threads_grade_side_by_side(sandbox: Sandbox) -> None:
    own = Sandbox(sandbox.tier, slots=2)
    found: list[str] = []

    def work(code: str) -> None:
        found.append(graded(own, code, seconds=PATIENT).how)

    threads = [threading.Thread(target=work, args=(code,)) for code in [HONEST, "def solve(a, b): return 0"] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own.close()
    assert sorted(found) == ["passed"] * 4 + ["wrong"] * 4


def test_in_a_fork_a_sandbox_starts_zygotes_of_its_own(sandbox: Sandbox) -> None:
    assert passes(sandbox)
    child = os.fork()
    if child == 0:
        try:
            own = passes(sandbox)
            sandbox.close()
            os._exit(0 if own else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert passes(sandbox)


# --- a tool, and without isolation ----------------------------------------------------------------------------------


def test_a_tool_sees_what_was_printed_and_the_last_line_of_the_error(sandbox: Sandbox) -> None:
    assert run_python(sandbox, "print(6 * 7)", PATIENT) == ("42\n", "")
    assert run_python(sandbox, "print(1); 1 / 0", PATIENT) == ("1\n", "ZeroDivisionError: division by zero")
    assert run_python(sandbox, "import sys; sys.exit(3)", PATIENT) == ("", "exited with code 3")
    printed, error = run_python(sandbox, "print('x', flush=True)\nwhile True: pass", QUICK)
    assert printed == "x\n" and error.startswith("timed out after 0.")


def test_none_is_refused_unless_arbitrary_code_is_accepted_too() -> None:
    with pytest.raises(ConfigError, match=r"reward\.accept_arbitrary_code = true") as caught:
        Sandbox("none")
    assert "\n" not in str(caught.value)
    own = Sandbox("none", accept_arbitrary_code=True, slots=1)
    assert own.tier == "none" and passes(own)
    assert graded(own, "def solve(a, b):\n    while True: pass").how == "timeout"
    own.close()


def test_a_tier_whose_program_got_out_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.rewards.sandbox.pool.PROBE", "print(['host file'])")
    with pytest.raises(Lost, match=r"does not prevent \['host file'\]"):
        start_zygote("namespaces", Limits())
    with pytest.raises(ConfigError, match="cannot start, so model-written code is not executed"):
        Sandbox("auto")


REFUSING = """
import ctypes, os, struct, sys
from posttrain.rewards.sandbox import kernel
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, {unshare}), (6, 0, 0, 0x50001), (0x15, 0, 1, 444), (6, 0, 0, 0x50026)]
rules += [(6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
kernel.never_gain()
kernel.prctl(kernel.PR_SET_SECCOMP, 2, ctypes.c_char_p(struct.pack("@HP", len(rules), ctypes.addressof(code))))
os.execv(sys.executable, [sys.executable, "-m", "posttrain", *sys.argv[1:]])
"""
"""Starts a command in a process to which the kernel refuses namespaces and Landlock, as many containers do."""


def test_where_isolation_is_missing_a_run_is_refused_in_one_line_before_it_begins(tmp_path: Path) -> None:
    tasks = [
        {
            "prompt": f"Write solve(a, b), the sum. ({i})",
            "answer": HONEST,
            "kind": "call",
            "entry": "solve",
            "cases": SUMS,
        }
        for i in range(8)
    ]
    (tmp_path / "code.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    command = [sys.executable, "-c", REFUSING.replace("{unshare}", str(number)), "grpo", "--tasks", "code.jsonl"]
    command += ["--reward", "code", "--data.holdout", "0.25", "--train.steps", "1", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if "sandbox" in line]
    assert len(told) == 1 and "is not executed (namespaces: its zygote could not isolate itself: unshare" in told[0]
    assert "Landlock has version 0" in told[0]
    assert not (tmp_path / "run").exists()
