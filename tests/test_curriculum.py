"""The difficulty sampler: what it asks, and that it is a function of seed, position and what was solved."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from posttrain import rng
from posttrain.rollout.curriculum import FLOOR, Curriculum
from posttrain.types import Episode, Message, Span, Task


def task(i: int, **meta: object) -> Task:
    return Task(f"t{i}", "test", (Message("user", f"{i}?"),), "1", meta)


def attempts(of: Task, *passed: bool | None) -> list[Episode]:
    prompt = (Span("prompt", np.ones(1, np.int32)),)
    return [Episode(of.id, 0, i, prompt, "", None if p is None else float(p), bool(p)) for i, p in enumerate(passed)]


EASY, FAIR, HARD = ([task(10 * k + i, difficulty=k) for i in range(10)] for k in range(3))
TASKS = [*EASY, *FAIR, *HARD]


def taught(steps: int) -> Curriculum:
    curriculum = Curriculum(TASKS, "pass-rate", 0)
    for _ in range(steps):
        curriculum.learn(
            [attempts(EASY[0], True, True), attempts(FAIR[0], True, False), attempts(HARD[0], False, False)]
        )
    return curriculum


@given(count=st.integers(1, 50), cursor=st.integers(0, 200), take=st.integers(0, 60), seed=st.integers(0, 9))
def test_without_a_curriculum_all_tasks_come_in_turn(count: int, cursor: int, take: int, seed: int) -> None:
    tasks = [task(i) for i in range(count)]
    plain = Curriculum(tasks, "none", seed)
    assert plain.order(cursor, 0, take) == rng.draw_order(count, cursor, take, seed)
    assert plain.learn([attempts(tasks[0], True)]) == {} and plain.state() == {}


def test_what_is_solved_half_the_time_is_asked_most_and_nothing_is_forgotten() -> None:
    weights = taught(90).weights()
    assert weights.argmax() == 1
    # after many steps of two attempts the faded count is 20: p = 21/22, 1/2, 1/22, and 21/22² = 0.0434 < 0.25
    np.testing.assert_allclose(weights, [10 * 21 / 22**2, 2.5, 10 * 21 / 22**2], rtol=0.03)
    assert weights.min() >= FLOOR * weights.max()
    asked = Counter(i // 10 for i in taught(30).order(0, 0, 2000))
    assert asked[1] > 4 * asked[0] > 0 and asked[1] > 4 * asked[2] > 0


@given(cursor=st.integers(0, 500), skip=st.integers(0, 20), take=st.integers(1, 20), steps=st.integers(0, 3))
def test_a_choice_depends_on_nothing_but_state_and_position(cursor: int, skip: int, take: int, steps: int) -> None:
    curriculum = taught(steps)
    again = Curriculum(TASKS, "pass-rate", 0)
    again.load(json.loads(json.dumps(curriculum.state())))
    whole = curriculum.order(cursor, 0, skip + take)
    assert whole[skip:] == again.order(cursor, skip, take) == curriculum.order(cursor, skip, take)
    assert np.array_equal(again.weights(), curriculum.weights())


def test_a_level_asks_each_of_its_tasks_before_any_twice() -> None:
    one = [task(i, level="a") for i in range(7)]
    assert sorted(Curriculum(one, "pass-rate", 3).order(0, 0, 7)) == list(range(7))


def test_attempts_without_a_score_teach_nothing() -> None:
    curriculum = Curriculum(TASKS, "pass-rate", 0)
    before = curriculum.weights()
    measured = curriculum.learn([attempts(EASY[0], None, None)])
    assert np.array_equal(curriculum.weights(), before) and measured["curriculum_pass_rate"] == 0.5
