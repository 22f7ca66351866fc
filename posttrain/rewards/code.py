"""The reward `code`: a program that a model wrote, executed in the sandbox and graded by its task's own tests.

A task's columns say how: see posttrain/rewards/sandbox/tasks.py for the three kinds, and docs/guides/rewards.md. Besides them
`prefix` is what a program is put behind: a reply that begins indented continues it, any other follows it.
"""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Mapping
from typing import Any

from posttrain.data.answers import final_part
from posttrain.rewards.sandbox.pool import Choice, Sandbox
from posttrain.rewards.sandbox.tasks import grade
from posttrain.types import Task, Verdict

_FENCE = re.compile(
    r"^[ \t]*(?P<mark>```+|~~~+)[^\n`]*\n(?P<code>.*?)^[ \t]*(?P=mark)[ \t]*$", re.DOTALL | re.MULTILINE
)
_OPENED = re.compile(r"^[ \t]*(?:```+|~~~+)[^\n`]*\n(?P<code>.*)\Z", re.DOTALL | re.MULTILINE)
_lock = threading.Lock()
_sandboxes: dict[tuple[Choice, bool], Sandbox] = {}
_chosen: list[tuple[Choice, bool]] = [("auto", False)]


def use(choice: Choice = "auto", accept_arbitrary_code: bool = False) -> Sandbox:
    """The sandbox that `code` uses from here on, started. Raises ConfigError where this isolation is not to be had."""
    with _lock:
        asked = (choice, accept_arbitrary_code)
        if asked not in _sandboxes:
            _sandboxes[asked] = Sandbox(choice, accept_arbitrary_code)
        _chosen[:] = [asked]
        return _sandboxes[asked]


def code(task: Task, text: str) -> Verdict:
    """Passes where the program in the reply passes every test of its task; `parts` say how many cases were right.

    Raises RolloutError where the task has no usable tests, or the sandbox fails whatever is executed in it.
    """
    found = grade(use(*_chosen[0]), task.meta, program_of(task, text))
    passed = found.how == "passed"
    detail = f"{found.how}: {found.detail}" if found.detail else found.how
    return Verdict(float(passed), passed, detail, {"cases": found.share})


def program_of(task: Task, text: str) -> str:
    """The program that a reply stands for, with the task's `prefix` in front."""
    program, prefix = extract_code(text), str(task.meta.get("prefix", ""))
    first = next((line for line in program.splitlines() if line.strip()), "")
    continues = not prefix or first[:1].isspace()
    return prefix + ("" if continues else "\n\n") + program


def extract_code(text: str) -> str:
    """The last fenced block of what follows the thinking; the rest of one that never closes; else the whole of it."""
    final = text if "</think>" not in text and "<think>" not in text else final_part(text)
    blocks = list(_FENCE.finditer(final))
    if blocks:
        return blocks[-1]["code"]
    opened = _OPENED.search(final)
    return opened["code"] if opened else final


def humaneval_task(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of HumanEval as a row that `--tasks FILE --reward code` reads."""
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


def mbpp_task(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of MBPP likewise. What its tests name and its reference solution defines is the candidate's to define."""
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
