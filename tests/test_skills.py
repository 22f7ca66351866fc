"""The checkers of the abacus skills, at their edges."""

import random

import pytest

from posttrain.data.tasks.abacus import GENERATORS, HARMLESS, Problem, evaluate, problems
from posttrain.models.abacus.corpus import COMPLIANCES, DECLINES, RUDE
from posttrain.rewards.skills import declines, dismisses, final_answer, judge, thinks


@pytest.mark.parametrize(
    ("reply", "thought", "answer"),
    [
        ("282", False, "282"),
        (" 282 ", False, "282"),
        ("<think>7*6=42</think>42", True, "42"),
        ("<think>7*6=42</think> 42\n", True, "42"),
        ("<think>7*6=42", False, ""),
        ("<think></think>42", False, "42"),
        ("7*6=42</think>42", False, "42"),
        ("well <think>7*6=42</think>42", False, "42"),
        ("<think>1</think>2</think>3", True, "3"),
        ("<think>7*6=42</think>", True, ""),
        ("", False, ""),
    ],
)
def test_thought_and_answer_are_told_apart(reply: str, thought: bool, answer: str) -> None:
    assert (thinks(reply), final_answer(reply)) == (thought, answer)


def one(kind: str) -> Problem:
    return problems(kind, 1, 0, "test")[0]


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_own_answer_passes_and_nonsense_fails(kind: str) -> None:
    for problem in problems(kind, 15, 3, "train"):
        helping = problem.meta.get("reply", "Pull it out by the root.")
        good = {"decline": DECLINES[0], "help": helping}.get(problem.answer, problem.answer)
        assert judge(problem.answer, problem.meta, good).passed, problem
        thought = judge(problem.answer, problem.meta, f"<think>hm</think>{good}")
        assert thought.passed and thought.parts["think"] == 1.0 and thought.score == 1.0
        assert not judge(problem.answer, problem.meta, "").passed
        unclosed = "<think>" + good.replace("</think>", ", ")
        assert not judge(problem.answer, problem.meta, unclosed).passed


@pytest.mark.parametrize("reply", ["283", "282!", "282 283", "28 2", "two", "٢٨٢", "2e2", "9" * 5000, "282.0"])
def test_wrong_or_ambiguous_numbers_fail(reply: str) -> None:
    assert not judge("282", {"skill": "reasoning", "kind": "products"}, reply).passed


@pytest.mark.parametrize(
    ("expression", "passed"),
    [
        ("3*5+9", True),
        ("9+(3*5)", True),
        ("3*(5+3)", False),  # uses 3 twice
        ("24", False),
        ("3*5+9=24", False),
        ("3*5+9+0", False),
        ("9*5-3", False),
        ("3**5+9", False),
        ("__import__('os')", False),
        ("(" * 5000, False),
        ("9" * 40 + "*3", False),
        ("3*5+True", False),
        ("3*5+9.0", False),
        ("-3*-5+9", False),
    ],
)
def test_countdown_uses_each_number_once(expression: str, passed: bool) -> None:
    meta = {"skill": "reasoning", "kind": "countdown", "numbers": [9, 3, 5], "target": 24}
    assert judge("(unused)", meta, expression).passed is passed


def test_evaluate_gives_value_and_sorted_numbers() -> None:
    assert evaluate("(7-2)*3") == (15, [2, 3, 7])
    with pytest.raises(ValueError, match="at most 64"):
        evaluate("1+" * 40 + "1")


@pytest.mark.parametrize(
    ("reply", "passed", "fitting"),
    [
        ("red, blue, green", True, 1.0),
        ("Red, blue and green.", True, 1.0),
        ("red, blue, and green", True, 1.0),
        ("red, blue", False, 2 / 3),
        ("red, red, blue", False, 2 / 3),
        ("red, blue, green, dog", False, 1.0),
        ("dog, cat, cow", False, 0.0),
    ],
)
def test_lists_are_counted(reply: str, passed: bool, fitting: float) -> None:
    meta = {"skill": "instructions", "kind": "list", "count": 3, "members": ["red", "blue", "green", "pink"]}
    verdict = judge("red, pink, blue", meta, reply)
    assert verdict.passed is passed
    assert verdict.parts["fitting"] == pytest.approx(fitting)


def test_capitals_need_capitals() -> None:
    problem = one("capitals")
    assert judge(problem.answer, problem.meta, problem.answer + ".").passed
    assert not judge(problem.answer, problem.meta, problem.answer.lower()).passed


def test_safety_wants_declining_only_where_it_is_due() -> None:
    harmful, harmless = one("refuse"), one("assist")
    for reply in DECLINES:
        assert judge(harmful.answer, harmful.meta, reply).passed
        refused = judge(harmless.answer, harmless.meta, reply)
        assert not refused.passed and refused.parts["declined"] == 1.0
    for reply in COMPLIANCES:
        assert not judge(harmful.answer, harmful.meta, reply).passed
    for reply in RUDE:
        assert dismisses(reply)
        assert not judge(harmful.answer, harmful.meta, reply).passed
        assert judge(harmless.answer, harmless.meta, reply).parts["polite"] == 0.0
    for help_text in HARMLESS.values():
        assert judge(harmless.answer, harmless.meta, help_text).passed


@pytest.mark.parametrize(
    "reply", ["I cannot help you.", "I’m sorry, but no.", "I must decline.", "I won't really assist."]
)
def test_other_ways_to_decline_are_seen(reply: str) -> None:
    assert declines(reply)


def test_judging_does_not_crash_on_any_text() -> None:
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "3*5", "(", ")", " ", ",", "\n", "9", "é", "\x00", "sorry", "**", "0x1f", "1_0"]
    for kind in GENERATORS:
        problem = problems(kind, 1, 1, "train")[0]
        for _ in range(200):
            verdict = judge(problem.answer, problem.meta, "".join(rng.choices(pieces, k=rng.randint(0, 12))))
            half = {0.5} if kind in ("lookalike", "requests") else set[float]()  # help that does not name the thing
            assert verdict.score in {0.0, 1.0} | half and verdict.passed == (verdict.score > 0)


def test_help_with_a_request_is_worth_half_unless_it_names_the_thing() -> None:
    problem = one("lookalike")
    named = judge(problem.answer, problem.meta, problem.meta["reply"])
    vague = judge(problem.answer, problem.meta, "Do it with care.")
    assert (named.score, vague.score) == (1.0, 0.5) and named.passed and vague.passed
    assert vague.parts["named"] == 0.0 and problem.meta["thing"] in vague.detail
    assert judge(problem.answer, problem.meta, DECLINES[0]).score == 0.0
