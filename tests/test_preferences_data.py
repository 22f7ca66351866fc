"""Preferences, judgements and stepwise solutions from rows: every layout, every refusal, and the real data sets."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from posttrain.data.files import Row, read_rows
from posttrain.data.preferences import (
    judgements_of,
    read_judgements,
    read_preferences,
    read_solutions,
    row_to_judgement,
    row_to_outcome,
    row_to_preference,
    row_to_solution,
    write_judgements,
    write_preferences,
    write_solutions,
)
from posttrain.data.sources import parse_rows
from posttrain.types import DataError, Judgement, Message, Preference, Solution
from tests.conftest import shared

SYSTEM, USER, MORE = Message("system", "s"), Message("user", "u"), Message("user", "more")


def at(values: dict[str, Any]) -> Row:
    return Row("data/rows.jsonl:7", values)


def said(*turns: str) -> list[dict[str, str]]:
    """Messages from "user: u" texts."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


PAIR: dict[str, Any] = {"chosen": "a", "rejected": "b"}
TALK = {
    "chosen": "\n\nHuman: u\n\nAssistant: x\n\nHuman: more\n\nAssistant: a",
    "rejected": "\n\nHuman: u\n\nAssistant: x\n\nHuman: more\n\nAssistant:  b ",
}
TALKED = (USER, Message("assistant", "x"), MORE)


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"prompt": "u", **PAIR}, (USER,)),
        ({"question": "u", **PAIR}, (USER,)),
        ({"problem": "u", **PAIR}, (USER,)),
        ({"instruction": "u", "input": "x", **PAIR}, (Message("user", "u\n\nx"),)),
        ({"input": "u", **PAIR}, (USER,)),
        ({"prompt": said("system: s", "user: u"), **PAIR}, (SYSTEM, USER)),
        ({"messages": said("user: u"), **PAIR}, (USER,)),
        ({"prompt": "u", "chosen": said("assistant: a"), "rejected": said("assistant: b")}, (USER,)),
        ({"prompt": "u", "chosen": "a", "rejected": said("assistant: b")}, (USER,)),
        (
            {
                "prompt": "u",
                "chosen": said("assistant: x", "user: more", "assistant: a"),
                "rejected": said("assistant: x", "user: more", "assistant: b"),
            },
            TALKED,
        ),
        (
            {
                "chosen": said("system: s", "user: u", "assistant: a"),
                "rejected": said("system: s", "user: u", "assistant: b"),
            },
            (SYSTEM, USER),
        ),
        # a prompt column beside whole conversations, and `messages` that repeat the prompt and the chosen answer
        (
            {
                "prompt": "u ",
                "messages": said("user: u", "assistant: a"),
                "chosen": said("user: u", "assistant: a"),
                "rejected": said("user: u", "assistant: b"),
            },
            (USER,),
        ),
        (TALK, TALKED),
        ({"prompt": "u", **TALK}, TALKED),
        ({"prompt": "\n\nHuman: u\n\nAssistant: x\n\nHuman: more\n\nAssistant:", **PAIR}, TALKED),
        ({"prompt": "Human: u", **PAIR}, (Message("user", "Human: u"),)),  # one speaker is no dialogue
    ],
)
def test_every_layout_gives_the_prompt_and_the_two_answers(values: dict[str, Any], prompt: tuple[Message, ...]) -> None:
    assert row_to_preference(at(values)) == Preference("rows.jsonl:7", prompt, "a", "b")


def test_answers_are_kept_to_the_letter() -> None:
    made = row_to_preference(at({"prompt": " u ", "chosen": " a\n", "rejected": 3}))
    assert (made.prompt[0].content, made.chosen, made.rejected) == (" u ", " a\n", "3")


def test_the_id_is_the_file_without_its_folder_or_the_whole_hub_id() -> None:
    values = {"prompt": "u", **PAIR}
    assert row_to_preference(Row("C:\\x/a.parquet:12", values)).id == "a.parquet:12"
    assert row_to_preference(Row("openai/gsm8k/main:test:3", values)).id == "openai/gsm8k/main:test:3"


