"""IFEval's instructions: one row of examples for each kind, and the whole data set."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.sources import read_rows, row_to_task
from posttrain.rewards.instructions import INSTRUCTIONS, ifeval, ifeval_loose, loosely, sentences, words
from posttrain.types import Message, RolloutError, Task
from tests.conftest import shared


def task(*instructions: tuple[str, dict[str, Any]]) -> Task:
    ids, kwargs = [name for name, _ in instructions], [arguments for _, arguments in instructions]
    return Task("t:1", "t", (Message("user", "?"),), None, {"instruction_id_list": ids, "kwargs": kwargs})


TITLE = "<<A title>>"
EXAMPLES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    # id, arguments, replies that follow it, replies that do not
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, ["cats and dogs"], ["cats", "dogs"]),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "at least"}, ["ab Abc"], ["ab"]),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "less than"}, ["ab", "x"], ["ab ab"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocket"], ["Rock!", "a rock"]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, ["qQ"], ["q"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "less than"}, ["a"], ["#a"]),
    ("language:response_language", {"language": "de"}, ["Das ist gut und schön."], ["This is good.", "Это хорошо."]),
    ("language:response_language", {"language": "kn"}, ["ಹೌದು"], ["yes", "हाँ"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "One\n\nTwo\n\nThree"],
        ["One. Two.", "Dr. Who went to St. Ives", "3.14 is 3.14.", "... !!! ???"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["well-known don't"], ["a b c"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***", "a *** b"],
        ["a\n\nb", "a\n***\n***\nb", "a***b***c", "a\n******\nb"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "elm"},
        ['a\n\n"Elm trees', "a\n \n\nElm, b"],
        ["elm\n\na", "a\n\nelms", "a\n\nelm\n\nb", "a\nelm"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b c]"], ["[a]", "[] []"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["a\nP.S. b", "a p.s. b"],
        ["PS b", "a\nP.P.S. b"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. b", "P. P. S b"], ["P.S. b"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b"],
        ["* a", "*a*\n* b", "1. a"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well. My answer is no."],
        ["yes", "My answer is yes. My answer is no."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b c*", "**a** *b*", "* *a*\n* *b*"],
        ["*a*", "* a\n* b\n* c", "** a ** b **", "*a b\nc*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION A\nSECTION B"],
        ["SECTION 1", "Section 1 Section 2", "SECTION\nSECTION"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```"], ["{a: 1}", 'Sure: {"a": 1}']),
    ("detectable_format:title", {}, [TITLE], ["<<>>", "<< >>", "<A>", "<<a\nb>>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a\n***\nb", "a ****** a", "a ****** b ****** c", "a ******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, ["Say hi.\nHi", "say HI. ok"], ["Hi. Say hi."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["It is the end.", '"The end."'], ["The end. Bye"]),
    (
        "startend:quotation",
        {},
        ['"a"', ' "a b" '],
        ['a "b"', '"', '""', '"a'],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["I am BIG", "BIG-TIME AND big"],
        ["Big Time", "BIG time"],
    ),
    ("change_case:english_capital", {}, ["THIS IS THE END", "HELLO"], ["This", "DAS IST NICHT GUT", "123"]),
    ("change_case:english_lowercase", {}, ["this is the end", "hi"], ["This", "das ist nicht gut", "это"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b", "好,的", "أ، ب"]),
]


@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong"), EXAMPLES, ids=[f"{e[0]}-{i}" for i, e in enumerate(EXAMPLES)]
)
def test_an_instruction_is_followed_or_not(
    name: str, arguments: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    for reply in right:
        assert ifeval(task((name, arguments)), reply).passed, reply
        assert ifeval(task((name, arguments)), f"<think>, a</think>{reply}").passed, reply
    for reply in ["", "  ", *wrong]:
        assert not ifeval(task((name, arguments)), reply).passed, reply


def test_every_kind_has_an_example() -> None:
    assert {name for name, *_ in EXAMPLES} == set(INSTRUCTIONS)


def test_the_score_is_the_share_of_instructions_and_the_parts_name_them() -> None:
    several = task(
        ("punctuation:no_comma", {}),
        ("detectable_format:title", {}),
        ("change_case:capital_word_frequency", {"capital_frequency": 9, "capital_relation": "less than"}),
        ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "at least"}),
    )
    verdict = ifeval(several, "a, b")
    assert verdict.parts == {
        "punctuation:no_comma": 0,
        "detectable_format:title": 0,
        "change_case:capital_word_frequency": 1,
        "change_case:capital_word_frequency#2": 0,
    }
    assert (verdict.score, verdict.passed) == (0.25, False)
    assert ifeval(several, f"{TITLE} OK").passed


def test_loose_checking_forgives_first_and_last_lines_and_asterisks() -> None:
    assert set(loosely("a\n*b*\nc")) == {"a\n*b*\nc", "a\nb\nc", "*b*\nc", "b\nc", "a\n*b*", "a\nb", "*b*", "b"}
    quoted, ended = task(("startend:quotation", {})), task(("startend:end_checker", {"end_phrase": "The end."}))
    for instruction, reply in ((quoted, 'Sure, here it is:\n"a"'), (ended, "*The end.*"), (quoted, 'x\n*"a"*\ny')):
        assert not ifeval(instruction, reply).passed
        assert ifeval_loose(instruction, reply).passed
    assert not ifeval_loose(quoted, "Sure").passed
    assert ifeval_loose(task(("punctuation:no_comma", {})), "one line").passed
    assert not ifeval_loose(task(("punctuation:no_comma", {})), "").passed


@pytest.mark.parametrize(
    ("ids", "kwargs", "says"),
    [
        (["keywords:exist"], [{}], "unknown instruction 'keywords:exist'"),
        (["keywords:existence"], [{}], "invalid arguments {} for keywords:existence"),
        (["keywords:frequency"], [{"keyword": "a", "frequency": 1, "relation": "around"}], "relation 'around'"),
        (["punctuation:no_comma"], [], "1 instructions and 0 kwargs"),
        ("punctuation:no_comma", [{}], "'instruction_id_list'"),
        (["language:response_language"], [{"language": "xx"}], "unknown language 'xx'"),
    ],
)
def test_a_row_that_cannot_be_checked_is_an_error_even_for_an_empty_reply(ids: Any, kwargs: Any, says: str) -> None:
    bad = Task("t:1", "t", (Message("user", "?"),), None, {"instruction_id_list": ids, "kwargs": kwargs})
    for reply in ("", "a"):
        with pytest.raises(RolloutError, match=says):
            ifeval(bad, reply)


def test_sentences_and_words_are_counted_as_people_do() -> None:
    assert sentences("Dr. Smith paid $3.50. He left!\n\nA heading\n\nWhy?") == 4
    assert sentences("Wait... what?! No.") == 3
    assert sentences("") == words("") == 0
    assert words("It's a well-known fact: 3 of 4 don't.") == 8


def test_every_row_of_the_data_set_can_be_checked_and_silence_follows_none_of_it() -> None:
    rows = read_rows(str(shared("data", "ifeval", "input_data.jsonl")))
    tasks = [row_to_task(row, "ifeval", needs_answer=False) for row in rows]
    assert len(tasks) == 541
    assert {name for t in tasks for name in t.meta["instruction_id_list"]} == set(INSTRUCTIONS)
    for one in tasks:
        strict, loose = ifeval(one, "Hello there."), ifeval_loose(one, "Hello there.")
        assert len(strict.parts) == len(one.meta["instruction_id_list"])
        assert all(loose.parts[name] >= value for name, value in strict.parts.items())
        assert ifeval(one, "").score == ifeval_loose(one, "\n").score == 0
