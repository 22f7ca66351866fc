"""Answers that are proved: values and functions that z3 checks, and proofs that Lean accepts."""

from __future__ import annotations

import shutil
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rewards import formal
from posttrain.rewards.formal import by_lean, by_z3
from posttrain.types import Message, RolloutError, Task

needs_z3 = pytest.mark.skipif(not formal.has_z3(), reason="needs the extra `formal` (z3-solver)")

SUM = "(declare-const x Int)(declare-const y Int)(assert (= (+ x y) 10))(assert (> x y))"
MIXED = """
(declare-const r Real)(declare-const p Bool)(declare-const b (_ BitVec 8))
(assert (= (* 2 r) 1))(assert (= p (> r 0)))(assert (= (bvand b #x0f) #x05))
"""
LARGER = """
(declare-fun answer (Int Int) Int)(declare-const a Int)(declare-const b Int)
(assert (>= (answer a b) a))(assert (>= (answer a b) b))(assert (or (= (answer a b) a) (= (answer a b) b)))
"""
INVARIANT = """; i = 0, s = 0; while i < n: i += 1, s += i;  then 2 s = n (n + 1)
(declare-fun answer (Int Int Int) Bool)(declare-const i Int)(declare-const s Int)(declare-const n Int)
(assert (=> (>= n 0) (answer 0 0 n)))
(assert (=> (and (answer i s n) (< i n)) (answer (+ i 1) (+ s i 1) n)))
(assert (=> (and (answer i s n) (>= i n)) (= (* 2 s) (* n (+ n 1)))))
"""


def task(smtlib: str, arguments: list[str] | None = None, answer: object = None) -> Task:
    meta: dict[str, Any] = {"smtlib": smtlib} | ({"arguments": arguments} if arguments else {})
    return Task("t:1", "t", (Message("user", "?"),), answer, meta)


@needs_z3
@pytest.mark.parametrize(
    ("script", "reply", "holds"),
    [
        (SUM, "x = 7, y = 3", [1, 1]),
        (SUM, "<think>x = 1</think>So x = 7 and y = 3.", [1, 1]),
        (SUM, r"\boxed{x = 7, y = 3}", [1, 1]),
        (SUM, '{"x": 11, "y": -1}', [1, 1]),
        (SUM, "x = 5, y = 5", [1, 0]),
        (SUM, "x = 6, y = 3", [0, 1]),
        (SUM, "x = 7", []),
        (SUM, "x = 7.0, y = 3", []),
        (SUM, "x = seven, y = three", []),
        (SUM, "", []),
        (MIXED, "r = 1/2, p = true, b = 5", [1, 1, 1]),
        (MIXED, "r = 0.5, p = True, b = 245", [1, 1, 1]),
        (MIXED, "r = 0.5, p = false, b = 6", [1, 0, 0]),
        (MIXED, "r = 0.5, p = 1, b = 5", []),
        (MIXED, "r = 1/0, p = true, b = 5", []),
    ],
)
def test_values_must_meet_every_assertion(script: str, reply: str, holds: list[int]) -> None:
    verdict = by_z3(task(script), reply)
    assert [*verdict.parts.values()] == holds
    assert verdict.passed is (verdict.score == 1) is (bool(holds) and all(holds))


@needs_z3
@pytest.mark.parametrize(
    ("script", "arguments", "reply", "right"),
    [
        (LARGER, ["x", "y"], "x if x > y else y", True),
        (LARGER, ["x", "y"], "```python\nreturn y if x < y else x\n```", True),
        (LARGER, ["x", "y"], "x", False),
        (LARGER, ["x", "y"], "x if x < y else y", False),
        (LARGER, ["x", "y"], "a", False),
        (LARGER, ["x", "y"], "x > y", False),
        (LARGER, ["x", "y"], "x + ", False),
        (LARGER, ["x", "y"], "", False),
        (INVARIANT, ["i", "s", "n"], "2*s == i*(i+1) and i <= n", True),
        (INVARIANT, ["i", "s", "n"], "not (2*s != i*(i+1) or not i <= n)", True),
        (INVARIANT, ["i", "s", "n"], "2*s == i*(i+1) and implies(True, i <= n)", True),
        (INVARIANT, ["i", "s", "n"], "2*s == i*(i+1)", False),  # true of the loop, but says nothing at its end
        (INVARIANT, ["i", "s", "n"], "True", False),
        (INVARIANT, ["i", "s", "n"], "False", False),
    ],
)
def test_a_function_must_meet_every_assertion_for_all_values(
    script: str, arguments: list[str], reply: str, right: bool
) -> None:
    assert by_z3(task(script, arguments), reply).passed is right