def test_system_and_instruction_frame_the_prompt_and_not_the_answers() -> None:
    made = row_to_preference(at({"prompt": "u", **PAIR}), "s", "Be brief.")
    assert made == Preference("rows.jsonl:7", (SYSTEM, Message("user", "u\n\nBe brief.")), "a", "b")
    with pytest.raises(DataError, match=r"^data/rows.jsonl:7: the row has its own system message"):
        row_to_preference(at({"prompt": said("system: s", "user: u"), **PAIR}), system="other")


@pytest.mark.parametrize(
    ("columns", "label", "margin"),
    [
        ({}, 1.0, 0.0),
        ({"label": 0.8}, 0.8, 0.0),
        ({"label": 0}, 0.0, 0.0),
        ({"label": None, "tie": None, "margin": None}, 1.0, 0.0),
        ({"tie": True}, 0.5, 0.0),
        ({"tie": False}, 1.0, 0.0),
        ({"tie": False, "label": 0.3}, 0.3, 0.0),
        ({"tie": True, "label": 0.5}, 0.5, 0.0),
        ({"margin": 2}, 1.0, 2.0),
        ({"score_chosen": 8.5, "score_rejected": 6}, 1.0, 2.5),
        ({"score_chosen": 1, "score_rejected": 3}, 1.0, -2.0),
        ({"margin": 1, "score_chosen": 8, "score_rejected": 6}, 1.0, 1.0),
    ],
)
def test_label_wins_over_tie_and_margin_over_scores(columns: dict[str, Any], label: float, margin: float) -> None:
    made = row_to_preference(at({"prompt": "u", **PAIR, **columns}))
    assert (made.label, made.margin) == (label, margin)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": "u"}, "no column holds a pair of answers .chosen, rejected.; the row has prompt"),
        ({"prompt": "u", "chosen": "a"}, "the row has 'chosen' but no 'rejected'"),
        ({"prompt": "u", "chosen": None, "rejected": "b"}, "the row has 'rejected' but no 'chosen'"),
        (PAIR, "no column holds a prompt .prompt, messages, question, .*; the row has chosen, rejected"),
        ({"chosen": said("assistant: a"), "rejected": said("assistant: b")}, "no column holds a prompt"),
        ({"prompt": " ", **PAIR}, "column 'prompt' is empty"),
        ({"prompt": "u", "chosen": " ", "rejected": "b"}, "column 'chosen' is empty"),
        ({"prompt": "u", "chosen": "a", "rejected": said("assistant:  ")}, "the answer in 'rejected' is empty"),
        ({"prompt": "u", "chosen": "a", "rejected": []}, "column 'rejected' is not a list of messages"),
        ({"prompt": "u", "chosen": {"text": "a"}, "rejected": "b"}, "column 'chosen' holds dict, expected text"),
        ({"prompt": "u", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same text"),
        ({**TALK, "rejected": TALK["chosen"] + " "}, "chosen and rejected are the same text"),
        (
            {**TALK, "rejected": TALK["chosen"].replace("x", "y")},
            r"chosen \(4 messages\) and rejected \(4\) differ before their last message, first in message 2",
        ),
        (
            {"chosen": said("user: u", "assistant: a"), "rejected": TALK["chosen"]},
            r"chosen \(2 messages\) and rejected \(4\) differ before their last message, first in message 2",
        ),
        (
            {"chosen": said("user: u", "assistant: a"), "rejected": said("user: more", "assistant: b")},
            "differ before their last message, first in message 1. Only the answers may differ",
        ),
        ({"prompt": "other", **TALK}, "'chosen' is a conversation that does not contain the prompt"),
        (
            {"prompt": "u", "chosen": said("assistant: a", "user: u"), "rejected": "b"},
            "'chosen' ends with a user message",
        ),
        ({"chosen": TALK["chosen"] + "\n\nHuman: so?", "rejected": "b"}, "'chosen' ends with a user message"),
        ({"prompt": said("system: s"), **PAIR}, "there is no user message before the answer"),
        ({"prompt": said("user: u", "assistant: x"), **PAIR}, "there is an assistant message right before the answer"),
        (
            {
                "prompt": "u",
                "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
                "rejected": "b",
            },
            "the answer in 'chosen' calls tools",
        ),
        ({"prompt": "u", **PAIR, "label": 1.5}, "label=1.5 is not a probability"),
        ({"prompt": "u", **PAIR, "label": -1}, "label=-1.0 is not a probability"),
        ({"prompt": "u", **PAIR, "label": True}, "label=True is not a finite number"),
        ({"prompt": "u", **PAIR, "label": "chosen"}, "label='chosen' is not a finite number"),
        ({"prompt": "u", **PAIR, "label": float("nan")}, "label=nan is not a finite number"),
        ({"prompt": "u", **PAIR, "tie": 1}, "tie=1, expected true or false"),
        ({"prompt": "u", **PAIR, "tie": True, "label": 0.9}, "tie=true contradicts label=0.9. Remove one of them"),
        ({"prompt": "u", **PAIR, "margin": float("inf")}, "margin=inf is not a finite number"),
        ({"prompt": "u", **PAIR, "score_chosen": 3}, "the row has only one of score_chosen and score_rejected"),
    ],
)
def test_rows_that_are_no_preference_are_refused_by_file_and_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^data/rows.jsonl:7: .*{says}") as caught:
        row_to_preference(at(values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        (1.0, True),
        ("desirable", True),
        (" Undesirable", False),
    ],
)
def test_a_judgement_says_whether_one_answer_is_desirable(label: Any, desirable: bool) -> None:
    expected = Judgement("rows.jsonl:7", (USER,), "a", desirable)
    for values in (
        {"prompt": "u", "completion": "a"},
        {"question": "u", "answer": "a"},
        {"instruction": "u", "output": "a"},
        {"prompt": said("user: u"), "response": said("assistant: a")},
        {"completion": said("user: u", "assistant: a")},
        {"messages": said("user: u", "assistant: a")},
        {"messages": said("user: u"), "completion": "a"},
        {"completion": "\n\nHuman: u\n\nAssistant: a"},
    ):
        assert row_to_judgement(at({**values, "label": label})) == expected
    framed = row_to_judgement(at({"prompt": "u", "completion": "a", "label": label}), "s", "i")
    assert framed.prompt == (SYSTEM, Message("user", "u\n\ni"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": "u", "completion": "a"}, "no column holds a label .label.; the row has prompt, completion"),
        ({"prompt": "u", "label": True}, "no column holds an answer .completion, response, output, answer, messages."),
        ({"completion": "a", "label": True}, "no column holds a prompt"),
        ({"prompt": "u", "completion": " ", "label": True}, "column 'completion' is empty"),
        ({"messages": said("user: u"), "label": True}, "'messages' ends with a user message"),
        ({"prompt": "u", "completion": "a", "label": 0.5}, "label=0.5, expected true, 1 or 'desirable', or false"),
        ({"prompt": "u", "completion": "a", "label": "good"}, "label='good', expected true, 1 or 'desirable'"),
        ({"prompt": "u", "completion": "a", "label": [1]}, "expected true, 1 or"),
    ],
)
def test_rows_that_are_no_judgement_are_refused_by_file_and_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^data/rows.jsonl:7: .*{says}"):
        row_to_judgement(at(values))


