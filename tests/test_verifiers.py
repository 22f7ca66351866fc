"""Verifiers: what passes, what fails, what cannot be judged, and that every GSM8K gold answer passes its own."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.answers import boxed, final_part, marked_answer, split_gold
from posttrain.data.sources import read_rows, row_to_task
from posttrain.rewards.verifiers import VERIFIERS, exact, format, is_mathematical, math, numeric
from posttrain.types import Message, RolloutError, Task
from tests.conftest import shared


def task(answer: object) -> Task:
    return Task("t:1", "t", (Message("user", "?"),), answer)


@pytest.mark.parametrize(
    ("gold", "reply", "passes"),
    [
        ("72", "72", True),
        ("72", "First 48, then 24, so 72", True),
        ("72", "72 clips were sold; I am done with 2 months", False),
        ("72", "#### 72", True),
        ("72", "48 + 24 = 72\n#### 72", True),
        ("72", "The answer is 72. It took 2 steps.", True),
        ("72", "Answer: **72**", True),
        ("72", r"so \boxed{72} as 3 > 2", True),
        ("72", r"\boxed{71} no wait \boxed{72}", True),
        ("72", "<think>it may be 71</think>72", True),
        ("72", "<think>72</think>71", False),
        ("72", "<think>72", False),
        ("72", "", False),
        ("72", "seventy-two", False),
        ("1072", "1,072", True),
        ("1072", "$1,072.00", True),
        ("1072", r"\boxed{1{,}072}", True),
        (1072.0, "1072", True),
        ("-5", "-5", True),
        ("-5", "−5", True),
        ("5", "10-5=5", True),
        ("-5", "it is 10-5", False),
        ("-5", "-$5", True),
        ("0.75", "3/4", True),
        ("0.75", r"\frac{3}{4}", True),
        ("-1/2", r"-\frac12", True),
        ("3.5", "3 1/2", True),
        ("3.5", r"3\frac{1}{2}", True),
        ("50", "50%", True),
        ("50%", "0.5", True),
        ("50", "0.5", False),
        ("0.3333333", "1/3", True),
        ("1000000", "1000001", False),
        ("1000000", "1000000.5", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("1500", "1.5e3", True),
        ("7", "7/0", False),
        ("7", "9" * 9999, False),
        ("3", "version.3", False),
    ],
)
def test_numeric_reads_the_last_number_of_the_final_answer(gold: object, reply: str, passes: bool) -> None:
    assert numeric(task(gold), reply).passed is passes


@pytest.mark.parametrize(
    ("gold", "reply", "passes"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"The answer is $\frac{2}{4}$.", True),
        (r"x^2+2x+1", r"\boxed{(x+1)^2}", True),
        (r"x^2+2x+1", r"\boxed{(x+2)^2}", False),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
        (r"\{1,2\}", r"$\{2,1\}$", True),
        ("(1,2]", r"\boxed{(1, 2]}", True),
        ("(1,2]", r"\boxed{[1, 2]}", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", True),
        ("5", r"\boxed{x = 5}", True),
        ("72", "The answer is 72 apples.", True),
        ("72", r"\boxed{2x+72}", False),
        ("2", r"\boxed{2x}", False),
        (r"\frac{\pi}{4}", r"<think>\boxed{2}</think>\boxed{\dfrac{\pi}{4}}", True),
        ("yes", "yes", True),
        ("yes", "sey", False),
        ("72", "", False),
        (r"\frac{1}{2}", "", False),
        (r"\frac{1}{2}", r"\boxed{", False),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{}", False),
        (r"x", r"\boxed{\undefined{}}}", False),
    ],
)
def test_math_compares_mathematics_not_letters(gold: str, reply: str, passes: bool) -> None:
    assert math(task(gold), reply).passed is passes


@pytest.mark.parametrize(
    "bomb",
    [
        "9^{9^{9^{9}}}",
        "9^9^9",
        "(9^{999})^{999}",
        "10^{1000000000}",
        "9**9**9**9",
        "99999!",
        "9!!!",
        "(9^{9}!)!",
        r"\sum_{i=1}^{10^9} i",
        r"\binom{1000000}{500000}",
        "2^{(9^9)}",
        r"{((2^{99})^{99})}^{99}",
        "(a+b+c+d+e+f)^{999}",
        "(x+1)^{30}(y+2)^{30}",
        r"\log(\sin(\cos(x^2)))",
        "x" * 100_000,
        r"\boxed{" * 20_000,
        "1,234" * 20_000,
        "<think>" * 20_000,
        "$" * 20_000,
    ],
)
def test_no_reply_makes_a_verifier_run_away(bomb: str) -> None:
    start = time.process_time()
    for gold in ("7", r"\sqrt{2}", "x^2+(y+1)^{3}"):
        for reply in (bomb, rf"\boxed{{{bomb}}}"):
            assert not math(task(gold), reply).passed
    assert not numeric(task("-7"), bomb).passed
    assert time.process_time() - start < 20  # of its own work; unguarded, most of these take hours


def test_math_gives_the_same_verdicts_in_any_thread() -> None:
    pairs = [(r"\frac{1}{2}", "0.5"), ("x^2-1", r"\boxed{(x-1)(x+1)}"), (r"\sqrt{8}", r"$2\sqrt{2}$"), ("x", "$y$")]
    here = [math(task(g), r).passed for g, r in pairs]
    there: list[list[bool]] = []
    work = lambda: there.append([math(task(g), r).passed for g, r in pairs])
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert here == [True, True, True, False]
    assert there == [here] * 4


@pytest.mark.parametrize(
    ("gold", "reply", "passes"),
    [
        ("Paris", "Paris", True),
        ("Paris", "  Paris\n", True),
        ("Paris", "<think>Rome?</think>Paris", True),
        ("Paris", "The answer is Paris.", True),
        ("Paris", "paris", False),
        ("Paris", "Paris, France", False),
        ("Paris", "", False),
        (43.0, "43", True),
    ],
)
def test_exact_compares_the_final_answer_character_for_character(gold: object, reply: str, passes: bool) -> None:
    assert exact(task(gold), reply).passed is passes


@pytest.mark.parametrize(
    ("reply", "passes", "parts"),
    [
        ("<think>a</think>b", True, (1, 1, 1)),
        ("\n<think>a\nb</think>\n\nc", True, (1, 1, 1)),
        ("<think></think>b", False, (1, 0, 1)),
        ("<think>a</think>  ", False, (1, 1, 0)),
        ("<think>a", False, (0, 0, 0)),
        ("a</think>b", False, (0, 0, 0)),
        ("so <think>a</think>b", False, (0, 0, 0)),
        ("<think>a</think>b</think>c", False, (0, 1, 1)),
        ("", False, (0, 0, 0)),
    ],
)
def test_format_wants_one_thought_and_then_an_answer(reply: str, passes: bool, parts: tuple[float, ...]) -> None:
    verdict = format(task("anything"), reply)
    assert (verdict.passed, tuple(verdict.parts.values())) == (passes, parts)


@pytest.mark.parametrize("name", ["exact", "numeric", "math"])
@pytest.mark.parametrize("gold", [None, "", "  "])
def test_a_task_without_a_gold_answer_is_an_error_not_a_wrong_reply(name: str, gold: object) -> None:
    with pytest.raises(RolloutError, match="no gold answer"):
        VERIFIERS[name](task(gold), "72")


def test_numeric_on_a_gold_without_a_number_is_an_error() -> None:
    with pytest.raises(RolloutError, match="has no number"):
        numeric(task("Paris"), "72")


@given(st.text(max_size=200), st.sampled_from(["72", "-1/2", r"\frac{1}{2}", "x+1"]))
def test_a_reply_is_never_an_error(reply: str, gold: str) -> None:
    for name in ("exact", "math", "format"):
        assert VERIFIERS[name](task(gold), reply).score in (0.0, 1.0)


@given(st.integers(-(10**12), 10**12))
def test_every_whole_number_equals_itself_however_it_is_written(value: int) -> None:
    for reply in (str(value), f"{value:,}", f"{value}.0", f"#### {value:,}", rf"\boxed{{{value}}}", f"${value}$"):
        assert numeric(task(str(value)), reply).passed, reply
        assert math(task(str(value)), reply).passed, reply


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_different_whole_numbers_are_never_equal(a: int, b: int) -> None:
    assert math(task(a), str(b)).passed is numeric(task(a), str(b)).passed is (a == b)


@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_every_gsm8k_gold_passes_its_own_verifier_and_silence_fails(split: str, count: int) -> None:
    tasks = [row_to_task(row, "gsm8k") for row in read_rows(str(shared("data", "gsm8k", f"{split}.jsonl")))]
    assert len(tasks) == count
    for verify in (numeric, math, exact):
        assert [t.id for t in tasks if not verify(t, t.answer).passed] == []
        assert [t.id for t in tasks if verify(t, "").passed] == []
    for reply in ("#### {}", "The answer is {}.", r"so \boxed{{{}}}"):
        assert [t.id for t in tasks if not math(t, reply.format(t.answer)).passed] == []
    assert all(is_mathematical(t.answer) for t in tasks)


def test_the_whole_gsm8k_solution_passes_numerically() -> None:
    rows = read_rows(str(shared("data", "gsm8k", "test.jsonl")))
    tasks = [row_to_task(row, "gsm8k") for row in rows]
    wrong = [t.id for t, row in zip(tasks, rows, strict=True) if not numeric(t, row.values["answer"]).passed]
    assert wrong == []


@pytest.mark.parametrize(
    ("gold", "mathematical"),
    [("72", True), (4.5, True), (r"\frac{1}{2}", True), ("x^2+1", True), ("3*4", True), ("50%", True)]
    + [("Paris", False), ("well-known", False), ("yes", False), ("B", False), ("2024-05-01 is a date", False)],
)
def test_numbers_and_formulas_are_told_from_words(gold: object, mathematical: bool) -> None:
    assert is_mathematical(gold) is mathematical


def test_where_the_answer_stands() -> None:
    assert final_part("<think>a</think> b ") == "b"
    assert final_part("plain") == "plain"
    assert final_part("<think>never ends 5") == ""
    assert boxed(r"\boxed{\frac{1}{2}} \boxed{open") == [(0, r"\frac{1}{2}")]
    assert marked_answer("#### Step 1\nso \\boxed{5}") == "5"
    assert marked_answer("nothing announced 5") is None
    assert split_gold("a\n#### 1,072") == ("1072", "a")
    assert split_gold(r"so $\boxed{3}$") == ("3", r"so $\boxed{3}$")
    assert split_gold("Paris") == ("Paris", "")
