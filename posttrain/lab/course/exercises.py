"""The course's exercises: questions, tasks to explore, and code that is checked in the package's sandbox.

`questions.toml` and `coding.toml` hold the texts, coding.py the test cases. A reader's code only gets the arguments;
its results are compared here. Every failure, infinite loops included, is reported with its case.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from starlette.routing import BaseRoute

from posttrain.lab.course.case import TOLERANCE, Case
from posttrain.lab.course.pages import Node, nodes
from posttrain.lab.folders import Place
from posttrain.lab.routing import get, named, post
from posttrain.rewards import code as sandboxes
from posttrain.rewards.sandbox import encode
from posttrain.rewards.sandbox.pool import Sandbox, Slot, Wrecked
from posttrain.types import ConfigError, Json, JsonView, ResumeError

FOLDER = Path(__file__).parent
SECONDS = 5.0
LONGEST = 20_000  # characters of code
SHOWN = 120  # characters of a value in a message
PRINTED = 4_000

DRIVER = '''
import sys
import traceback

FILE = "your code"
names = {"__name__": "exercise"}


def told(error):
    """An error for the reader: its type and message, and the last line of the reader's code in the traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == FILE else (lines or [None])[-1]
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {said}" + (f" (line {line})" if line else "")


def attempt(source, entry, args):
    try:
        if source is not None:
            exec(compile(source, FILE, "exec"), names)
            return ["value", None]
        if not callable(names.get(entry)):
            return ["error", f"there is no function {entry}"]
        return ["value", names[entry](*args)]
    except BaseException as error:
        return ["error", told(error)]
    finally:
        sys.stdout.flush()
