"""Rows, tasks and conversations from files: what is read, and what every malformed input says."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.sources import (
    Row,
    data_hash,
    drop_leaks,
    duplicates,
    parse_rows,
    read_rows,
    row_to_conversation,
    row_to_task,
    split_by_key,
    split_holdout,
)
from posttrain.types import DataError, Judgement, Message, Preference, Solution, Task
from tests.conftest import shared

GOOD = b'{"question": "q", "answer": "1"}\n'


def at(values: dict[str, Any]) -> Row:
    return Row("rows.jsonl:7", values)


# name of the file, its bytes, the line the error names, what it says
MALFORMED: list[tuple[str, bytes, str, str]] = [
    ("a.jsonl", b"", "", "is empty (0 bytes)"),
    ("a.jsonl", b"\n \r\n\n", "", "has no rows"),
    ("a.jsonl", b"\xef\xbb\xbf", "", "has no rows"),
    ("a.jsonl", GOOD + b"{", ":2", "not valid JSON"),
    ("a.jsonl", GOOD + b'{"question": "q"', ":2", "not valid JSON"),
    ("a.jsonl", GOOD + b'{"question": q}', ":2", "not valid JSON: Expecting value at column 14"),
    ("a.jsonl", GOOD + b"{'question': 'q'}", ":2", "double quotes"),
    ("a.jsonl", GOOD + b'{"a": 1,}', ":2", "not valid JSON"),
    ("a.jsonl", GOOD + b'{"a": 1} {"a": 2}', ":2", "Extra data"),
    ("a.jsonl", b"\n\n" + GOOD + b"\n// comment", ":5", "not valid JSON"),
    ("a.jsonl", GOOD + b"question,answer", ":2", "not valid JSON"),
    ("a.jsonl", b"<html>404</html>", ":1", "not valid JSON"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", ":1", "not valid JSON"),
    ("a.jsonl", GOOD + b"[1, 2]", ":2", "an array, expected an object"),
    ("a.jsonl", GOOD + b'"text"', ":2", "a string, expected an object"),
    ("a.jsonl", GOOD + b"72", ":2", "a number, expected an object"),
    ("a.jsonl", GOOD + b"null", ":2", "null, expected an object"),
    ("a.jsonl", GOOD + b"true", ":2", "a boolean, expected an object"),
    ("a.jsonl", GOOD + b"{}", ":2", "an object without columns"),
    ("a.jsonl", GOOD + b'{"a": NaN}', ":2", "NaN is not a JSON number"),
    ("a.jsonl", GOOD + b'{"a": -Infinity}', ":2", "-Infinity is not a JSON number"),
    ("a.jsonl", GOOD + b'{"a": 1e999}', ":2", "1e999 is too large"),
    ("a.jsonl", GOOD + b'{"a": ' + b"9" * 5000 + b"}", ":2", "not valid JSON"),
    ("a.jsonl", GOOD + b'{"a": 1, "b": 2, "a": 3}', ":2", "'a' appears twice"),
    ("a.jsonl", GOOD + b'{"a": ' + b"[" * 100_000 + b"}", ":2", "not valid JSON"),
    ("a.jsonl", GOOD + b'{"a": "x\ty"}', ":2", "Invalid control character"),
    ("a.jsonl", GOOD + b'{"a": "\\q"}', ":2", "Invalid \\escape"),
    ("a.jsonl", GOOD + b'{"a": "\\ud800"}', ":2", "unpaired surrogate"),
    ("a.jsonl", GOOD + b'{"a": "x\\u0000y"}', ":2", "NUL character"),
    ("a.jsonl", GOOD + b'{"a": "x\x00y"}', ":2", "NUL byte at offset 41 of the file"),
    ("a.jsonl", GOOD + b"\x00" * 64, ":2", "NUL byte at offset 33 of the file"),
    ("a.jsonl", GOOD + b'{"a": "caf\xe9"}', ":2", "byte 0xe9 at offset 43 of the file"),
    ("a.jsonl", GOOD + b'{"a": "\xc3"}', ":2", "byte 0xc3 at offset 40 of the file"),
    ("a.jsonl", GOOD + b'{"a": "\xed\xa0\x80"}', ":2", "not UTF-8"),
    ("a.jsonl", b"\xef\xbb\xbf" + b'{"a": "\xff"}', ":1", "byte 0xff at offset 10 of the file"),
    ("a.jsonl", '{"a": "x"}'.encode("utf-16"), ":1", "the file is UTF-16"),
    ("a.jsonl", '{"a": "x"}'.encode("utf-32"), ":1", "the file is UTF-32"),
    ("a.jsonl", gzip.compress(GOOD, mtime=0), ":1", "the file is gzip data"),
    ("a.jsonl.gz", GOOD, ":1", "gzip data is damaged"),
    ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-12], "", "gzip data is damaged"),
    ("a.jsonl.gz", gzip.compress(GOOD, mtime=0) + b"rubbish", ":2", "gzip data is damaged"),
    ("a.jsonl.gz", gzip.compress(GOOD + b"{", mtime=0), ":2", "not valid JSON"),
    ("a.json", b"[]", "", "has no rows"),
    ("a.json", b'[{"a": 1}', ":1", "expected ',' or ']' after this row, found 'the end of the file'"),
    ("a.json", b'[\n{"a": 1},\n]', ":3", "not valid JSON"),
    ("a.json", b'[\n{"a": 1}\n{"a": 2}]', ":2", "expected ',' or ']' after this row, found '{'"),
    ("a.json", b'[{"a": 1},\n 5]', ":2", "a number, expected an object"),
    ("a.json", b'[{"a": 1},\n\n {"a": nope}]', ":3", "not valid JSON"),
    ("a.json", b'[{"a": 1}] [2]', ":1", "text after the end of the array"),
    ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', ":2", "byte 0xff"),
    ("a.json", b'{\n "a": 1\n}', ":1", "an object over several lines, expected one row a line"),
    ("a.parquet", b"", "", "is empty (0 bytes)"),
    ("a.parquet", b"PAR1 not really", "", "not valid Parquet"),
    ("a.txt", b"question,answer\nq,1\n", "", "is not one of .jsonl"),
    ("a", b"q", "", "is not one of .jsonl"),
]


@pytest.mark.parametrize(
    ("name", "content", "line", "says"), MALFORMED, ids=[f"{i}: {m[3]}" for i, m in enumerate(MALFORMED)]
)
def test_malformed_files_are_refused_naming_line_and_reason(
    tmp_path: Path, name: str, content: bytes, line: str, says: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    assert str(caught.value).startswith(f"{path}{line}")
    assert says in str(caught.value)


def test_all_bad_lines_are_counted_and_the_first_twenty_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((GOOD + b"oops\n") * 50)
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[0].startswith(f"{path}:2: ") and lines[19].startswith(f"{path}:40: ")
    assert lines[20] == "50 bad lines of 100 (30 more not shown); no row was used. Fix or remove them."


@pytest.mark.parametrize("source", ["missing.jsonl", "no/such/file.parquet"])
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(DataError, match=f"{source} does not exist"):
        read_rows(source)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "x.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_rows(str(folder))


ROWS = [{"question": "é\n", "answer": "1"}, {"question": "b", "answer": 2}, {"question": "c", "answer": None}]


def jsonl(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", jsonl(ROWS), [1, 2, 3]),
        ("a.jsonl", jsonl(ROWS).rstrip(), [1, 2, 3]),
        ("a.jsonl", jsonl(ROWS, "\r\n"), [1, 2, 3]),
        ("a.jsonl", jsonl(ROWS, "\n\n"), [1, 3, 5]),
        ("a.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS), [1, 2, 3]),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0), [1, 2, 3]),
        ("a.json", jsonl(ROWS), [1, 2, 3]),
        ("a.json", json.dumps(ROWS).encode(), [1, 1, 1]),
        ("a.json", json.dumps(ROWS, indent=1).encode(), [2, 6, 10]),
        ("a.json", b"\xef\xbb\xbf\r\n" + json.dumps(ROWS, indent=1).replace("\n", "\r\n\r\n").encode(), [4, 12, 20]),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0), [1, 1, 1]),
    ],
)
def test_rows_are_the_same_in_every_format_and_know_their_line(
    tmp_path: Path, name: str, content: bytes, lines: list[int]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    rows = read_rows(str(path))
    assert [dict(r.values) for r in rows] == ROWS
    assert [r.where for r in rows] == [f"{path}:{n}" for n in lines]
    assert [r.where for r in read_rows(str(path), limit=2)] == [f"{path}:{n}" for n in lines[:2]]


def test_parquet_rows_equal_jsonl_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"question": "a", "answer": 1}, {"question": "b", "answer": None}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [dict(r.values) for r in read_rows(str(path))] == rows
    assert [r.where for r in read_rows(str(path), 1)] == [f"{path}:1"]


def test_the_limit_stops_before_later_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3 + b"oops")
    assert len(read_rows(str(path), limit=3)) == 3


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_hub_id_reads_the_named_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    fake_hub(monkeypatch, lambda *names, split: asked.append((names, split)) or [{"a": 1}, {"a": 2}])
    assert [r.where for r in read_rows("openai/gsm8k/main:test")] == [f"openai/gsm8k/main:test:{n}" for n in (1, 2)]
    assert len(read_rows("openai/gsm8k", limit=1)) == 1
    assert asked == [(("openai/gsm8k", "main"), "test"), (("openai/gsm8k",), "train")]


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: str, split: str) -> Any:
        raise ConnectionError("Couldn't reach the hub\nlong details")

    fake_hub(monkeypatch, load)
    with pytest.raises(DataError, match="^dataset 'openai/gsm8k' could not be loaded: Couldn't reach the hub. Check"):
        read_rows("openai/gsm8k")


def test_a_missing_datasets_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'posttrain\[hub\]'"):
        read_rows("openai/gsm8k")


def test_a_source_that_is_neither_file_nor_hub_id_is_refused() -> None:
    with pytest.raises(DataError, match="neither a data file"):
        read_rows("addition please")


@pytest.mark.parametrize(
    ("values", "prompt", "answer", "meta"),
    [
        ({"question": "q", "answer": "1"}, "q", "1", {}),
        ({"prompt": "p", "question": "q", "answer": "1"}, "p", "1", {"question": "q"}),
        ({"problem": "p", "solution": "s"}, "p", "s", {}),
        ({"problem": "p", "solution": "s", "answer": "1"}, "p", "1", {"solution": "s"}),
        ({"instruction": "i", "input": "x", "target": 2}, "i\n\nx", 2, {}),
        ({"instruction": "i", "input": "", "label": 0}, "i", 0, {}),
        ({"input": "x", "target": 43.0, "idx": 0}, "x", 43.0, {"idx": 0}),
        ({"question": "q", "answer": "so\n#### 1,072", "level": 3}, "q", "1072", {"level": 3, "worked": "so"}),
        ({"question": "q", "solution": r"so \boxed{3}"}, "q", "3", {"worked": r"so \boxed{3}"}),
        ({"messages": [{"role": "user", "content": "u"}], "answer": ["a"]}, "u", ["a"], {}),
        ({"prompt": [{"role": "user", "content": "u"}], "answer": "a"}, "u", "a", {}),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            "u",
            "a",
            {},
        ),
    ],
)
def test_columns_become_a_task(values: dict[str, Any], prompt: str, answer: Any, meta: dict[str, Any]) -> None:
    task = row_to_task(at(values), "rows.jsonl")
    assert (task.id, task.env, task.prompt, task.answer, task.meta) == (
        "rows.jsonl:7",
        "rows.jsonl",
        prompt,
        answer,
        meta,
    )


@pytest.mark.parametrize("tests", [{"cases": [{"args": [], "expected": 1}]}, {"tests": "assert f() == 1"}])
@pytest.mark.parametrize(
    "answer", ["    return 1\n", "#### set up\nx = 1\n#### done\n", 'print(r"\\boxed{x}")', "a #### b"]
)
def test_a_program_stays_as_it_is_written(tests: dict[str, Any], answer: str) -> None:
    task = row_to_task(at({"prompt": "p", "solution": answer, **tests}), "e")
    assert (task.answer, task.meta) == (answer, tests)


def test_columns_of_tests_that_are_empty_do_not_make_an_answer_a_program() -> None:
    assert row_to_task(at({"question": "q", "answer": "so #### 1", "cases": None}), "e").answer == "1"


def test_system_and_instruction_frame_the_question() -> None:
    task = row_to_task(at({"question": "q", "answer": "1"}), "e", "Be brief.", "End with a number.")
    assert task.messages == (Message("system", "Be brief."), Message("user", "q\n\nEnd with a number."))


def test_an_answer_may_be_absent_where_the_reward_needs_none() -> None:
    assert row_to_task(at({"prompt": "p", "kwargs": {}}), "e", needs_answer=False).answer is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"ask": "q", "answer": "1"}, "no column holds a question .* the row has ask, answer"),
        ({"question": None, "answer": "1"}, r"the row has question \(null\), answer"),
        ({"question": "q"}, "no column holds an answer .* the row has question"),
        ({"question": "q", "answer": None}, r"no column holds an answer .* answer \(null\)"),
        ({"question": " ", "answer": "1"}, "column 'question' is empty"),
        ({"question": {"a": 1}, "answer": "1"}, "column 'question' holds dict, expected text"),
        ({"question": "q", "answer": " "}, "column 'answer' gives the answer ''"),
        ({"question": "q", "answer": "so\n####"}, "gives the answer ''"),
        ({"question": "q", "answer": float("nan")}, "gives the answer nan"),
        ({"messages": "hello", "answer": "1"}, "is not a list of messages"),
        ({"messages": [], "answer": "1"}, "is not a list of messages"),
        ({"messages": ["hello"], "answer": "1"}, "message 1 of 'messages' has no role and content"),
        ({"messages": [{"from": "human", "value": "x"}], "answer": "1"}, "has no role and content"),
        ({"messages": [{"role": "human", "content": "x"}], "answer": "1"}, "role 'human' is not one of"),
        (
            {"messages": [{"role": "user", "content": None}], "answer": "1"},
            "of the user message is null, expected",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}, "is list, expected text"),
        ({"messages": [{"role": "system", "content": "x"}], "answer": "1"}, "has no user message"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "1"}, "has no user message"),
    ],
)
def test_rows_that_are_no_task_are_refused_by_file_and_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^rows.jsonl:7: .*{says}"):
        row_to_task(at(values), "e")


def test_two_system_messages_are_refused() -> None:
    row = at({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "1"})
    with pytest.raises(DataError, match="^rows.jsonl:7: the row has its own system message"):
        row_to_task(row, "e", system="other")


USER, REPLY = Message("user", "u"), Message("assistant", "a")


@pytest.mark.parametrize(
    ("values", "conversation"),
    [
        ({"text": "t", "prompt": "p", "completion": "c"}, "t"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, (USER, REPLY)),
        ({"prompt": "u", "completion": "a"}, (USER, REPLY)),
        ({"question": "u", "answer": "a"}, (USER, REPLY)),
        ({"problem": "u", "solution": "a"}, (USER, REPLY)),
        ({"instruction": "u", "output": "a"}, (USER, REPLY)),
        ({"instruction": "u", "input": "x", "output": "a"}, (Message("user", "u\n\nx"), REPLY)),
        (
            {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]},
            (USER, REPLY),
        ),
    ],
)
def test_columns_become_a_conversation(values: dict[str, Any], conversation: str | tuple[Message, ...]) -> None:
    assert row_to_conversation(at(values)) == conversation


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"text": ""}, "column 'text' is empty"),
        ({"prompt": "p"}, "no column holds text to train on"),
        ({"prompt": "p", "completion": " "}, "column 'completion' is empty"),
        ({"messages": [{"role": "user", "content": "u"}]}, "no assistant message with text or a tool call"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "no assistant message with text or a tool call"),
    ],
)
def test_rows_that_teach_nothing_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^rows.jsonl:7: .*{says}"):
        row_to_conversation(at(values))


def test_a_text_row_has_no_place_for_a_system_message() -> None:
    with pytest.raises(DataError, match="cannot use data.system"):
        row_to_conversation(at({"text": "t"}), system="s")


def ask(text: str, line: int = 1) -> Task:
    return Task(f"t:{line}", "t", (Message("user", text),), "1")


questions = st.lists(st.sampled_from([f"q{i}" for i in range(12)]), min_size=2, max_size=40)


@given(questions, st.floats(0.05, 0.95), st.integers(0, 5))
def test_no_question_is_on_both_sides_of_the_split_whatever_the_order(
    words: list[str], share: float, seed: int
) -> None:
    tasks = [ask(w, i) for i, w in enumerate(words)]
    distinct = len(set(words))
    if distinct < 2:
        with pytest.raises(DataError, match=rf"all {len(words)} rows have the same prompt"):
            split_holdout(tasks, share, seed)
        return
    train, held = split_holdout(tasks, share, seed)
    assert train and held and len(train) + len(held) == len(tasks)
    assert not {t.prompt for t in train} & {t.prompt for t in held}
    assert abs(len({t.prompt for t in held}) - share * distinct) <= 1
    backwards = split_holdout(tasks[::-1], share, seed)
    assert {t.prompt for t in backwards[1]} == {t.prompt for t in held}
    assert duplicates(tasks) == len(words) - distinct


def test_a_share_of_zero_holds_nothing_out() -> None:
    assert split_holdout([ask("a")], 0.0, 0) == ([ask("a")], [])


def test_training_loses_the_rows_the_evaluation_asks() -> None:
    kept, dropped = drop_leaks([ask("a"), ask("b"), ask("b", 2), ask("c")], [ask("b", 9)])
    assert [t.prompt for t in kept] == ["a", "c"] and dropped == 2
    with pytest.raises(DataError, match="all 1 training prompts are also in the evaluation"):
        drop_leaks([ask("a")], [ask("a", 2)])


def prefer(word: str, line: int) -> Preference:
    return Preference(f"p:{line}", (Message("user", word),), f"a{line}", f"b{line}")


@given(questions, st.floats(0.05, 0.95), st.integers(0, 5))
def test_all_that_is_asked_by_one_prompt_falls_on_the_side_where_its_task_falls(
    words: list[str], share: float, seed: int
) -> None:
    distinct = {*words, "q0", "q1"}
    pairs = [prefer(w, i) for i, w in enumerate((*words, "q0", "q1"))]
    judged = [Judgement(p.id, p.prompt, p.chosen, True) for p in pairs]
    stepwise = [Solution(p.id, p.prompt, (p.chosen,), (1.0,)) for p in pairs]
    tasks = [ask(word) for word in distinct]
    held = {t.prompt for t in split_holdout(tasks, share, seed)[1]}
    train, test = split_holdout(pairs, share, seed)
    assert train and test and len(train) + len(test) == len(pairs)
    assert {p.prompt[0].content for p in test} == held
    assert {p.prompt[0].content for p in train} == distinct - held
    assert [j.id for j in split_holdout(judged, share, seed)[1]] == [p.id for p in test]
    assert [s.id for s in split_holdout(stepwise, share, seed)[1]] == [p.id for p in test]
    assert duplicates(pairs) == len(pairs) - len(distinct)
    assert drop_leaks(train, test) == (train, 0)
    assert drop_leaks(pairs, test) == (train, len(test))


@given(questions, st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_by_key_keeps_equal_keys_together_and_the_order(words: list[str], share: float, seed: int) -> None:
    items = list(enumerate((*words, "q0", "q1")))
    train, held = split_by_key(items, [word for _, word in items], share, seed)
    assert sorted(train + held) == items and train == sorted(train) and held == sorted(held)
    assert not {word for _, word in train} & {word for _, word in held}


def number(row: Row) -> int:
    if not isinstance(row.values["n"], int):
        raise DataError(f"{row.where}: n={row.values['n']!r} is not a number.")
    return row.values["n"]


def test_rows_that_cannot_be_parsed_are_shown_counted_or_dropped_by_choice() -> None:
    rows = [Row(f"a.jsonl:{i}", {"n": "x" if i % 2 else i}) for i in range(60)]
    parsed, faults = parse_rows(rows, number, "drop")
    assert parsed == list(range(0, 60, 2))
    assert len(faults) == 30 and faults[0] == "a.jsonl:1: n='x' is not a number."
    assert parse_rows(rows[::2], number) == (parsed, [])
    with pytest.raises(DataError) as caught:
        parse_rows(rows, number)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[:20] == faults[:20]
    said = "30 of 60 rows cannot be used (10 more not shown); no row was used. Fix or remove them"
    assert lines[20] == f'{said}, or set data.bad_rows = "drop".'


def test_dropping_every_row_is_refused() -> None:
    says = "a.jsonl:1: n='x' is not a number.\n1 of 1 rows cannot be used; no row was used"
    with pytest.raises(DataError, match=says):
        parse_rows([Row("a.jsonl:1", {"n": "x"})], number, "drop")


def test_the_hash_is_of_the_values_alone() -> None:
    rows = [Row("x:1", {"a": 1, "b": 2}), Row("x:2", {"a": 3})]
    assert data_hash(rows) == data_hash([Row("y:9", {"b": 2, "a": 1}), Row("y:8", {"a": 3})])
    assert len({data_hash(rows), data_hash(rows[::-1]), data_hash(rows[:1])}) == 3


def test_real_data_sets_become_tasks() -> None:
    gsm8k = row_to_task(read_rows(str(shared("data", "gsm8k", "train.jsonl")), 1)[0], "gsm8k")
    assert gsm8k.answer == "72" and "48/2" in gsm8k.meta["worked"]
    mawps = [row_to_task(r, "mawps") for r in read_rows(str(shared("data", "mawps", "test.jsonl")))]
    assert mawps[0].answer == 43.0
    hh = read_rows(str(shared("data", "hh-rlhf", "harmless-base-test.jsonl.gz")), 5)
    assert set(hh[0].values) == {"chosen", "rejected"}
    assert len(read_rows(str(shared("data", "svamp", "SVAMP.json")))) == 1000
    assert len(read_rows(str(shared("data", "bfcl", "BFCL_v4_multiple.json")), 3)) == 3


# --- nulls and types of Parquet --------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "q"}
NULLS: dict[str, tuple[str, Any, str]] = {
    "content": (
        "messages",
        [ASKED, {"role": "assistant", "content": None}],
        "content of the assistant message is null",
    ),
    "role": ("messages", [ASKED, {"role": None, "content": "a"}], "role None is not one of"),
    "message": ("messages", [ASKED, None], "message 2 of 'messages' has no role and content"),
    "messages": ("messages", None, r"no column holds text to train on .* the row has messages \(null\)"),
    "text": ("text", None, r"the row has text \(null\)"),
}


@pytest.mark.parametrize("name", NULLS)
def test_a_null_in_parquet_is_refused_by_row_and_never_read_as_text(name: str, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column, value, says = NULLS[name]
    good = "a text" if column == "text" else [ASKED, {"role": "assistant", "content": "a"}]
    file = str(tmp_path / "rows.parquet")
    parquet.write_table(arrow.table({column: [good, value, good]}), file)
    rows = list(read_rows(file))
    assert row_to_conversation(rows[0]) == row_to_conversation(rows[2])
    with pytest.raises(DataError, match=f"rows.parquet:2: .*{says}"):
        row_to_conversation(rows[1])


def test_texts_are_read_alike_however_parquet_stores_them_and_bytes_are_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    plain = arrow.array(["one", None, "two"])
    kinds = {"plain": plain, "large": plain.cast(arrow.large_string()), "dictionary": plain.dictionary_encode()}
    for kind, texts in kinds.items():
        file = str(tmp_path / f"{kind}.parquet")
        parquet.write_table(arrow.table({"prompt": texts, "answer": arrow.array([1, 2, 3])}), file)
        one, null, two = read_rows(file)
        assert [row_to_task(row, "e").prompt for row in (one, two)] == ["one", "two"]
        with pytest.raises(DataError, match=r"no column holds a question .* the row has prompt \(null\), answer"):
            row_to_task(null, "e")
    parquet.write_table(arrow.table({"prompt": [b"one"], "answer": ["1"]}), tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match="column 'prompt' holds bytes, expected text"):
        row_to_task(next(iter(read_rows(str(tmp_path / "bytes.parquet")))), "e")
