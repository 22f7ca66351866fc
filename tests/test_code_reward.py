"""The reward `code`: which program a reply stands for, and rows of HumanEval and MBPP as tasks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain import api, config
from posttrain.cli import tables as show
from posttrain.config import DataConfig
from posttrain.data.tasks.load import load_tasks
from posttrain.data.tasks.one_liners import one_liners
from posttrain.rewards import code as code_reward
from posttrain.rewards.code import (
    SHOWN_CASES,
    code,
    extract_code,
    humaneval_task,
    mbpp_task,
    program_of,
    shown_tests,
)
from posttrain.rewards.verifiers import VERIFIERS
from posttrain.rollout.tasks import check_gold
from posttrain.store.run import Run
from posttrain.types import Message, RolloutError, Task
from tests import tiny
from tests.conftest import shared


def task_of(row: Mapping[str, Any]) -> Task:
    meta = {name: value for name, value in row.items() if name not in ("prompt", "answer")}
    return Task("t", "code", (Message("user", row["prompt"]),), row["answer"], meta)


@pytest.fixture(scope="module", autouse=True)
def _close_sandboxes() -> Iterator[None]:
    yield
    for sandbox in code_reward._sandboxes.values():
        sandbox.close()


SUM = task_of(
    {
        "prompt": "Write solve(a, b), the sum of two numbers.",
        "answer": "def solve(a, b): return a + b",
        "kind": "call",
        "entry": "solve",
        "cases": [{"args": [1, 2], "expected": 3}, {"args": [5, 5], "expected": 10}],
        "seconds": 20,
    }
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Here:\n```python\na = 1\n```\nDone.", "a = 1\n"),
        ("```\na = 1\n```\nbetter:\n```py\nb = 2\n```", "b = 2\n"),
        ("```python\na = 1\n", "a = 1\n"),
        ("```python\n    return 1\n```", "    return 1\n"),
        ("<think>```python\nbad\n```</think>\n```python\ngood\n```", "good\n"),
        ("<think>```python\nbad\n```", ""),
        ("~~~\nx = '```'\n~~~", "x = '```'\n"),
        ("````\n```\ninner\n```\n````", "```\ninner\n```\n"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_fenced_block_or_the_reply_itself(text: str, found: str) -> None:
    assert extract_code(text) == found


def test_a_reply_continues_a_prefix_where_it_is_indented_and_follows_it_otherwise() -> None:
    task = task_of({"prompt": "?", "answer": "", "prefix": "import math\ndef f(x):\n"})
    assert program_of(task, "    return 1") == "import math\ndef f(x):\n    return 1"
    assert program_of(task, "```\n\n    return 1\n```") == "import math\ndef f(x):\n\n    return 1\n"
    assert program_of(task, "def f(x): return 1") == "import math\ndef f(x):\n\n\ndef f(x): return 1"


def test_a_reply_is_paid_when_every_case_is_right() -> None:
    good, half, none = (code(SUM, text) for text in ("```\ndef solve(a, b): return a + b\n```",
                                                    "def solve(a, b): return 2 * b", "I cannot."))  # fmt: skip
    assert (good.score, good.passed, good.parts["cases"], good.detail) == (1.0, True, 1.0, "passed")
    assert (half.score, half.parts["cases"]) == (0.0, 0.5) and half.detail.startswith("wrong: case 1 of 2")
    assert (none.score, none.passed) == (0.0, False) and "SyntaxError" in none.detail


def test_what_a_candidate_says_reaches_a_verdict_without_control_characters() -> None:
    verdict = code(SUM, "E = type('\\x1b]0;x\\x07\\n', (Exception,), {})\ndef solve(a, b): raise E")
    assert verdict.detail.isascii() and verdict.detail.isprintable()


def test_the_reward_is_known_by_name() -> None:
    assert VERIFIERS["code"] is code


@pytest.mark.parametrize("number", [0, 32, 38, 50, 160])
def test_a_reference_of_humaneval_passes_in_every_form_and_nothing_does_not(number: int) -> None:
    path = shared("data", "humaneval", "HumanEval.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        row = [json.loads(line) for line in file][number]
    task = task_of({**humaneval_task(row), "seconds": 20})
    forms = (task.answer, f"```python\n{task.answer}```", row["canonical_solution"])
    assert [code(task, form).detail for form in forms] == ["passed"] * 3
    assert not code(task, "    return None\n").passed
    assert not code(task, "").passed


@pytest.mark.parametrize("number", [1, 367, 533, 596, 601, 927])
def test_a_reference_of_mbpp_passes_and_nothing_does_not(number: int) -> None:
    lines = shared("data", "mbpp", "mbpp.jsonl").read_text("utf-8").splitlines()
    task = task_of(
        {**mbpp_task(next(row for line in lines if (row := json.loads(line))["task_id"] == number)), "seconds": 20}
    )
    assert code(task, task.answer).detail == "passed"
    assert not code(task, "").passed
    assert not code(task, "\n".join(f"def {name}(*args): return None" for name in task.meta["names"])).passed


def test_a_reference_with_marks_of_worked_solutions_in_it_is_read_from_a_file_and_passes(tmp_path: Path) -> None:
    answer = "#### helpers\nBOX = '\\\\boxed{7}'\n#### the function\ndef solve(a, b): return a + b\n"
    row = {"prompt": "Add.", "answer": answer, **SUM.meta}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "prompt": f"Add {i}."}) + "\n" for i in range(4)))
    sets = load_tasks(DataConfig(tasks=str(tmp_path / "rows.jsonl"), holdout=0.5), seed=0)
    tasks = sets.train + sets.test
    assert [task.answer for task in tasks] == [answer] * 4
    check_gold(tasks, "code + 0.1*format")


def test_a_run_is_graded_by_code_and_says_for_ever_that_it_had_no_isolation(tmp_path: Path) -> None:
    tiny.stopping(tiny.chatty(tmp_path / "model"))
    row = {"answer": "def solve(a, b): return a + b", "kind": "call", "entry": "solve", "seconds": 20}
    cases = [{"args": [1, 2], "expected": 3}]
    rows = [{"prompt": f"Add two numbers, way {i}.", **row, "cases": cases} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {
        "model.path": str(tmp_path / "model"),
        "data.tasks": str(tmp_path / "rows.jsonl"),
        "reward.name": "code",
    }
    settings |= {
        "data.holdout": 0.4,
        "rollout.max_tokens": 8,
        "algo.prompts": 2,
        "algo.group_size": 2,
        "train.steps": 1,
    }
    settings |= {"eval.problems": 2, "reward.sandbox": "none", "reward.accept_arbitrary_code": True}
    recipe = config.resolve("grpo", {}, {**settings, "run.out": str(tmp_path / "run")})
    result = api.start("grpo", recipe)
    assert result.summary
    with Run.read(tmp_path / "run") as run:
        assert run.header["recipe"]["reward"]["sandbox"] == "none"
        assert any("WITHOUT ISOLATION" in event.message for event in run.events())
        assert list(run.curve("unscored")[1]) == [0]  # what a random model writes is a wrong program, not a failure
    screen = Console(file=StringIO(), width=200)
    show.finished(screen, result.folder)
    assert "WITHOUT ISOLATION, as reward.sandbox" in screen.file.getvalue(), "it is shown with the result"  # type: ignore[attr-defined]


def test_shown_tests_are_those_of_the_prompt_and_score_their_share() -> None:
    task = one_liners(1, 0, "test")[0]
    assert shown_tests(task, str(task.answer)).passed and code(task, str(task.answer)).passed
    known = {tuple(case["args"]): case["expected"] for case in task.meta["cases"][:SHOWN_CASES]}
    table = f"def f(a, b, c):\n    return {known}.get((a, b, c), 0)"  # knows what is shown, and nothing else
    assert shown_tests(task, table).score == 1.0 and not code(task, table).passed
    first = dict([next(iter(known.items()))])
    assert shown_tests(task, f"def f(a, b, c):\n    return {first}.get((a, b, c), 10**9)").score == 1 / SHOWN_CASES
    row = {"kind": "check", "names": ["f"], "tests": "assert f(1) == 1\nassert f(2) == 2"}
    check = Task("t", "code", (Message("user", "Write f. It must pass assert f(1) == 1"),), "def f(n): return n", row)
    one = "def f(n): return 1"
    assert shown_tests(check, one).passed and not code(check, one).passed
    with pytest.raises(RolloutError, match="shows none of its tests"):
        shown_tests(replace(check, messages=(Message("user", "Write f."),)), one)