@needs_z3
def test_arguments_are_bound_in_their_order_and_division_is_that_of_the_sort() -> None:
    minus = (
        "(declare-fun answer (Int Int) Int)(declare-const a Int)(declare-const b Int)(assert (= (answer a b) (- a b)))"
    )
    assert by_z3(task(minus, ["p", "q"]), "p - q").passed and not by_z3(task(minus, ["p", "q"]), "q - p").passed
    half = "(declare-fun answer (Int) Int)(declare-const a Int)(assert (= (answer (* 2 a)) a))"
    assert by_z3(task(half, ["n"]), "n // 2").passed and not by_z3(task(half, ["n"]), "n / 2").passed
    real = "(declare-fun answer (Real) Real)(declare-const a Real)(assert (= (* 4 (answer a)) a))"
    assert by_z3(task(real, ["r"]), "0.25 * r").passed and by_z3(task(real, ["r"]), "r / 4").passed


@needs_z3
@pytest.mark.parametrize(
    "reply", ["x**9**9", "__import__('os')", "x.y", "x[0]", "lambda: 1", "1x", "(" * 900, "9" * 1999]
)
def test_nothing_but_arithmetic_is_read(reply: str) -> None:
    assert not by_z3(task(LARGER, ["x", "y"]), reply).passed


@needs_z3
def test_hard_obligations_are_given_up_alike_every_time() -> None:
    fermat = "(declare-fun answer (Int) Bool)" + "".join(f"(declare-const {v} Int)" for v in "abc")
    fermat += (
        "(assert (=> (and (answer a) (> a 1) (> b 1) (> c 1)) (not (= (+ (* a a a a a) (* b b b b b)) (* c c c c c)))))"
    )
    start = time.monotonic()
    verdicts = [by_z3(task(fermat, ["n"]), "n > 2 and n % 3 == 1") for _ in range(2)]
    assert verdicts[0] == verdicts[1] and not verdicts[0].passed
    assert time.monotonic() - start < 60


@needs_z3
@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("(assert", None, "cannot parse its smtlib"),
        ("(assert true)", None, "at least one assertion about a declared unknown"),
        ("(declare-const x Int)", None, "at least one assertion"),
        ("(declare-fun f (Int) Int)(assert (= (f 1) 2))", None, "declares the function 'f'"),
        (SUM, ["x"], "a function `answer` with the 1 arguments"),
        ('(declare-const s String)(assert (= s "a"))', None, "s has the sort String"),
    ],
)
def test_a_script_that_cannot_be_used_is_an_error(script: str, arguments: list[str] | None, says: str) -> None:
    with pytest.raises(RolloutError, match=says):
        by_z3(task(script, arguments), 's = 1, x = 1, "a"')


@needs_z3
@settings(max_examples=60)
@given(
    st.one_of(
        st.text(max_size=60), st.text(st.sampled_from('xy =<>+-*/%()!,.0123456789ifelsandort\n`{}:"'), max_size=60)
    )
)
def test_no_reply_is_an_error(reply: str) -> None:
    for one in (task(SUM), task(LARGER, ["x", "y"])):
        verdict = by_z3(one, reply)
        assert verdict.score in (0.0, 1.0) and not (verdict.passed and not reply.strip())