@pytest.mark.parametrize(("label", "better"), [(1.0, "a"), (0.51, "a"), (0.49, "b"), (0.0, "b")])
def test_a_preference_gives_a_judgement_of_each_answer(label: float, better: str) -> None:
    first, second = judgements_of(Preference("p", (USER,), "a", "b", label))
    assert (first.id, first.answer, second.id, second.answer) == ("p/chosen", "a", "p/rejected", "b")
    assert first.prompt == second.prompt == (USER,)
    assert [j.answer for j in (first, second) if j.desirable] == [better]


def test_a_tie_judges_neither_answer() -> None:
    assert judgements_of(Preference("p", (USER,), "a", "b", 0.5)) == ()


STEPS = ["one", "two", "three"]


@pytest.mark.parametrize(
    ("values", "steps", "labels"),
    [
        ({"prompt": "u", "steps": STEPS, "labels": [1, 0.25, 0]}, STEPS, [1, 0.25, 0]),
        ({"question": "u", "steps": STEPS, "labels": [True, False, True]}, STEPS, [1, 0, 1]),
        ({"prompt": "u", "completions": STEPS, "labels": [True, True, False]}, STEPS, [1, 1, 0]),
        ({"prompt": said("user: u"), "completions": STEPS, "labels": [True, True, True]}, STEPS, [1, 1, 1]),
        ({"input": "u", "steps": STEPS, "mistake_index": None}, STEPS, [1, 1, 1]),
        ({"input": "u", "steps": STEPS, "mistake_index": 0}, ["one"], [0]),
        ({"input": "u", "steps": STEPS, "mistake_index": 1}, ["one", "two"], [1, 0]),
        ({"input": "u", "steps": STEPS, "mistake_index": 2}, STEPS, [1, 1, 0]),
        ({"problem": "u", "steps": STEPS, "label": -1}, STEPS, [1, 1, 1]),
        ({"problem": "u", "steps": STEPS, "label": 1}, ["one", "two"], [1, 0]),
        ({"problem": "u", "steps": STEPS, "labels": None, "label": 1}, ["one", "two"], [1, 0]),
    ],
)
def test_steps_are_labelled_up_to_and_including_the_first_mistake(
    values: dict[str, Any], steps: list[str], labels: list[float]
) -> None:
    assert row_to_solution(at(values)) == Solution("rows.jsonl:7", (USER,), tuple(steps), tuple(labels))


