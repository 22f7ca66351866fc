"""Layouts of other tools' files: each is read right, or refused with the true reason; none is misread silently."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import DataConfig
from posttrain.data.convert import FORMATS, convert_file
from posttrain.data.files import read_rows
from posttrain.data.formats import DIRECT, standard
from posttrain.data.parquet import without_added_nulls
from posttrain.data.preferences import row_to_judgement, row_to_preference
from posttrain.data.reading import read_source
from posttrain.data.sources import parse_rows, row_to_conversation, row_to_task
from posttrain.types import ConfigError, DataError

U, A, S = "user", "assistant", "system"


def said(messages: Any) -> Any:
    """Messages as (role, content), with the calls of a turn that has any."""
    if isinstance(messages, str):
        return messages
    return [(m.role, m.content, *([[*map(dict, m.tool_calls)]] if m.tool_calls else [])) for m in messages]


def sft(row: Any) -> Any:
    return said(row_to_conversation(row))


def task(row: Any) -> Any:
    found = row_to_task(row, "f", needs_answer=False)
    return said(found.messages), found.answer


def gold(row: Any) -> Any:
    found = row_to_task(row, "f")
    return said(found.messages), found.answer


def pair(row: Any) -> Any:
    found = row_to_preference(row)
    return said(found.prompt), found.chosen, found.rejected


def kto(row: Any) -> Any:
    found = row_to_judgement(row)
    return said(found.prompt), found.answer, found.desirable


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


Q, R = "Sky?", "Blue."
ASKED, TOLD = [(U, Q)], [(U, Q), (A, R)]
CHAT = [{"role": U, "content": Q}, {"role": A, "content": R}]
SHARE = [{"from": "human", "value": Q}, {"from": "gpt", "value": R}]
CALL = {"name": "look", "arguments": {"at": "sky"}}
MMLU = {"question": "Which?", "choices": ["red", "blue"], "answer": 1}
SQUAD = {"context": "It is blue.", "question": Q, "answers": {"text": ["blue"], "answer_start": [6]}}

# name: (file, content, how it is read, what comes out or what the refusal says)
TABLE: dict[str, tuple[str, str | bytes, Any, Any]] = {
    # --- supervised rows
    "OpenAI fine-tuning": ("a.jsonl", lines({"messages": CHAT}), sft, TOLD),
    "text parts": (
        "a.jsonl",
        lines({"messages": [{"role": U, "content": [{"type": "text", "text": Q}]}, CHAT[1]]}),
        sft,
        TOLD,
    ),
    "an image part": (
        "a.jsonl",
        lines({"messages": [{"role": U, "content": [{"type": "image_url", "image_url": {}}]}, CHAT[1]]}),
        sft,
        "part of type 'image_url'; only text",
    ),
    "messages as JSON text": ("a.jsonl", lines({"messages": json.dumps(CHAT)}), sft, TOLD),
    "messages as a Python list": ("a.jsonl", lines({"messages": str(CHAT)}), sft, "holds a Python list as text"),
    "ShareGPT": ("a.jsonl", lines({"conversations": SHARE}), sft, TOLD),
    "ShareGPT in an array": ("a.json", json.dumps([{"id": 1, "conversations": SHARE}]), sft, TOLD),
    "ShareGPT with roles": ("a.jsonl", lines({"conversations": CHAT}), sft, TOLD),
    "ShareGPT, column conversation": ("a.jsonl", lines({"conversation": SHARE}), sft, TOLD),
    "ShareGPT, system turn": (
        "a.jsonl",
        lines({"conversations": [{"from": "system", "value": "Be kind."}, *SHARE]}),
        sft,
        [(S, "Be kind."), *TOLD],
    ),
    "ShareGPT, a tool's turns": (
        "a.jsonl",
        lines(
            {
                "conversations": [
                    SHARE[0],
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "b"},
                    SHARE[1],
                ]
            }
        ),
        sft,
        [(U, Q), (A, "", [{"type": "function", "function": CALL}]), ("tool", "b"), (A, R)],
    ),
    "ShareGPT, a damaged call": (
        "a.jsonl",
        lines({"conversations": [SHARE[0], {"from": "function_call", "value": "look(sky)"}]}),
        sft,
        "function_call in 'conversations' is not JSON",
    ),
    "ShareGPT, unknown speaker": (
        "a.jsonl",
        lines({"conversations": [{"from": "narrator", "value": "x"}]}),
        sft,
        "is from 'narrator'",
    ),
    "ShareGPT, null value": (
        "a.jsonl",
        lines({"conversations": [SHARE[0], {"from": "gpt", "value": None}]}),
        sft,
        "the value None, expected text",
    ),
    "Alpaca": ("a.jsonl", lines({"instruction": Q, "input": "", "output": R}), sft, TOLD),
    "Alpaca with an input": (
        "a.jsonl",
        lines({"instruction": "Add.", "input": "1, 2", "output": "3"}),
        sft,
        [(U, "Add.\n\n1, 2"), (A, "3")],
    ),
    "instruction and response": ("a.jsonl", lines({"instruction": Q, "response": R}), sft, TOLD),
    "prompt and response": ("a.jsonl", lines({"prompt": Q, "response": R}), sft, TOLD),
    "TRL prompt-completion messages": ("a.jsonl", lines({"prompt": CHAT[:1], "completion": CHAT[1:]}), sft, TOLD),
    "plain text": ("a.jsonl", lines({"text": "A line."}), sft, "A line."),
    "Dolly": ("a.jsonl", lines({"instruction": Q, "context": "It is blue.", "response": R}), sft, "--format context"),
    "input and output": ("a.jsonl", lines({"input": Q, "output": R}), sft, "--format input-output"),
    "Capybara": ("a.jsonl", lines({"conversation": [{"input": Q, "output": R}]}), sft, "--format input-output-turns"),
    "unknown columns": ("a.jsonl", lines({"q": Q, "a": R}), sft, "--rename OLD=NEW"),
    "a tree of replies": (
        "a.jsonl",
        lines({"prompt": {"text": Q, "replies": [{"text": R}]}}),
        sft,
        "no column holds text",
    ),
    # --- tasks
    "GSM8K": ("a.jsonl", lines({"question": Q, "answer": "6 * 7 = 42\n#### 42"}), gold, (ASKED, "42")),
    "verl": (
        "a.jsonl",
        lines(
            {
                "data_source": "sky",
                "prompt": CHAT[:1],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "42"},
                "extra_info": {"index": 0},
            }
        ),
        gold,
        (ASKED, "42"),
    ),
    "verl, two answers": (
        "a.jsonl",
        lines({"prompt": CHAT[:1], "answer": "1", "reward_model": {"ground_truth": "2"}}),
        gold,
        "both an answer and another reward_model.ground_truth",
    ),
    "OpenAI reinforcement": ("a.jsonl", lines({"messages": CHAT[:1], "reference_answer": "b"}), gold, (ASKED, "b")),
    "OpenAI batch request": (
        "a.jsonl",
        lines({"custom_id": "1", "method": "POST", "url": "/v1", "body": {"model": "m", "messages": CHAT[:1]}}),
        task,
        (ASKED, None),
    ),
    "OpenAI batch result": (
        "a.jsonl",
        lines({"custom_id": "1", "response": {"body": {}}}),
        task,
        "reply without its question",
    ),
    "SQuAD": ("a.jsonl", lines(SQUAD), gold, "--format context"),
    # --- preferences and judgements
    "TRL preference": ("a.jsonl", lines({"prompt": Q, "chosen": R, "rejected": "Red."}), pair, (ASKED, R, "Red.")),
    "TRL conversational preference": (
        "a.jsonl",
        lines({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": A, "content": "Red."}]}),
        pair,
        (ASKED, R, "Red."),
    ),
    "OpenAI preference": (
        "a.jsonl",
        lines(
            {
                "input": {"messages": CHAT[:1], "tools": [], "parallel_tool_calls": True},
                "preferred_output": CHAT[1:],
                "non_preferred_output": [{"role": A, "content": "Red."}],
            }
        ),
        pair,
        (ASKED, R, "Red."),
    ),
    "ShareGPT preference": (
        "a.jsonl",
        lines({"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": {"from": "gpt", "value": "Red."}}),
        pair,
        (ASKED, R, "Red."),
    ),
    "PKU-SafeRLHF": (
        "a.jsonl",
        lines({"prompt": Q, "response_0": R, "response_1": "Red.", "better_response_id": 0}),
        pair,
        "--format better-response",
    ),
    "UltraFeedback": (
        "a.jsonl",
        lines(
            {
                "instruction": Q,
                "completions": [{"response": R, "overall_score": 9}, {"response": "Red.", "overall_score": 2}],
            }
        ),
        pair,
        "--format scored-completions",
    ),
    "ShareGPT judgement": ("a.jsonl", lines({"conversations": SHARE, "kto_tag": True}), kto, (ASKED, R, True)),
    "TRL judgement": ("a.jsonl", lines({"prompt": Q, "completion": R, "label": False}), kto, (ASKED, R, False)),
    # --- CSV and TSV
    "CSV": ("a.csv", f"question,answer\r\n{Q},42\r\n", gold, (ASKED, "42")),
    "CSV, quotes": ("a.csv", 'question,answer\n"a, ""b""\n\nc",1\n', gold, ([(U, 'a, "b"\n\nc')], "1")),
    "TSV": ("a.tsv", f"question\tanswer\n{Q}\t4\n", gold, (ASKED, "4")),
    "gzipped CSV": ("a.csv.gz", gzip.compress(f"question,answer\n{Q},4\n".encode(), mtime=0), gold, (ASKED, "4")),
    "CSV with a byte order mark": ("a.csv", f"\ufeffquestion,answer\n{Q},4\n", gold, (ASKED, "4")),
    "CSV with JSON messages": ("a.csv", 'messages\n"' + json.dumps(CHAT).replace('"', '""') + '"\n', sft, TOLD),
    "CSV with a label": ("a.csv", f"prompt,completion,label\n{Q},{R},True\n", kto, (ASKED, R, True)),
    "CSV, an empty cell": ("a.csv", f"question,answer\n{Q},\n", gold, "answer (null)"),
    "CSV, ragged": ("a.csv", f"question,answer\n{Q},1\n{Q},1,2\n", gold, "a.csv:3: 3 cells, but the header names 2"),
    "CSV, a column twice": ("a.csv", "question,answer,answer\nq,1,2\n", gold, "names the column 'answer' twice"),
    "CSV, a nameless column": ("a.csv", ",question,answer\n0,q,1\n", gold, "column 1 of the header has no name"),
    "CSV with semicolons": ("a.csv", "question;answer\nq;1\n", gold, "by commas, not by ';'"),
    "CSV, an open quote": ("a.csv", 'question,answer\n"q,1\nr,2\n', gold, "a.csv:2: not valid CSV"),
    "CSV in Latin-1": ("a.csv", "question,answer\nq,1\ncaf\xe9,2\n".encode("latin-1"), gold, "a.csv:3: not UTF-8"),
    "CSV, NUL": ("a.csv", "question,answer\nq\0,1\n", gold, "a.csv:2: NUL byte"),
    "CSV, a Python list": (
        "a.csv",
        "messages\n\"[{'role': 'user'}]\"\n",
        sft,
        "a.csv:2: column 'messages' begins like a list",
    ),
}


def read(path: Path, convert: Any) -> list[Any]:
    return parse_rows(read_source(str(path), DataConfig(), []), convert)[0]


@pytest.mark.parametrize("name", TABLE)
def test_a_file_is_read_right_or_refused_with_the_true_reason(name: str, tmp_path: Path) -> None:
    file, content, convert, expected = TABLE[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, str) and expected != "A line.":
        with pytest.raises(DataError) as caught:
            read(path, convert)
        assert expected in str(caught.value)
    else:
        assert read(path, convert) == [expected]


CONVERTED: dict[str, tuple[Any, Any, Any]] = {
    "choices": (MMLU, gold, ([(U, "Which?\n\nA. red\nB. blue")], "B")),
    "context": (SQUAD, gold, ([(U, "It is blue.\n\nSky?")], "blue")),
    "better-response": (
        {"prompt": Q, "response_0": "Red.", "response_1": R, "better_response_id": 1},
        pair,
        (ASKED, R, "Red."),
    ),
    "scored-completions": (
        {"instruction": Q, "completions": [{"response": t, "overall_score": s} for t, s in (("Red.", 2), (R, 9))]},
        pair,
        (ASKED, R, "Red."),
    ),
    "input-output-turns": ({"conversation": [{"input": Q, "output": R}]}, sft, TOLD),
    "input-output": ({"input": Q, "output": R}, sft, TOLD),
    "sharegpt": ({"conversations": SHARE}, sft, TOLD),
    "openai-preference": (
        {
            "input": {"messages": CHAT[:1]},
            "preferred_output": CHAT[1:],
            "non_preferred_output": [{**CHAT[1], "content": "x"}],
        },
        pair,
        (ASKED, R, "x"),
    ),
    "openai-batch": ({"custom_id": "1", "body": {"messages": CHAT[:1]}}, task, (ASKED, None)),
    "openai-reinforcement": ({"messages": CHAT[:1], "reference_answer": "b"}, gold, (ASKED, "b")),
    "verl": ({"prompt": CHAT[:1], "reward_model": {"ground_truth": "42"}}, gold, (ASKED, "42")),
}


@pytest.mark.parametrize("layout", FORMATS)
def test_every_layout_is_converted_to_a_file_that_is_read(layout: str, tmp_path: Path) -> None:
    row, convert, expected = CONVERTED[layout]
    (tmp_path / "a.jsonl").write_text(lines(row, row))
    to = tmp_path / "b.jsonl"
    assert convert_file(str(tmp_path / "a.jsonl"), str(to), layout) == {layout: 2}
    assert read(to, convert) == [expected, expected]
    with pytest.raises(ConfigError, match=r"b\.jsonl exists"):
        convert_file(str(tmp_path / "a.jsonl"), str(to), layout)


def test_columns_are_renamed_and_known_layouts_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,antwort\nSky?,blue\n")
    assert convert_file(
        str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl"), "", {"frage": "question", "antwort": "answer"}
    )
    assert read(tmp_path / "b.jsonl", gold) == [(ASKED, "blue")]
    (tmp_path / "c.jsonl").write_text(lines({"conversations": SHARE}, {"messages": CHAT}))
    assert convert_file(str(tmp_path / "c.jsonl"), str(tmp_path / "d.jsonl")) == Counter({"sharegpt": 1, "": 1})
    for rename, says in (({"x": "y"}, "no column 'x'"), ({"frage": "antwort"}, "already has a column 'antwort'")):
        with pytest.raises(DataError, match=says):
            convert_file(str(tmp_path / "a.csv"), str(tmp_path / "e.jsonl"), "", rename)
    with pytest.raises(DataError, match=r"a\.csv:2: the row is not in the layout 'verl'"):
        convert_file(str(tmp_path / "a.csv"), str(tmp_path / "e.jsonl"), "verl")
    assert not (tmp_path / "e.jsonl").exists()


plain = st.dictionaries(
    st.sampled_from(["question", "answer", "prompt", "messages", "id", "meta"]),
    st.one_of(st.text(max_size=5), st.integers(), st.none(), st.lists(st.integers(), max_size=2)),
)


@given(plain)
def test_a_row_in_no_known_layout_is_left_as_it_is(row: dict[str, Any]) -> None:
    assert standard(row) == (row, [])
    assert not any(is_one(row) for is_one, _ in DIRECT.values())


def test_a_row_over_the_limit_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    long = "a" * 4_000_001
    (tmp_path / "a.jsonl").write_text(lines({"question": "q", "answer": "1"}, {"question": long, "answer": "1"}))
    (tmp_path / "a.json").write_text(json.dumps([{"question": long, "answer": "1"}]))
    (tmp_path / "a.csv").write_text(f"question,answer\nq,1\n{long},2\n")
    for name, says in (
        ("a.jsonl", ":2: the row has more than 4000000 characters"),
        ("a.json", ":1: the row has more"),
        ("a.csv", ":3: not valid CSV: field larger than field limit"),
    ):
        with pytest.raises(DataError, match=says):
            read_rows(str(tmp_path / name))


def test_a_gzip_file_that_grows_without_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.data.lines.GZIP_FREE", 100_000)
    monkeypatch.setattr("posttrain.data.lines.GZIP_RATIO", 2)
    for content in (b'{"question": "q", "answer": "1"}\n' * 100_000, b" " * 3_000_000):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(content, 9, mtime=0))
        with pytest.raises(DataError, match="decompresses to more than 100000 bytes"):
            read_rows(str(path))


# --- Parquet ----------------------------------------------------------------------------------------------------------


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    calls = [{"function": {"name": name, "arguments": arguments}}]
    return {
        "messages": [{"role": U, "content": Q, "tool_calls": None}, {"role": A, "content": "", "tool_calls": calls}]
    }


def test_nulls_that_arrow_adds_to_tool_calls_are_removed_and_all_others_kept(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [
        {**call("add", {"a": 1, "b": 2}), "tools": [{"name": "add", "parameters": {"a": "int"}}], "extra": {"x": None}},
        {
            **call("weather", {"city": "Oslo"}),
            "tools": [{"name": "weather", "parameters": {"city": "str"}}],
            "extra": {"x": 1},
        },
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [row.values for row in read_rows(str(tmp_path / "a.parquet"))]
    assert found == rows
    assert said(row_to_conversation(read_rows(str(tmp_path / "a.parquet"))[1]))[1][2] == [
        {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    ]


def test_two_parquet_columns_or_fields_of_one_name_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    column = pyarrow.array(["x"])
    inner = pyarrow.StructArray.from_arrays([column, column], names=["a", "a"])
    tables = {
        "prompt": pyarrow.Table.from_arrays([column, column], names=["prompt", "prompt"]),
        "extra.a": pyarrow.Table.from_arrays([inner], names=["extra"]),
    }
    for name, table in tables.items():
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(DataError, match=f"two columns named '{name}'"):
            read_rows(str(tmp_path / "a.parquet"))


nested = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(nested)
def test_only_nulls_below_open_keys_are_removed(value: Any) -> None:
    assert without_added_nulls(value) == value
    inside = without_added_nulls({"arguments": value})
    if value is not None and not isinstance(value, dict | list):
        assert inside == {"arguments": value}
    assert without_added_nulls(inside) == inside