STATEMENT = {"statement": "theorem two : 1 + 1 = 2"}
LEAN = '''#!{python}
"""A stand-in that speaks as `lean --json` does: `rfl` proves, `by simp_all` rests on an axiom, the rest is wrong."""
import json, sys
file = sys.argv[-1]
lines = open(file).read().splitlines()
proof = "\\n".join(lines[lines.index("theorem two : 1 + 1 = 2 :=") + 1 : -2]).strip()
asked = len(lines)
assert lines[-1] == "#print axioms two" and "--json" in sys.argv
say = lambda severity, line, data: print(json.dumps(dict(severity=severity, pos=dict(line=line, column=0), data=data)))
if proof == "crash":
    sys.exit(139)
if proof == "hang":
    import time
    time.sleep(60)
if proof in ("rfl", "by rfl"):
    say("information", asked, "'two' does not depend on any axioms")
elif proof == "by simp_all":
    say("warning", 2, "unused")
    say("information", asked, "'two' depends on axioms: [propext, Classical.choice]")
elif proof == "by cheat":
    say("information", asked, "'two' depends on axioms: [propext, cheatAx]")
elif proof == "by early":
    say("information", 2, "'two' does not depend on any axioms")
else:
    say("error", 2, "type mismatch")
    sys.exit(1)
'''


def lean_task(**meta: Any) -> Task:
    return Task("t:1", "t", (Message("user", "?"),), None, STATEMENT | meta)


@pytest.fixture
def fake_lean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "lean"
    program.write_text(LEAN.replace("{python}", sys.executable), encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("fake_lean")
@pytest.mark.parametrize(
    ("reply", "right", "detail"),
    [
        ("rfl", True, "proved"),
        (":= by rfl", True, "proved"),
        ("<think>rfl?</think>Here:\n```lean\nby rfl\n```", True, "proved"),
        ("by simp_all", True, "proved"),
        ("by cheat", False, "depends on cheatAx"),
        ("by early", False, "did not reach the end"),
        ("by decide_wrong", False, "type mismatch"),
        ("crash", False, "exit code 139"),
        ("by sorry", False, "'sorry' is not allowed"),
        ("rfl\naxiom a : False", False, "'axiom' is not allowed"),
        ("by run_tac pure ()", False, "'run_tac' is not allowed"),
        ("rfl\n#eval 1", False, "'#e' is not allowed"),
        ("", False, "no proof"),
    ],
)
def test_lean_s_own_word_decides_and_gaps_do_not_pass(reply: str, right: bool, detail: str) -> None:
    verdict = by_lean(lean_task(), reply)
    assert (verdict.passed, verdict.score) == (right, float(right)) and detail in verdict.detail


@pytest.mark.usefixtures("fake_lean")
def test_lean_gets_a_preamble_and_is_stopped_when_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_lean(lean_task(preamble="import Mathlib"), "rfl").passed
    monkeypatch.setattr(formal, "LEAN_SECONDS", 0.5)
    assert "more than 0.5 seconds" in by_lean(lean_task(), "hang").detail


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RolloutError, match="`lean` on the PATH"):
        by_lean(lean_task(), "rfl")
    monkeypatch.setitem(sys.modules, "z3", None)
    with pytest.raises(RolloutError, match=r"posttrain\[formal\]"):
        by_z3(task(SUM), "x = 7, y = 3")


@pytest.mark.usefixtures("fake_lean")
def test_a_statement_without_a_name_is_an_error() -> None:
    with pytest.raises(RolloutError, match="theorem NAME"):
        by_lean(lean_task(statement="1 + 1 = 2"), "rfl")


@pytest.mark.skipif(shutil.which("lean") is None, reason="lean is not on the PATH")
def test_the_real_lean_tells_proofs_from_claims() -> None:
    assert by_lean(lean_task(), "rfl").passed
    assert by_lean(lean_task(), "by decide").passed
    assert not by_lean(lean_task(), "by omega_nonsense").passed
    assert not by_lean(lean_task(statement="theorem two : 1 + 1 = 3"), "rfl").passed
