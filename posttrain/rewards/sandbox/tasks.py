"""Grades a program with its task's tests. Expected values stay on the host, and encoded bytes are compared.

Three kinds of tests, selected by `kind`:

* `call`: `entry` is called with each case's `args` (and `kwargs`) and must return `expected`.
* `stdin`: the program is run for each case with its `stdin`, and must print `stdout` and exit with code 0.
* `check`: `tests` are run in a separate sandbox, in which `names` refer to what the program defines.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.rewards.sandbox import encode
from posttrain.rewards.sandbox.host import Execution, Report
from posttrain.rewards.sandbox.pool import Sandbox, Slot, Wrecked
from posttrain.types import Json, JsonView, RolloutError

How = Literal["passed", "wrong", "error", "timeout", "oom", "flood", "crashed"]
SHOWN = 200
"""Maximum characters of a candidate's output in a detail."""
TOO_MUCH_OUTPUT, NOT_RESPONDING = "wrote more output than allowed", "stopped responding"


@dataclass(frozen=True)
class Grade:
    """The result of grading a program; `share` is the fraction of cases that were correct (0 or 1 for `check`)."""

    how: How
    share: float
    detail: str = ""


def grade(sandbox: Sandbox, spec: JsonView, code: str) -> Grade:
    """Grades a program. Raises RolloutError for an invalid spec or if the sandbox fails."""
    kind = str(spec.get("kind"))
    if kind not in _KINDS:
        raise _invalid(f"kind is {spec.get('kind')!r}, expected one of {', '.join(_KINDS)}")
    grader, names = _KINDS[kind]
    if missing := [name for name in names if not spec.get(name)]:
        raise _invalid(f"a task of kind {kind!r} needs {missing[0]!r}, but this one has {', '.join(sorted(spec))}")
    try:
        return sandbox.attempt(lambda slot: grader(slot, spec, code))
    except Wrecked as wrecked:
        return Grade("crashed", 0.0, str(wrecked))


def run_python(sandbox: Sandbox, code: str, seconds: float = 5.0) -> tuple[str, str]:
    """Runs a program without input; returns its output and the last line of its error message, or ""."""
    order = {"mode": "program", "source": code}
    try:
        report = sandbox.attempt(lambda slot: slot.candidate.start(order, b"", seconds, False).wait())
    except Wrecked as wrecked:
        return "", str(wrecked)
    printed = report.stdout.decode("utf-8", "replace")
    if report.how != "exited":
        return printed, _abnormal_end(report).detail
    lines = report.stderr.decode("utf-8", "replace").strip().splitlines()
    return printed, (lines[-1] if lines else f"exited with code {report.code}") if report.code else ""


def _grade_call(slot: Slot, spec: JsonView, code: str) -> Grade:
    tolerance = float(spec.get("tolerance", 0))
    cases = [_call_case(case, bool(spec.get("literals")), tolerance) for case in _cases(spec, "args", "expected")]
    order = {"mode": "serve", "source": code, "canonical": not tolerance}
    execution = _start(slot, order, b"", spec)
    correct, first_fault = 0, ""
    loaded = execution.frame()
    if loaded is None or loaded[:1] != b"v":
        return _load_failure(execution, loaded)
    for number, (args, kwargs, expected) in enumerate(cases, 1):
        request = encode.dumps(["call", encode.Reference(spec["entry"]), args, kwargs])
        reply = execution.ask(request)
        if reply is None:
            break
        good = reply[:1] == b"v" and _same(expected, reply[1:], tolerance)
        correct += good
        outcome = "returned a wrong value" if reply[:1] == b"v" else f"raised {_clean(reply[1:])}"
        first_fault = first_fault or ("" if good else f"case {number} of {len(cases)} {outcome}")
    return _call_grade(execution, correct, len(cases), first_fault)


def _call_grade(execution: Execution, correct: int, count: int, fault: str) -> Grade:
    """The grade of a program of kind `call`, from its replies or from how it ended before replying."""
    ended = execution.report
    execution.kill()
    if execution.flooded:
        return Grade("flood", 0.0, TOO_MUCH_OUTPUT)
    if correct == count:
        return Grade("passed", 1.0)
    if ended is not None and ended.how != "killed":
        return _abnormal_end(ended, correct / count)
    how: How = "wrong" if "a wrong value" in fault or not fault else "error"
    return Grade(how, correct / count, fault or NOT_RESPONDING)


def _load_failure(execution: Execution, loaded: bytes | None) -> Grade:
    ended = execution.report
    report = execution.kill()
    if loaded is not None:
        return Grade("error", 0.0, f"loading the program raised {_clean(loaded[1:])}")
    return _abnormal_end(ended or report)


def _abnormal_end(report: Report, share: float = 0.0) -> Grade:
    """The grade of a program that ended when it should not have."""
    if report.how == "exited":
        return Grade("wrong", share, f"exited with code {report.code} before replying")
    if report.how == "killed":
        return Grade("error", share, NOT_RESPONDING)
    details = {
        "timeout": f"timed out after {report.seconds:.1f} s",
        "oom": "ran out of memory",
        "flood": TOO_MUCH_OUTPUT,
        "crashed": f"killed by signal {-report.code}",
    }
    return Grade(report.how, share, details[report.how])