'''
"""The program that the sandbox loads; the first call passes the reader's code to `attempt`."""

PYTEST = """

# ----------------------------------------------------------------------------------------------------------------------
# The tests. Run them with: pytest {file}
# The expected values were computed by posttrain's own functions.

CASES = [
{cases}
]


def near(got, expected):
    if isinstance(expected, (list, tuple)):
        return isinstance(got, (list, tuple)) and len(got) == len(expected) and all(map(near, got, expected))
    return abs(got - expected) <= {tolerance} * max(1, abs(expected))


def pytest_generate_tests(metafunc):
    metafunc.parametrize("case", CASES, ids=[case[0] for case in CASES])


def test_case(case):
    name, entry, args, expected = case
    got = globals()[entry](*args)
    assert near(got, expected), f"{{entry}} returned {{got}}, expected {{expected}}"
"""


class Choice(TypedDict):
    """An answer to choose, and why it is right or wrong."""

    text: str
    why: str
    right: NotRequired[bool]


class Question(TypedDict):
    """An exercise in questions.toml; one without `choices` has only a model answer."""

    kind: Literal["conceptual", "exploration"]
    title: str
    text: str
    hint: NotRequired[str]
    answer: NotRequired[str]
    choices: NotRequired[list[Choice]]


class Coding(TypedDict):
    """An exercise in coding.toml: the code to start from, and the file to save it in."""

    kind: Literal["coding"]
    title: str
    file: str
    hint: NotRequired[str]
    text: str
    template: str


Exercise = Question | Coding


class Check(TypedDict):
    """The outcome of a choice or of one case."""

    name: str
    passed: bool
    detail: str


class Verdict(TypedDict):
    """The outcome of an exercise; `why` explains a choice, `unavailable` says why no code can be run here."""

    passed: bool
    checks: list[Check]
    output: str
    why: NotRequired[list[Node]]
    unavailable: NotRequired[str]


def routes(place: Place) -> list[BaseRoute]:
    """The routes of the exercises; they do not depend on the folder."""
    return [
        get("/api/exercises", lambda request: sorted(texts())),
        get("/api/exercises/{name}", lambda request: shown(named(request, "name"))),
        post("/api/exercises/{name}", lambda request, body: checked(named(request, "name"), body)),
    ]


@cache
def texts() -> dict[str, Exercise]:
    """All exercises as in their files, by name, with their kind."""
    return {**tomllib.loads((FOLDER / "questions.toml").read_text(encoding="utf-8")), **coding_texts()}


@cache
def coding_texts() -> dict[str, Coding]:
    """The coding exercises by name."""
    given = tomllib.loads((FOLDER / "coding.toml").read_text(encoding="utf-8"))
    return {name: cast(Coding, {"kind": "coding", **exercise}) for name, exercise in given.items()}


def found(name: str) -> Exercise:
    """An exercise by name. Raises ResumeError if it does not exist."""
    if name not in texts():
        raise ResumeError(f"there is no exercise {name!r}; choose one of {', '.join(sorted(texts()))}.")
    return texts()[name]


def shown(name: str) -> Json:
    """An exercise for the page, its texts as nodes; the right choice is not included."""
    exercise = found(name)
    page: Json = {"name": name, "kind": exercise["kind"], "title": exercise["title"], "text": nodes(exercise["text"])}
    if "hint" in exercise:
        page["hint"] = nodes(exercise["hint"])
    if exercise["kind"] == "coding":
        page |= {"template": exercise["template"].lstrip(), "file": exercise["file"], "tests": tests_of(name)}
        return {**page, "command": f"pytest {exercise['file']}"}
    if "answer" in exercise:
        page["answer"] = nodes(exercise["answer"])
    if "choices" in exercise:
        page["choices"] = [_line(choice["text"]) for choice in exercise["choices"]]
    return page


@cache
def cases_of(name: str) -> list[Case]:
    """The cases of a coding exercise; their expected values are computed once."""
    from posttrain.lab.course.coding import CASES

    return CASES[name]()


def tests_of(name: str) -> str:
    """Tests to append to a reader's functions in a file; they need only pytest."""
    rows = "\n".join(f"    {(case.name, case.entry, case.args, case.expected)!r}," for case in cases_of(name))
    return PYTEST.format(file=coding_texts()[name]["file"], cases=rows, tolerance=TOLERANCE)


def checked(name: str, body: JsonView) -> Verdict:
    """Checks {"choice": number} or {"code": text}."""
    exercise = found(name)
    if exercise["kind"] == "coding":
        code = body.get("code")
        if not isinstance(code, str) or len(code) > LONGEST:
            raise ConfigError(f"this exercise expects code of at most {LONGEST} characters.")
        return judged(cases_of(name), code)
    if "choices" not in exercise:
        raise ConfigError(f"{name!r} has no answer that can be checked; compare yours with the answer on the page.")
    choice, count = body.get("choice"), len(exercise["choices"])
    if not isinstance(choice, int) or not 0 <= choice < count:
        raise ConfigError(f"the choice is {choice!r}; expected a number from 0 to {count - 1}.")
    chosen = exercise["choices"][choice]
    right = bool(chosen.get("right"))
    checks = [_check(f"choice {choice + 1}", right, chosen["why"])]
    return {"passed": right, "checks": checks, "output": "", "why": _line(chosen["why"])}


# --- code -----------------------------------------------------------------------------------------------------------


def judged(cases: Sequence[Case], code: str) -> Verdict:
    """Runs code against the cases. Without a working sandbox nothing runs, and `unavailable` gives the reason."""
    try:
        sandbox = sandboxes.use()
    except ConfigError as error:
        why = str(error).partition(" (")[0]
        return {"passed": False, "checks": [], "output": "", "unavailable": f"{why[:1].upper()}{why[1:]}."}
    checks, output = examined(sandbox, cases, code)
    return {"passed": all(check["passed"] for check in checks), "checks": checks, "output": output}


def examined(sandbox: Sandbox, cases: Sequence[Case], code: str) -> tuple[list[Check], str]:
    """One check per case, and the code's output."""
    try:
        return sandbox.attempt(lambda slot: _run(slot, cases, code))
    except Wrecked as wrecked:
        return [_check(case.name, False, str(wrecked)) for case in cases], ""


def _run(slot: Slot, cases: Sequence[Case], code: str) -> tuple[list[Check], str]:
    order = {"mode": "serve", "source": DRIVER, "canonical": False}
    execution = slot.candidate.start(order, b"", SECONDS, False)
    execution.frame()  # the driver is loaded

    def ask(source: str | None, case: Case | None) -> list[Any] | None:
        args = [source, *([case.entry, case.args] if case else ["", []])]
        reply = (
            execution.frame() if execution.send(encode.dumps(["call", encode.Reference("attempt"), args, {}])) else None
        )
        if reply is None:
            return None
        try:
            said = encode.loads(reply[1:])
            return said if reply[:1] == b"v" and isinstance(said, list) and len(said) == 2 else ["error", "no answer"]
        except encode.Unsendable:
            return ["error", "it returned something other than numbers, strings and lists of them"]

    loaded = ask(code, None)
    checks: list[Check] = []
    ended = False
    for case in cases:
        said = ask(None, case) if loaded == ["value", None] else loaded
        if said is None:
            why = "this case was not reached." if ended else ENDED[execution.wait().how].format(seconds=SECONDS)
            checks.append(_check(case.name, False, why))
            ended = True
        elif said[0] != "value":
            checks.append(_check(case.name, False, _short(said[1])))
        else:
            checks.append(verdict(case, said[1]))
    report = execution.kill()
    printed = report.stdout.decode("utf-8", "replace")
    return checks, printed[:PRINTED] + ("\n…" if len(printed) > PRINTED else "")


ENDED = {
    "timeout": "it was stopped after {seconds:g} seconds: is there a loop that never ends?",
    "oom": "it was stopped because it used too much memory.",
    "flood": "it was stopped because it printed too much.",
    "crashed": "the Python process that ran it crashed.",
    "exited": "it exited before it returned a result.",
}


def verdict(case: Case, got: Any) -> Check:
    """Compares a result with the expected value; a failure names the first difference and, if known, the mistake."""
    apart = difference(case.expected, got)
    if not apart:
        return _check(case.name, True, "")
    for value, why in case.wrong:
        if not difference(value, got):
            return _check(case.name, False, f"{apart} {why[:1].upper()}{why[1:]}")
    return _check(case.name, False, apart)


def difference(expected: Any, got: Any, where: str = "") -> str:
    """The first difference between two values as a sentence; empty if they are equal within TOLERANCE."""
    place = f"item {where} of the result" if where else "the result"
    if isinstance(expected, list):
        if not isinstance(got, list | tuple):
            return f"{place} is {_short(got)}; expected a list."
        if len(got) != len(expected):
            return f"{place} has {len(got)} items; expected {len(expected)}."
        parts = (difference(e, g, f"{where}[{i}]") for i, (e, g) in enumerate(zip(expected, got, strict=True)))
        return next((part for part in parts if part), "")
    if isinstance(got, bool) or not isinstance(got, int | float):
        return f"{place} is {_short(got)}; expected a number."
    try:
        number = float(got)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if math.isfinite(number) and abs(number - expected) <= TOLERANCE * max(1, abs(expected)):
        return ""
    return f"{place} is {number:.6g}; expected {expected:.6g}."


def _line(text: str) -> list[Node]:
    """The nodes of a one-paragraph text, without the paragraph itself."""
    paragraph = nodes(text)[0]
    return [paragraph] if isinstance(paragraph, str) else paragraph["children"]


def _short(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # an integer with too many digits for Python to print
        text = "a number with thousands of digits"
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _check(name: str, passed: bool, detail: str) -> Check:
    return {"name": name, "passed": passed, "detail": detail[:1].upper() + detail[1:]}
