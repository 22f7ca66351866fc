"""The built-in task `one-liners`: functions asked for in words, held out by what they compute, graded by calls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import config
from posttrain.data.chat import ChatFormat
from posttrain.data.tasks.load import gold_reply, load_tasks
from posttrain.data.tasks.one_liners import CASES, NAMES, ONE_LINERS, STEPS, one_liners
from posttrain.models.load import load_policy
from posttrain.rewards import code as code_reward
from posttrain.rewards.auto import verifier_for
from posttrain.rewards.code import code
from posttrain.types import Task
from tests.test_sandbox import REFUSING

RECIPES = Path(config.__file__).parent / "recipes"
DEMONSTRATIONS, REWARDS = RECIPES / "code-demonstrations.toml", RECIPES / "code-arithmetic.toml"
TASKS = one_liners(400, 0, "train")


@pytest.fixture(scope="module", autouse=True)
def _close_sandboxes() -> Iterator[None]:
    yield
    for sandbox in code_reward._sandboxes.values():
        sandbox.close()


def values(task: Task) -> tuple[int, ...]:
    return tuple(case["expected"] for case in task.meta["cases"])


def function(program: str) -> Callable[..., int]:
    """One of our own programs as a function; it came from this repository, so it needs no sandbox."""
    names: dict[str, Any] = {}
    exec(program, names)
    return names["f"]


def test_every_reference_passes_and_neither_silence_nor_a_function_of_nothing_does() -> None:
    for task in TASKS[:40]:
        assert verifier_for(task) is code
        assert code(task, gold_reply(task)).detail == "passed"
        for reply in ("", "def f(a, b, c): return None", "I cannot.", task.prompt):
            assert not code(task, reply).passed


def test_what_a_function_gives_counts_and_not_how_it_is_written() -> None:
    task = next(t for t in TASKS if "(" in t.answer.partition("return")[2] and "m" not in t.answer)
    expression = task.answer.partition("return ")[2]
    assert code(task, f"Like this:\n```python\ndef f(a, b, c):\n    x = {expression}\n    return x\n```").passed
    assert code(task, f"f = lambda a, b, c: 0 + {expression}").passed
    unbracketed = code(task, task.answer.replace(expression, expression.replace("(", "").replace(")", "")))
    assert not unbracketed.passed and unbracketed.detail.startswith(f"wrong: case 1 of {len(CASES)}")


def test_three_requests_worked_by_hand() -> None:
    """Steps are done in the order in which they are said, which takes brackets: 2, 3, 5 are the first case."""
    known = {task.prompt.partition(": ")[2]: task for task in one_liners(4000, 0, "train")}
    hand = [
        ("a, plus b, doubled", "(a+b)*2", (2 + 3) * 2),
        ("a, minus c, taken from b", "b-(a-c)", 3 - (2 - 5)),
        ("b, or a if smaller, times c", "min(b, a)*c", 2 * 5),
    ]
    for said, written, first in hand:
        assert known[said].answer == f"def f(a, b, c): return {written}" and values(known[said])[0] == first


@given(st.integers(0, 99), st.integers(0, 99))
@settings(max_examples=10)
def test_no_function_is_on_both_sides_of_the_split_whatever_the_seeds(one: int, other: int) -> None:
    train, test = one_liners(200, one, "train"), one_liners(200, other, "test")
    assert not {*map(values, train)} & {*map(values, test)}
    assert len({task.id for task in train}) == len({task.prompt for task in train}) == 200


def test_a_seed_is_its_tasks_and_a_longer_list_begins_with_the_shorter() -> None:
    assert one_liners(50, 0, "train") == TASKS[:50] != one_liners(50, 1, "train")
    sets = load_tasks(config.DataConfig(tasks=ONE_LINERS, count=50), seed=1)
    assert sets.test == load_tasks(config.DataConfig(tasks=ONE_LINERS, count=60), seed=2).test


def test_a_reference_gives_what_its_cases_expect_and_every_step_occurs() -> None:
    for task in TASKS:
        assert tuple(function(task.answer)(*args) for args in CASES) == values(task)
        assert len({*values(task)}) > 1
    said = " | ".join(task.prompt for task in TASKS)
    for phrase in (phrase for step in STEPS for phrase in step.said):
        assert any(phrase.format(x=name) in said for name in NAMES), phrase


def test_functions_that_agree_on_the_cases_agree_everywhere() -> None:
    """So a wrong function is not paid because the cases missed the difference."""
    same: dict[tuple[int, ...], list[Callable[..., int]]] = {}
    for task in one_liners(1000, 0, "train"):
        same.setdefault(values(task), []).append(function(task.answer))
    points = [(a, b, c) for a in (-31, -3, 0, 6, 50) for b in (-44, -1, 5, 9, 33) for c in (-12, 1, 7, 61)]
    assert len(same) < 1000, "no two ask for the same function, so nothing was compared"
    for first, *others in same.values():
        assert all(first(*point) == other(*point) for other in others for point in points)


def test_questions_and_answers_fit_what_the_recipes_allow() -> None:
    policy = load_policy(config.ModelConfig(path="abacus"))
    chat = ChatFormat(policy.tokenizer, "chat")
    _, rewards, _ = config.read_toml(REWARDS)
    recipe = config.resolve("grpo", rewards)
    assert max(len(chat.prompt_tokens(task.messages)) for task in TASKS) <= recipe.data.max_prompt_tokens
    answers = [policy.tokenizer.encode(task.answer, add_special_tokens=False) for task in TASKS]
    assert max(map(len, answers)) < recipe.rollout.max_tokens  # and its stop token


def test_the_rewards_start_from_what_the_demonstrations_made() -> None:
    (_, shown, _), (_, rewards, _) = config.read_toml(DEMONSTRATIONS), config.read_toml(REWARDS)
    assert rewards["model"]["path"] == f"{shown['run']['out']}/model"
    assert rewards["data"]["tasks"] == shown["data"]["tasks"] == ONE_LINERS and rewards["reward"]["name"] == "code"


def test_without_isolation_the_recipe_is_refused_in_one_line_before_step_0(tmp_path: Path) -> None:
    number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    command = [sys.executable, "-c", REFUSING.replace("{unshare}", str(number)), "grpo", str(REWARDS)]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parents[2])}
    command += ["--model.path", "abacus", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if "sandbox" in line]
    assert len(told) == 1 and "model-written code is not executed" in told[0]
    assert not (tmp_path / "run").exists()