def test_steps_after_a_mistake_may_be_kept_as_wrong() -> None:
    made = row_to_solution(at({"input": "u", "steps": STEPS, "mistake_index": 1}), after_mistake="wrong")
    assert (made.steps, made.labels) == (tuple(STEPS), (1, 0, 0))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": "u", "labels": [1]}, "no column holds steps .steps, completions.; the row has prompt, labels"),
        ({"prompt": "u", "steps": STEPS}, "no column holds step labels .labels, mistake_index, label."),
        ({"steps": STEPS, "labels": [1, 1, 1]}, "no column holds a prompt"),
        ({"prompt": "u", "steps": "one two", "labels": [1]}, "column 'steps' is not a list of texts"),
        ({"prompt": "u", "steps": ["one", 2], "labels": [1, 1]}, "column 'steps' is not a list of texts"),
        ({"prompt": "u", "steps": [], "labels": []}, "no steps or an empty step"),
        ({"prompt": "u", "steps": ["one", " "], "labels": [1, 1]}, "no steps or an empty step"),
        ({"prompt": "u", "steps": STEPS, "labels": [1, 1]}, "has 3 steps but 2 labels"),
        ({"prompt": "u", "steps": STEPS, "labels": [1, 1, 2]}, "are not all in .0, 1."),
        ({"prompt": "u", "steps": STEPS, "labels": [1, -1, 0]}, "are not all in .0, 1."),
        ({"prompt": "u", "steps": STEPS, "labels": ["+", "-", "-"]}, "is not a list of booleans or numbers"),
        ({"prompt": "u", "steps": STEPS, "labels": 1}, "labels=1 is not a list of booleans or numbers"),
        (
            {"prompt": "u", "steps": STEPS, "mistake_index": 3},
            "mistake_index=3 is not the index of one of the 3 steps; .* or null",
        ),
        (
            {"prompt": "u", "steps": STEPS, "mistake_index": -1},
            "mistake_index=-1 is not the index of one of the 3 steps",
        ),
        (
            {"prompt": "u", "steps": STEPS, "mistake_index": True},
            "mistake_index=True is not the index of one of the 3 steps",
        ),
        (
            {"prompt": "u", "steps": STEPS, "label": 3},
            "label=3 is not the index of one of the 3 steps; expected 0 to 2, or -1 if",
        ),
    ],
)
def test_rows_that_are_no_solution_are_refused_by_file_and_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^data/rows.jsonl:7: .*{says}"):
        row_to_solution(at(values))