def _grade_stdin(slot: Slot, spec: JsonView, code: str) -> Grade:
    cases = [(case["stdin"].encode(), _lines(case["stdout"].encode())) for case in _cases(spec, "stdin", "stdout")]
    correct, fault = 0, Grade("wrong", 0.0)
    for given, expected in cases:
        report = _start(slot, {"mode": "program", "source": code}, given, spec).wait()
        if report.how == "exited" and report.code == 0 and _lines(report.stdout) == expected:
            correct += 1
        elif not fault.detail:
            fault = _stdin_fault(report)
    return Grade("passed", 1.0) if correct == len(cases) else Grade(fault.how, correct / len(cases), fault.detail)


def _stdin_fault(report: Report) -> Grade:
    if report.how != "exited":
        return _abnormal_end(report)
    if report.code:
        return Grade("error", 0.0, f"exited with code {report.code}: {_clean(report.stderr.strip()[-SHOWN:])}")
    return Grade("wrong", 0.0, f"printed {_clean(report.stdout[:SHOWN])}")


def _lines(output: bytes) -> list[bytes]:
    """The lines of an output to compare, without trailing whitespace and empty lines at the end."""
    lines = [line.rstrip() for line in output.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _grade_check(slot: Slot, spec: JsonView, code: str) -> Grade:
    zygote = slot.tests  # started first, because it may be slow and the candidate's time limit runs from here on
    candidate = _start(slot, {"mode": "serve", "source": code, "canonical": False}, b"", spec)
    loaded = candidate.frame()
    if loaded is None or loaded[:1] != b"v":
        return _load_failure(candidate, loaded)
    entry = spec.get("entry", "")
    order = {"mode": "examine", "setup": spec.get("setup", ""), "source": spec["tests"]}
    order |= {"names": list(spec.get("names", [entry])), "entry": entry}
    seconds = 2 * _seconds(slot, spec)  # twice the candidate's time limit
    tests = zygote.start(order, b"", seconds, False)
    request = tests.frame()
    while request is not None and request[:1] == b"c":
        reply = candidate.ask(request[1:])
        request = None if reply is None else tests.ask(reply)
    candidate_report, tests_report = candidate.report, tests.report
    candidate.kill()
    tests.kill()
    if candidate.flooded:
        return Grade("flood", 0.0, TOO_MUCH_OUTPUT)
    if request == b"v":
        return Grade("passed", 1.0)
    if request is not None and request[:1] == b"e":
        name = _clean(request[1:])
        return Grade("wrong" if name == "AssertionError" else "error", 0.0, f"the tests raised {name}")
    return _abnormal_end(candidate_report or tests_report or tests.kill())


def _start(slot: Slot, order: JsonView, stdin: bytes, spec: JsonView) -> Execution:
    return slot.candidate.start(order, stdin, _seconds(slot, spec), bool(spec.get("processes")))


def _seconds(slot: Slot, spec: JsonView) -> float:
    return float(spec.get("seconds", slot.limits.seconds))


def _cases(spec: JsonView, *names: str) -> list[JsonView]:
    """The task's cases. Raises RolloutError unless each has these columns."""
    for case in spec["cases"]:
        if missing := [name for name in names if name not in case]:
            raise _invalid(f"a case needs {missing[0]!r}, but this one has {', '.join(sorted(case))}")
    return spec["cases"]


def _call_case(case: JsonView, literals: bool, tolerance: float) -> tuple[list[Any], Json, Any]:
    """Arguments, keyword arguments and the expected value: the value itself if there is a tolerance, else its bytes."""
    read = ast.literal_eval if literals else lambda value: value
    try:
        value = read(case["expected"])
        expected = value if tolerance else encode.canonical(value)
        return [*map(read, case["args"])], {k: read(v) for k, v in case.get("kwargs", {}).items()}, expected
    except (encode.Unsendable, ValueError, SyntaxError) as error:
        raise _invalid(f"a case is invalid: {error}") from None


def _same(expected: Any, reply: bytes, tolerance: float) -> bool:
    if not tolerance:
        return reply == expected
    try:
        return _close(expected, encode.loads(reply), tolerance)
    except encode.Unsendable:
        return False


def _close(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two values are equal, with numbers compared within `tolerance`, absolute or relative."""
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
    """A candidate's output made safe for logs: printable ASCII of limited length."""
    return ascii(text.decode("utf-8", "replace"))[1:-1][:SHOWN]


def _invalid(reason: str) -> RolloutError:
    return RolloutError(f"a code task cannot be graded: {reason}.", boundary="reward")


_KINDS: dict[str, tuple[Callable[[Slot, JsonView, str], Grade], tuple[str, ...]]] = {
    "call": (_grade_call, ("entry", "cases")),
    "stdin": (_grade_stdin, ("cases",)),
    "check": (_grade_check, ("tests",)),
}
