"""The program that checks steps: hand-worked thoughts about sums, products and countdowns, finished and unfinished."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.tasks.abacus import problems
from posttrain.models.abacus.corpus import work
from posttrain.rewards.skills import judge
from posttrain.rewards.step_checks import first_mistake, has_check, reachable, step_check
from posttrain.types import DataError, Message, Task


def task(kind: str, answer: int | str, numbers: list[int], **meta: int) -> Task:
    described = {"skill": "reasoning", "kind": kind, "numbers": numbers, **meta}
    return Task(f"{kind}:t", kind, (Message("user", "?"),), str(answer), described)


SUM = task("sums", 141, [12, 72, 57])  # 10+70+50 = 130, 2+2+7 = 11
PRODUCT = task("products", 2070, [345, 6])
COUNTDOWN = task("countdown", "3*4-5", [3, 4, 5], target=7)

RIGHT_SO_FAR = {
    "nothing": (SUM, ""),
    "half a tag": (SUM, "<thi"),
    "a whole sum": (SUM, "<think>10+70+50=130, 2+2+7=11, 130+11=141</think>141"),
    "another order, other separators": (SUM, "<think>7+2+2=11; 50+10+70 = 130\n11+130=141</think>141"),
    "whole numbers": (SUM, "<think>12+72=84, 84+57=141</think>141"),
    "without a thought": (SUM, "141"),
    "a half-written number": (SUM, "<think>10+70+50=13"),
    "a half-written equation": (SUM, "<think>10+70+50=130, 2+"),
    "no result yet": (SUM, "<think>10+70+50="),
    "a half-written answer": (SUM, "<think>10+70+50=130, 2+2+7=11, 130+11=141</think>14"),
    "a half-written closing tag": (SUM, "<think>10+70+50=130, 2+2+7=11, 130+11=141</thi"),
    "words": (SUM, "<think>First the tens, 10+70+50=130, then"),
    "a product": (PRODUCT, "<think>300*6=1800, 40*6=240, 5*6=30, 1800+240=2040, 2040+30=2070</think>2070"),
    "factors swapped, several places at once": (PRODUCT, "<think>6*340=2040, 6*5=30, 30+2040=2070</think>2070"),
    "a countdown": (COUNTDOWN, "<think>3*4=12, 12-5=7</think>3*4-5"),
    "its first step": (COUNTDOWN, "<think>3*4=12"),
    "a negative number": (task("countdown", "9+3-5", [3, 5, 9], target=7), "<think>3-5=-2, -2+9=7</think>9+3-5"),
    "minus a negative number": (task("countdown", "9-3+5", [3, 5, 9], target=11), "<think>3-5=-2, 9--2=11"),
    "an attempt that misses": (COUNTDOWN, "<think>3+4+5=12, 3*4-5=7</think>3*4-5"),
    "brackets": (task("countdown", "(3+4)*5", [3, 4, 5], target=35), "<think>((3)+4)*5=35</think>(3+4)*5"),
    "an unfinished expression": (COUNTDOWN, "<think>3*4=12, 12-5=7</think>3*4-"),
    "an open bracket": (task("countdown", "(3+4)*5", [3, 4, 5], target=35), "<think>3+4=7</think>(3+4"),
    "the beginning of a longer number": (task("countdown", "12*3", [3, 12], target=36), "1"),
}

WRONG = {
    "a wrong digit": (SUM, "<think>10+70+50=140,", "<think>10+70+50=140"),
    "a half-written number that cannot become right": (SUM, "<think>10+70+50=14", "<think>10+70+50=14"),
    "a finished step that is only the beginning": (SUM, "<think>10+70+50=13, 2", "<think>10+70+50=13"),
    "a half-written tag after the beginning of a number": (SUM, "<think>10+70+50=13</t", "<think>10+70+50=13"),
    "too many digits": (SUM, "<think>10+70+50=1300", "<think>10+70+50=1300"),
    "a number of another problem": (SUM, "<think>10+70+40=120, 2", "<think>10+70+40=120"),
    "a number used twice": (SUM, "<think>10+70+50=130, 130+130=260, 1", "<think>10+70+50=130, 130+130=260"),
    "another operation": (SUM, "<think>70-10=60, ", "<think>70-10=60"),
    "a wrong answer after right steps": (SUM, "<think>130+11=141</think>", "<think>130+11=141"),
    "an answer that differs from the thought": (SUM, "<think>10+70+50=130</think>15", "<think>10+70+50=130</think>15"),
    "an answer that is no number": (SUM, "I like apples.", "I like apples."),
    "the wrong factor": (PRODUCT, "<think>300*5=1500, ", "<think>300*5=1500"),
    "a place of neither factor": (PRODUCT, "<think>30*6=180, ", "<think>30*6=180"),
    "a result used twice": (PRODUCT, "<think>300*6=1800, 1800+1800=3600, ", "<think>300*6=1800, 1800+1800=3600"),
    "the target out of reach": (COUNTDOWN, "<think>3+5=8, ", "<think>3+5=8"),
    "a countdown number twice": (COUNTDOWN, "<think>3*4=12, 12-4=8, ", "<think>3*4=12, 12-4=8"),
    "a wrong attempt": (COUNTDOWN, "<think>3*4-5=8, ", "<think>3*4-5=8"),
    "an expression with another value": (COUNTDOWN, "3*5-4", "3*5-4"),
    "an expression with another number": (COUNTDOWN, "3*6", "3*6"),
    "a bracket too many": (COUNTDOWN, "3)", "3)"),
    "a power": (COUNTDOWN, "3**4", None),  # `*` twice never parses, but numbers are left
}


@pytest.mark.parametrize("name", RIGHT_SO_FAR)
def test_nothing_is_wrong_yet(name: str) -> None:
    given_task, text = RIGHT_SO_FAR[name]
    assert first_mistake(given_task, text) is None and step_check(given_task, text) == 1.0


@pytest.mark.parametrize("name", [name for name in WRONG if WRONG[name][2]])
def test_the_first_mistake_ends_where_its_step_ends(name: str) -> None:
    given_task, text, until = WRONG[name]
    assert until is not None and first_mistake(given_task, text) == len(until) and step_check(given_task, text) == 0.0


def test_a_finished_reply_must_pass_the_verifier_as_well() -> None:
    for text in ("3*4", "<think>3*4=12, 12-5=7</think>", "<think>3*4=12, 12-5=7", "3**4"):
        assert (step_check(COUNTDOWN, text), step_check(COUNTDOWN, text, finished=True)) == (1.0, 0.0)
    assert step_check(SUM, "14") == 1.0 and step_check(SUM, "14", finished=True) == 0.0
    assert step_check(SUM, "141", finished=True) == step_check(COUNTDOWN, "3*4-5", finished=True) == 1.0


PROBLEMS = {kind: problems(kind, 100, 0, "train") for kind in ("sums", "products", "countdown-steps")}


@given(st.sampled_from([*PROBLEMS]), st.integers(0, 99), st.booleans())
def test_every_beginning_of_a_right_reply_is_right_and_a_mistake_stays(kind: str, seed: int, noisy: bool) -> None:
    problem = PROBLEMS[kind][seed]
    asked = Task(problem.id, kind, (Message("user", problem.prompt),), problem.answer, problem.meta)
    reply = problem.answer
    if kind != "countdown-steps":
        steps, total = work(problem, 0.3 * noisy, random.Random(seed))
        reply = f"<think>{steps}</think>{total}"
    passed = judge(problem.answer, problem.meta, reply).passed
    finished = step_check(asked, reply, finished=True)
    assert finished <= float(passed)  # two mistakes may cancel out
    values = [step_check(asked, reply[:end]) for end in range(len(reply) + 1)]
    assert values == sorted(values, reverse=True)
    if not noisy:
        assert finished == 1.0 and set(values) == {1.0}


@given(st.text(alphabet="0123456789+-*()=, </think>", max_size=120))
def test_junk_is_checked_without_errors(text: str) -> None:
    for asked in (SUM, PRODUCT, COUNTDOWN):
        assert step_check(asked, text) in (0.0, 1.0) and step_check(asked, f"<think>{text}") in (0.0, 1.0)


def test_huge_numbers_and_deep_brackets_take_no_time() -> None:
    begun = time.process_time()
    for text in ("9" * 60 + "*" + "9" * 3, "(" * 5000, "-" * 5000, "9" * 100_000, "9**9**9**9**9", "1+" * 5000 + "1=5"):
        for asked in (SUM, PRODUCT, COUNTDOWN):
            for whole in (text, f"<think>{text}", f"<think>{text}={'9' * 5000}, "):
                assert step_check(asked, whole) in (0.0, 1.0)
    assert time.process_time() - begun < 5


def test_reachable_is_an_exhaustive_search() -> None:
    assert reachable((3, 4, 5), 7) and reachable((3, 4, 5), 35) and reachable((-2, 9), 7)
    assert not reachable((5, 8), 7) and not reachable((7, 7), 7) and reachable((7,), 7)
    assert reachable((1, 5, 5, 5), 24) is False  # the well-known solution (5-1/5)*5 needs a division
    assert reachable((4, 4, 10, 10), 24) is False  # and so does (10*10-4)/4


def test_other_tasks_are_refused_with_what_is_needed() -> None:
    other = Task("x", "gsm8k", (Message("user", "?"),), "5", {})
    many = task("countdown", "", [1, 2, 3, 4, 5, 6], target=9)
    for asked in (other, many):
        assert not has_check(asked)
        with pytest.raises(DataError, match="has no step check, which needs meta"):
            step_check(asked, "5", finished=True)
