"""Rewards that compare the completions of a group, lists of rewards with weights, and asynchronous rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import posttrain as pt
from posttrain.rewards.functions import reward_from
from posttrain.rewards.judging import BatchVerifier
from posttrain.rewards.scoring import score_all, score_groups, score_safely, scores_groups
from posttrain.store.run import Run
from posttrain.types import ConfigError, Message, Task, Verdict
from tests import tiny

TASK = Task("t:1", "t", (Message("user", "q"),), "72", {"level": 3})
OTHER = Task("t:2", "t", (Message("user", "r"),), "8", {"level": 4})
TEXTS = ["a", "bb", "a", "cccc"]


def scores(reward: Any, pairs: list[tuple[Task, str]], **more: Any) -> list[float | str]:
    found = score_all(reward_from(reward, **more), pairs)
    return [str(error) if verdict is None else verdict.score for verdict, error in found]


def pairs(task: Task, texts: list[str] = TEXTS) -> list[tuple[Task, str]]:
    return [(task, text) for text in texts]


# --- groups ----------------------------------------------------------------------------------------------------------


def rarity(completions: list[str], answer: str, level: int, **task: Any) -> list[float]:
    return [level / completions.count(text) for text in completions]


def rank(group: list[str]) -> Any:
    return torch.tensor([float(len(text)) for text in group]).argsort().argsort()


async def later(completions: list[str], prompt: str) -> list[Verdict]:
    await asyncio.sleep(0)
    return [Verdict(len(completions), text == prompt) for text in completions]


def test_a_function_that_asks_for_completions_is_called_once_per_group() -> None:
    assert scores(rarity, pairs(TASK)) == [1.5, 3, 1.5, 3]
    assert scores(rarity, [*pairs(TASK), *pairs(OTHER)]) == [1.5, 3, 1.5, 3, 2, 4, 2, 4]
    assert scores(rank, pairs(TASK, ["a", "bb", "ccc"])) == [0, 1, 2]
    assert scores(later, pairs(TASK)) == [4] * 4
    assert reward_from(rarity)(TASK, "a").score == 3, "alone, a completion is a group of one"
    assert scores_groups(reward_from(rarity)) and not scores_groups(reward_from("exact"))


def test_a_task_that_is_drawn_twice_makes_two_groups() -> None:
    found = score_groups(reward_from(rarity), [pairs(TASK, ["a", "b"]), pairs(TASK, ["a", "a"])])
    assert [verdict.score for verdict, _ in found if verdict] == [3, 3, 1.5, 1.5]


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "too few": (
        lambda completions: [1.0],
        r"returned 1 value \(list\) for task 't:1', expected one number for each of",
    ),
    "one number": (lambda completions: 1.0, r"returned 1.0 for task 't:1', expected one number for each of its 4"),
    "no number": (lambda completions: ["x"] * 4, r"returned 'x' \(str\) for task 't:1', expected one finite number"),
    "not finite": (lambda completions: [float("nan")] * 4, r"returned nan for task 't:1', expected one finite number"),
    "raises": (lambda completions: 1 / 0, r"raised ZeroDivisionError for task 't:1'"),
    "unknown, and first": (lambda nothing, completions: 1, r"has the argument 'nothing', which task 't:1' does not"),
    "unknown": (lambda completions, nothing: 1, r"has the argument 'nothing', which task 't:1' does not provide"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_group_reward_cannot_score_leaves_its_own_group_unscored(name: str) -> None:
    import re

    function, says = BAD[name]
    found = score_all(reward_from(function), pairs(TASK))
    assert len(found) == 4
    for verdict, error in found:
        assert verdict is None and re.search(says, error or ""), error


@pytest.mark.parametrize("reward", [lambda completion, completions: 1, lambda group, text: 1])
def test_one_completion_and_those_of_its_group_cannot_both_be_asked_for(reward: Any) -> None:
    with pytest.raises(ConfigError, match="one completion, and for all of a group. Keep one of the two"):
        reward_from(reward)


def test_a_column_of_the_tasks_that_has_the_groups_name_is_refused() -> None:
    odd = Task("t:1", "t", (Message("user", "q"),), "1", {"group": "x"})
    ((verdict, error),) = score_all(reward_from(rank), [(odd, "a")])
    assert verdict is None and error and "the tasks have a column 'group'" in error


# --- lists -----------------------------------------------------------------------------------------------------------


def length(completion: str) -> float:
    return len(completion)


def first(completion: str) -> float:
    return float(completion.startswith("a"))


def test_a_list_is_a_weighted_sum_whose_first_reward_decides_what_passes() -> None:
    assert scores([first, length], pairs(TASK)) == [2, 2, 2, 4]
    assert scores([first, length], pairs(TASK), weights=(10.0, 0.5)) == [10.5, 1, 10.5, 2]
    assert scores([first, rarity, "exact"], pairs(TASK), weights=(1.0, 2.0, 0.0)) == [4, 6, 4, 6]
    verdict = reward_from([first, length], weights=(1.0, 0.5))(TASK, "ab")
    assert verdict.passed and verdict.parts == {"first": 1, "length": 2}
    twice = reward_from([lambda completion: 1.0, lambda completion: 2.0])(TASK, "a")
    assert twice.score == 3 and list(twice.parts) == ["<lambda>", "<lambda>#2"]


def test_weights_apply_to_the_terms_of_an_expression(tmp_path: Path) -> None:
    file = tmp_path / "r.py"
    file.write_text("def one(completion): return 1.0\ndef two(completion): return 2.0\n")
    text = f"{file}:one + 0.5*{file}:two"
    assert reward_from(text)(TASK, "a").score == 2
    assert reward_from(text, weights=(3.0, 4.0))(TASK, "a").score == 7
    assert reward_from(f"{file}:two", weights=(4.0,))(TASK, "a").score == 8


WEIGHTS: dict[str, tuple[Any, tuple[float, ...], str]] = {
    "too few": ([first, length], (1.0,), "reward.weights has 1 values for 2 rewards"),
    "too many": (first, (1.0, 2.0), "reward.weights has 2 values for 1 rewards"),
    "infinite": ([first, length], (1.0, float("inf")), "are not all finite"),
    "none": ([], (), "the list of rewards is empty"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name: str) -> None:
    reward, weights, says = WEIGHTS[name]
    with pytest.raises(ConfigError, match=says):
        reward_from(reward, weights=weights)


# --- asynchronous ----------------------------------------------------------------------------------------------------


def test_asynchronous_rewards_of_a_step_wait_at_the_same_time() -> None:
    waiting, most = 0, 0
    together = asyncio.Event()

    async def slow(completion: str, answer: str) -> float:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        if waiting == 4:
            together.set()
        await asyncio.wait_for(together.wait(), 30)
        return float(len(completion))

    assert isinstance(reward_from(slow), BatchVerifier)
    assert scores(slow, pairs(TASK)) == [1, 2, 1, 4] and most == 4


def test_an_asynchronous_reward_fails_for_its_own_completion() -> None:
    async def picky(completion: str) -> float:
        await asyncio.sleep(0)
        if completion == "bb":
            raise ValueError("no b")
        return 1.0

    found = scores(picky, pairs(TASK))
    assert found[0] == found[2] == found[3] == 1
    assert isinstance(found[1], str) and "picky raised ValueError for task 't:1'" in found[1]
    assert score_safely(reward_from(picky), TASK, "a")[0] == Verdict(1.0, True)
    assert "no b" in str(score_safely(reward_from(picky), TASK, "bb")[1])


def test_an_asynchronous_reward_works_where_an_event_loop_is_running() -> None:
    async def one(completion: str) -> float:
        return 1.0

    async def notebook() -> list[float | str]:
        return scores(one, pairs(TASK))

    assert asyncio.run(notebook()) == [1] * 4


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_runs_score_groups_lists_and_coroutines_and_resume_with_them(tmp_path: Path) -> None:
    model = str(tiny.chatty(tmp_path / "model"))
    settings: dict[str, Any] = {"rollout__max_tokens": 6, "rollout__slots": 32, "prompts": 2, "group_size": 4,
                                "problems": 2, "count": 16, "threads": 1, "checkpoint_every": 1}  # fmt: skip
    sizes: list[int] = []

    def distinct(completions: list[str], answer: str, **task: Any) -> list[float]:
        sizes.append(len(completions))
        return [float(len(set(completions[: i + 1]))) for i in range(len(completions))]

    async def even(completion: str, **task: Any) -> float:
        return float(len(completion) % 2)

    both = pt.grpo(model, "sums", [distinct, even], tmp_path / "run", steps=1, reward__weights=[1, 0.5], **settings)
    assert sizes == [1, 1, 4, 4, 1, 1], "evaluation has one completion per task"
    with Run.read(both.folder) as run:
        rows = run.episodes("train", 1)
    for row in rows:
        assert row.reward == row.parts["distinct"] + 0.5 * row.parts["even"]
    assert np.isfinite([row.reward for row in rows if row.reward is not None]).all() and len(rows) == 8
    more = pt.resume(both.folder, [distinct, even], steps=2)
    assert more.summary and more.summary["steps"] == 2
    named = pt.grpo(
        model, "sums", ["numeric", "format"], tmp_path / "named", steps=1, reward__weights=[1, 0.5], **settings
    )
    with Run.read(named.folder) as run:
        assert run.header["recipe"]["reward"]["name"] == "(numeric) + (format)"
        assert run.header["given"] == []


ENDINGS: dict[str, Any] = {"exit": SystemExit(0), "cancel": asyncio.CancelledError(), "lines": ValueError("a\n  b")}


@pytest.mark.parametrize("kind", ENDINGS)
def test_a_reward_that_exits_or_cancels_is_unscored_and_ends_neither_the_run_nor_the_event_loop(kind: str) -> None:
    def plain(completion: str) -> float:
        raise ENDINGS[kind]

    async def waiting(completion: str) -> float:
        raise ENDINGS[kind]

    async def grouped(completions: list[str]) -> list[float]:
        raise ENDINGS[kind]

    for reward in (plain, waiting, grouped):
        for error in scores(reward, pairs(TASK)):
            assert isinstance(error, str) and error.startswith(
                f"reward {reward.__name__} raised {type(ENDINGS[kind]).__name__} for"
            )
            assert "\n" not in error and error.endswith(": a b." if kind == "lines" else ".")
    assert scores(later, pairs(TASK)) == [4] * 4, "the event loop still runs"