@pytest.mark.parametrize(
    ("columns", "right"),
    [
        ({"answer": "(A)", "target": "(A)"}, True),
        ({"answer": " (A)\n", "target": "(A)"}, True),
        ({"answer": 12, "target": "12"}, True),
        ({"answer": "(A)", "target": "(B)"}, False),
        ({"answer": None, "target": "(B)"}, False),
        ({"final_answer_correct": True, "answer": "1", "target": "2"}, True),
        ({"final_answer_correct": False}, False),
    ],
)
def test_the_outcome_is_whether_the_final_answer_is_right(columns: dict[str, Any], right: bool) -> None:
    row = at({"input": "u", "steps": STEPS, "mistake_index": 1, **columns})
    assert row_to_outcome(row) == Judgement("rows.jsonl:7", (USER,), "one\ntwo\nthree", right)
    assert row_to_outcome(row, separator="\n\n").answer == "one\n\ntwo\n\nthree"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"input": "u", "steps": STEPS, "answer": "1"}, "no column holds whether the final answer is right"),
        ({"input": "u", "steps": STEPS, "final_answer_correct": "yes"}, "final_answer_correct='yes', expected true"),
        ({"input": "u", "final_answer_correct": True}, "no column holds steps"),
        ({"input": "u", "steps": [], "final_answer_correct": True}, "has no prompt or an empty answer"),
        ({"steps": STEPS, "final_answer_correct": True}, "no column holds a prompt"),
    ],
)
def test_rows_without_an_outcome_are_refused_by_file_and_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^data/rows.jsonl:7: .*{says}"):
        row_to_outcome(at(values))


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")  # JSON rows hold no such thing
words = st.text(characters, min_size=1).filter(lambda text: text.strip() != "")
messages = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), st.text(characters))
prompts = st.lists(messages, min_size=1, max_size=3).map(tuple)
ids = st.text(string.ascii_letters)
labels = st.floats(0, 1)
preferences = st.builds(
    Preference, ids, prompts, words.map("a".__add__), words.map("b".__add__), labels, st.floats(-1e9, 1e9)
)
judgements = st.builds(Judgement, ids, prompts, words, st.booleans())
solutions = st.lists(st.tuples(words, labels), min_size=1, max_size=4).flatmap(
    lambda steps: st.builds(
        Solution, ids, prompts, st.just(tuple(s for s, _ in steps)), st.just(tuple(v for _, v in steps))
    )
)


@given(
    st.lists(preferences, min_size=1, max_size=4),
    st.lists(judgements, min_size=1, max_size=4),
    st.lists(solutions, min_size=1, max_size=4),
)
@example(  # text that looks like JSON's escape of a NUL, and is none
    [Preference("p", (Message("user", "q"),), r"say \u0000", "b")],
    [Judgement("j", (Message("user", r"\u0000"),), "a", True)],
    [Solution("s", (Message("user", "q"),), (r"\ud800", "b"), (1.0, 0.0))],
)
def test_what_is_written_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[Preference],
    judged: list[Judgement],
    stepwise: list[Solution],
) -> None:
    path = tmp_path_factory.getbasetemp() / "items.jsonl"
    write_preferences(path, pairs)
    assert read_preferences(path) == pairs
    write_judgements(path, judged)
    assert read_judgements(path) == judged
    write_solutions(path, stepwise)
    assert read_solutions(path) == stepwise


def test_tool_calls_in_a_prompt_survive_the_file(tmp_path: Path) -> None:
    call = Message("assistant", "", ({"name": "f", "arguments": {"x": [1, 2]}},))
    made = Preference("p", (USER, call, Message("tool", "3")), "a", "b")
    write_preferences(tmp_path / "a.jsonl", [made])
    assert read_preferences(tmp_path / "a.jsonl") == [made]


@pytest.mark.parametrize(
    ("prompt", "chosen", "says"),
    [
        (USER, "half \ud800", "surrogates not allowed"),
        (USER, "nul \0", "contains the NUL character"),
        (Message("assistant", "", ({"name": {1}},)), "a", "not JSON serializable"),
        (Message("assistant", "", ({"arguments": (1, 2)},)), "a", "it would not read back equal"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, prompt: Message, chosen: str, says: str
) -> None:
    with pytest.raises(DataError, match=f"preference 'p' cannot be written as JSON: .*{says}"):
        write_preferences(tmp_path / "a.jsonl", [Preference("p", (prompt,), chosen, "b")])
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "p", "chosen": "a", "rejected": "b"}',
        '{"id": "p", "prompt": [], "chosen": "a", "rejected": "b"}',
        '{"id": "p", "prompt": "u", "chosen": "a", "rejected": "b"}',
        '{"id": "p", "prompt": [{"role": "user", "content": "u", "tool_calls": []}], "chosen": 1, "rejected": "b"}',
        '{"id": "p", "prompt": [{"role": "user", "content": "u", "tool_calls": []}], "other": "b"}',
    ],
)
def test_a_line_nobody_wrote_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=r"a.jsonl:1: not a preference written by write_preferences: "):
        read_preferences(path)


