"""Grading: what a task's tests say about a program. Expected values stay on this side, and bytes are compared.

Three kinds, by `kind`:

* `call`: `entry` is called with each case's `args` (and `kwargs`), and each must give `expected`.
* `stdin`: the program is run for each case with its `stdin`, and must print `stdout` and end with code 0.
* `check`: `tests` are run in a sandbox of their own, in which `names` stand for what the program defines.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.rewards.sandbox import encode
from posttrain.rewards.sandbox.host import Execution, Report
from posttrain.rewards.sandbox.pool import Sandbox, Slot, Wrecked
from posttrain.types import RolloutError

How = Literal["passed", "wrong", "error", "timeout", "oom", "flood", "crashed"]
SHOWN = 200


@dataclass(frozen=True)
class Grade:
    """What became of a program; `share` is the part of its cases that were right (for `check` 0 or 1)."""

    how: How
    share: float
    detail: str = ""


def grade(sandbox: Sandbox, spec: Mapping[str, Any], code: str) -> Grade:
    """Grades a program. Raises RolloutError for a spec that cannot be graded, or a sandbox that fails."""
    kind = str(spec.get("kind"))
    if kind not in _KINDS:
        raise _unusable(f"kind is {spec.get('kind')!r}, expected one of {', '.join(_KINDS)}")
    grader, names = _KINDS[kind]
    if missing := [name for name in names if not spec.get(name)]:
        raise _unusable(f"a task of kind {kind!r} needs {missing[0]!r}, and this one has {', '.join(sorted(spec))}")
    try:
        return sandbox.attempt(lambda slot: grader(slot, spec, code))
    except Wrecked as wrecked:
        return Grade("crashed", 0.0, str(wrecked))


def run_python(sandbox: Sandbox, code: str, seconds: float = 5.0) -> tuple[str, str]:
    """Runs a program without input: what it printed, and the last line of its error, or "" where it had none."""
    order = {"mode": "program", "source": code}
    try:
        report = sandbox.attempt(lambda slot: slot.candidate.start(order, b"", seconds, False).wait())
    except Wrecked as wrecked:
        return "", str(wrecked)
    printed = report.stdout.decode("utf-8", "replace")
    if report.how != "exited":
        return printed, _ended(report).detail
    lines = report.stderr.decode("utf-8", "replace").strip().splitlines()
    return printed, (lines[-1] if lines else f"ended with code {report.code}") if report.code else ""


def _grade_call(slot: Slot, spec: Mapping[str, Any], code: str) -> Grade:
    tolerance = float(spec.get("tolerance", 0))
    cases = [_call_case(case, bool(spec.get("literals")), tolerance) for case in _cases(spec, "args", "expected")]
    order = {"mode": "serve", "source": code, "canonical": not tolerance}
    execution = _start(slot, order, b"", spec)
    right, first_fault = 0, ""
    loaded = execution.frame()
    if loaded is None or loaded[:1] != b"v":
        return _unloaded(execution, loaded)
    for number, (args, kwargs, expected) in enumerate(cases, 1):
        request = encode.dumps(["call", encode.Reference(spec["entry"]), args, kwargs])
        reply = execution.ask(request)
        if reply is None:
            break
        good = reply[:1] == b"v" and _same(expected, reply[1:], tolerance)
        right += good
        said = "another value" if reply[:1] == b"v" else _clean(reply[1:])
        first_fault = first_fault or ("" if good else f"case {number} of {len(cases)} gave {said}")
    return _of_cases(execution, right, len(cases), first_fault)


def _of_cases(execution: Execution, right: int, count: int, fault: str) -> Grade:
    """The grade of a program that was called: what it answered, or how it ended before it had."""
    ended = execution.report
    execution.kill()
    if execution.flooded:
        return Grade("flood", 0.0, "it wrote more than is read")
    if right == count:
        return Grade("passed", 1.0)
    if ended is not None and ended.how != "killed":
        return _ended(ended, right / count)
    how: How = "wrong" if "another value" in fault or not fault else "error"
    return Grade(how, right / count, fault or "it stopped listening")


def _unloaded(execution: Execution, loaded: bytes | None) -> Grade:
    ended = execution.report
    report = execution.kill()
    if loaded is not None:
        return Grade("error", 0.0, f"loading it raised {_clean(loaded[1:])}")
    return _ended(ended or report)


def _ended(report: Report, share: float = 0.0) -> Grade:
    """The grade of a program that ended when it should not have."""
    if report.how == "exited":
        return Grade("wrong", share, f"it ended with code {report.code} before it had answered")
    if report.how == "killed":
        return Grade("error", share, "it stopped listening")
    details = {
        "timeout": f"it was ended after {report.seconds:.1f} s",
        "oom": "it was ended for the memory it took",
        "flood": "it wrote more than is read",
        "crashed": f"it was ended by signal {-report.code}",
    }
    return Grade(report.how, share, details[report.how])


def _grade_stdin(slot: Slot, spec: Mapping[str, Any], code: str) -> Grade:
    cases = [(case["stdin"].encode(), _lines(case["stdout"].encode())) for case in _cases(spec, "stdin", "stdout")]
    right, fault = 0, Grade("wrong", 0.0)
    for given, expected in cases:
        report = _start(slot, {"mode": "program", "source": code}, given, spec).wait()
        if report.how == "exited" and report.code == 0 and _lines(report.stdout) == expected:
            right += 1
        elif not fault.detail:
            fault = _fault(report)
    return Grade("passed", 1.0) if right == len(cases) else Grade(fault.how, right / len(cases), fault.detail)


def _fault(report: Report) -> Grade:
    if report.how != "exited":
        return _ended(report)
    if report.code:
        return Grade("error", 0.0, f"it ended with code {report.code}: {_clean(report.stderr.strip()[-SHOWN:])}")
    return Grade("wrong", 0.0, f"it printed {_clean(report.stdout[:SHOWN])}")


def _lines(output: bytes) -> list[bytes]:
    """Output to compare: white space at the end of a line, and lines without anything at the end, do not count."""
    lines = [line.rstrip() for line in output.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _grade_check(slot: Slot, spec: Mapping[str, Any], code: str) -> Grade:
    zygote = slot.tests  # which may take long to start, and from here on the candidate's time runs
    candidate = _start(slot, {"mode": "serve", "source": code, "canonical": False}, b"", spec)
    loaded = candidate.frame()
    if loaded is None or loaded[:1] != b"v":
        return _unloaded(candidate, loaded)
    entry = spec.get("entry", "")
    order = {"mode": "examine", "setup": spec.get("setup", ""), "source": spec["tests"]}
    order |= {"names": list(spec.get("names", [entry])), "entry": entry}
    seconds = 2 * _seconds(slot, spec)  # of which the candidate has half
    tests = zygote.start(order, b"", seconds, False)
    asked = tests.frame()
    while asked is not None and asked[:1] == b"c":
        reply = candidate.ask(asked[1:])
        asked = None if reply is None else tests.ask(reply)
    ended, told = candidate.report, tests.report
    candidate.kill()
    tests.kill()
    if candidate.flooded:
        return Grade("flood", 0.0, "it wrote more than is read")
    if asked == b"v":
        return Grade("passed", 1.0)
    if asked is not None and asked[:1] == b"e":
        name = _clean(asked[1:])
        return Grade("wrong" if name == "AssertionError" else "error", 0.0, f"the tests ended with {name}")
    return _ended(ended or told or tests.kill())


def _start(slot: Slot, order: Mapping[str, Any], stdin: bytes, spec: Mapping[str, Any]) -> Execution:
    return slot.candidate.start(order, stdin, _seconds(slot, spec), bool(spec.get("processes")))


def _seconds(slot: Slot, spec: Mapping[str, Any]) -> float:
    return float(spec.get("seconds", slot.limits.seconds))


def _cases(spec: Mapping[str, Any], *names: str) -> list[Mapping[str, Any]]:
    """The cases of a task, each of which must have these columns."""
    for case in spec["cases"]:
        if missing := [name for name in names if name not in case]:
            raise _unusable(f"a case needs {missing[0]!r}, and this one has {', '.join(sorted(case))}")
    return spec["cases"]


def _call_case(case: Mapping[str, Any], literals: bool, tolerance: float) -> tuple[list[Any], dict[str, Any], Any]:
    """Arguments and what is expected: the value where there is a tolerance, else its bytes."""
    read = ast.literal_eval if literals else lambda value: value
    try:
        expected = read(case["expected"])
        wanted = expected if tolerance else encode.canonical(expected)
        return [*map(read, case["args"])], {k: read(v) for k, v in case.get("kwargs", {}).items()}, wanted
    except (encode.Unsendable, ValueError, SyntaxError) as error:
        raise _unusable(f"a case cannot be used: {error}") from None


def _same(expected: Any, reply: bytes, tolerance: float) -> bool:
    if not tolerance:
        return reply == expected
    try:
        return _close(expected, encode.loads(reply), tolerance)
    except encode.Unsendable:
        return False


def _close(a: Any, b: Any, tolerance: float) -> bool:
    """Equal, where numbers may differ by `tolerance`, absolutely or as a share of the expected one."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        try:
            return a == b or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return False
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(_close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key], tolerance) for key in a)
    return a == b


def _clean(text: bytes) -> str:
    """A candidate's words as they may stand in a log: printable ASCII, and not many."""
    return ascii(text.decode("utf-8", "replace"))[1:-1][:SHOWN]


def _unusable(why: str) -> RolloutError:
    return RolloutError(f"a code task cannot be graded: {why}.", boundary="reward")


_KINDS: dict[str, tuple[Callable[[Slot, Mapping[str, Any], str], Grade], tuple[str, ...]]] = {
    "call": (_grade_call, ("entry", "cases")),
    "stdin": (_grade_stdin, ("cases",)),
    "check": (_grade_check, ("tests",)),
}
