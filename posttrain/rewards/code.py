"""The verifier `code`: runs a model-written program in the sandbox and grades it with the task's tests.

The task's columns define the tests: see posttrain/rewards/sandbox/tasks.py for the three kinds, and
docs/guides/rewards.md. The optional column `prefix` is prepended to the program: an indented reply continues it, any
other reply is placed after it.
"""

from __future__ import annotations

import ast
import re
import threading

from posttrain.data.answers import final_part
from posttrain.data.thoughts import tags_of
from posttrain.rewards.sandbox.pool import Choice, Sandbox
from posttrain.rewards.sandbox.tasks import grade
from posttrain.types import Json, JsonView, RolloutError, Task, Verdict

_FENCE = re.compile(
    r"^[ \t]*(?P<mark>```+|~~~+)[^\n`]*\n(?P<code>.*?)^[ \t]*(?P=mark)[ \t]*$", re.DOTALL | re.MULTILINE
)
_OPENED = re.compile(r"^[ \t]*(?:```+|~~~+)[^\n`]*\n(?P<code>.*)\Z", re.DOTALL | re.MULTILINE)
_lock = threading.Lock()
_sandboxes: dict[tuple[Choice, bool], Sandbox] = {}
_chosen: list[tuple[Choice, bool]] = [("auto", False)]


def use(choice: Choice = "auto", accept_arbitrary_code: bool = False) -> Sandbox:
    """Starts the sandbox that `code` uses from now on. Raises ConfigError if this isolation is unavailable."""
    with _lock:
        key = (choice, accept_arbitrary_code)
        if key not in _sandboxes:
            _sandboxes[key] = Sandbox(choice, accept_arbitrary_code)
        _chosen[:] = [key]
        return _sandboxes[key]


def code(task: Task, text: str) -> Verdict:
    """Passes if the program in the reply passes all of the task's tests; part `cases` is the share of correct cases.

    Raises RolloutError if the task has no usable tests, or if the sandbox itself fails.
    """
    graded = grade(use(*_chosen[0]), task.meta, program_of(task, text))
    passed = graded.how == "passed"
    detail = f"{graded.how}: {graded.detail}" if graded.detail else graded.how
    return Verdict(float(passed), passed, detail, {"cases": graded.share})


SHOWN_CASES = 4
"""Cases of a task that count as shown if its prompt has no tests."""


def shown_tests(task: Task, text: str) -> Verdict:
    """`code` with the tests that the prompt shows, as a user has them; the score is the share of them that pass.

    These are the lines of `tests` that stand in the prompt; for tasks with cases, the first SHOWN_CASES of them. The
    others stay hidden, so passing them is the truth. Raises RolloutError as `code` does, or if no test is shown.
    """
    graded = grade(use(*_chosen[0]), shown_part(task), program_of(task, text))
    return Verdict(graded.share, graded.how == "passed", graded.how)


def shown_part(task: Task) -> Json:
    """The task's test columns with the shown tests only."""
    if cases := task.meta.get("cases"):
        return {**task.meta, "cases": list(cases)[:SHOWN_CASES]}
    shown = [line for line in str(task.meta.get("tests", "")).splitlines() if line.strip() and line in task.prompt]
    if not shown:
        raise RolloutError(f"task {task.id!r} shows none of its tests in its prompt.", boundary="reward")
    return {**task.meta, "tests": "\n".join(shown)}


def program_of(task: Task, text: str) -> str:
    """The program in a reply, preceded by the task's `prefix`."""
    program, prefix = extract_code(text), str(task.meta.get("prefix", ""))
    first = next((line for line in program.splitlines() if line.strip()), "")
    continues = not prefix or first[:1].isspace()
    return prefix + ("" if continues else "\n\n") + program


def extract_code(text: str) -> str:
    """The last fenced block after the thinking; else the rest of an unclosed one; else the whole text."""
    final = text if not any(tag in text for tag in tags_of(text)) else final_part(text)
    blocks = list(_FENCE.finditer(final))
    if blocks:
        return blocks[-1]["code"]
    opened = _OPENED.search(final)
    return opened["code"] if opened else final


def humaneval_task(row: JsonView) -> Json:
    """Converts a HumanEval row to a row for `--tasks FILE --reward code`."""
    return {
        "prompt": "Complete this Python function. Reply with the whole function in one code block.\n\n"
        f"```python\n{row['prompt']}```",
        "answer": row["prompt"] + row["canonical_solution"],
        "kind": "check",
        "entry": row["entry_point"],
        "prefix": row["prompt"],
        "setup": row["prompt"],
        "tests": row["test"],
        "source_id": row["task_id"],
    }


def mbpp_task(row: JsonView) -> Json:
    """Converts an MBPP row likewise; `names` are what the tests use and the reference solution defines."""
    tests = "\n".join([row["test_setup_code"], *row["test_list"], *row["challenge_test_list"]])
    reference = ast.parse(row["code"])
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    defined = [node.name for node in reference.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imports = [ast.unparse(node) for node in reference.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        "prompt": f"{row['text']} Reply with one code block. It must pass these tests:\n\n"
        + "\n".join(row["test_list"]),
        "answer": row["code"],
        "kind": "check",
        "names": [name for name in dict.fromkeys(defined) if name in used],
        "setup": "\n".join(imports),
        "tests": tests,
        "source_id": row["task_id"],
    }