@pytest.mark.parametrize(
    ("name", "usable", "empty", "unequal"),
    [("harmless-base-test.jsonl.gz", 2303, 4, 5), ("harmless-base-test-500.jsonl", 499, 1, 0)],
)
def test_hh_rlhf_is_read_whole_and_its_bad_rows_are_named(name: str, usable: int, empty: int, unequal: int) -> None:
    rows = read_rows(str(shared("data", "hh-rlhf", name)))
    made, faults = parse_rows(rows, row_to_preference, "drop")
    assert (len(made), len(faults)) == (usable, empty + unequal) and len(rows) == usable + empty + unequal
    assert sum("the answer in 'chosen' is empty" in fault for fault in faults) == empty
    assert sum("differ before their last message" in fault for fault in faults) == unequal
    assert made[0].prompt[0] == Message("user", "what are some pranks with a pen i can do?")
    assert made[0].chosen.startswith("No, sorry!") and made[0].rejected.startswith("There are lots")
    lines = {row.where.rpartition(":")[2]: row.values for row in rows}
    for pair in made:
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            turns = [f"{'Human' if m.role == 'user' else 'Assistant'}: {m.content}" for m in pair.prompt]
            whole = "".join(f"\n\n{turn}" for turn in (*turns, f"Assistant: {answer}"))
            assert whole.split() == lines[pair.id.rpartition(":")[2]][side].split()
    with pytest.raises(DataError) as caught:
        parse_rows(rows, row_to_preference)
    assert f"{name}:87: the answer in 'chosen' is empty" in str(caught.value)
    assert str(caught.value).endswith(
        f"\n{len(faults)} of {len(rows)} rows cannot be used; no row was used. Fix or remove them, or set "
        'data.bad_rows = "drop".'
    )


# file, rows, rows without a mistake, rows whose final answer is right, steps labelled, steps in all
MISTAKES = [
    ("dyck_languages", 986, 336, 482, 12659, 24178),
    ("logical_deduction", 300, 6, 45, 961, 2497),
    ("multistep_arithmetic", 300, 62, 45, 1093, 1506),
    ("tracking_shuffled_objects", 300, 40, 45, 1151, 1617),
    ("word_sorting", 300, 34, 45, 1583, 3508),
]


@pytest.mark.parametrize(("name", "count", "faultless", "right", "labelled", "steps"), MISTAKES)
def test_every_row_of_big_bench_mistake_becomes_a_solution_and_an_outcome(
    name: str, count: int, faultless: int, right: int, labelled: int, steps: int
) -> None:
    rows = read_rows(str(shared("data", "big-bench-mistake", f"{name}.jsonl")))
    made = [row_to_solution(row) for row in rows]
    assert len(made) == count
    assert sum(all(s.labels) for s in made) == faultless
    assert sum(len(s.steps) for s in made) == labelled
    assert not any(0.0 in s.labels[:-1] for s in made)  # a mistake is always the last step that is kept
    assert sum(len(row.values["steps"]) for row in rows) == steps
    assert sum(row_to_outcome(row).desirable for row in rows) == right


def test_the_one_empty_step_of_big_bench_mistake_stands_after_its_mistake() -> None:
    rows = read_rows(str(shared("data", "big-bench-mistake", "dyck_languages.jsonl")))
    made, faults = parse_rows(rows, lambda row: row_to_solution(row, after_mistake="wrong"), "drop")
    assert len(made) == 985 and sum(len(s.steps) for s in made) == 24121
    assert len(faults) == 1 and "dyck_languages.jsonl:539: " in faults[0] and "an empty step" in faults[0]
