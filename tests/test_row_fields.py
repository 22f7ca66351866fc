"""Conservation: each column of a row and each field of a message is read by something, refused, or named in a note."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig
from posttrain.config.sft import SFTConfig
from posttrain.data.chat import ChatFormat
from posttrain.data.conversation_rows import trained_rows, training_rows
from posttrain.data.conversations import fit_prompts, load_conversations
from posttrain.data.files import Row
from posttrain.data.pairs import pair_rows, read_compared
from posttrain.data.preferences import read_preferences, row_to_judgement, row_to_preference, write_preferences
from posttrain.data.sources import read_rows, row_to_conversation, row_to_task
from posttrain.data.tasks.load import load_tasks, read_tasks, write_tasks
from posttrain.types import DataError, Message, TemplateError
from tests.zoo import CHATML, ZOO, Animal, tokenizer_of

U, A = {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Bleu."}
SYSTEM, ASK = Message("system", "Answer in French."), Message("user", "Sky?")
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.thinking %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read(where: str = "f.parquet:1", **values: Any) -> tuple[Message, ...]:
    found = row_to_conversation(Row(where, values))
    assert isinstance(found, tuple)
    return found


def trained(messages: Sequence[Message], template: str = CHATML, train_on: str = "assistant") -> list[str]:
    chat = ChatFormat(tokenizer_of(Animal(template)))
    return [chat.decode(tokens[mask]) for tokens, mask in trained_rows(tuple(messages), chat, train_on)]


@pytest.mark.parametrize(
    "values",
    [
        {"system": "Answer in French.", "messages": [U, A]},
        {"system_prompt": "Answer in French.", "question": "Sky?", "answer": "Bleu."},
        {"system": "Answer in French.", "messages": [{"role": "system", "content": "Answer in French."}, U, A]},
        {"system": "Answer in French.", "system_prompt": None, "instruction": "Sky?", "output": "Bleu."},
    ],
)
def test_a_system_column_is_the_system_message(values: dict[str, Any]) -> None:
    assert read(**values)[:2] == (SYSTEM, ASK)


def test_two_system_messages_are_refused() -> None:
    with pytest.raises(DataError, match=r"f.parquet:1: the row has two different system messages"):
        read(system="Be brief.", messages=[{"role": "system", "content": "Be long."}, U, A])
    with pytest.raises(DataError, match="its own system message"):
        row_to_conversation(Row("f:1", {"system": "Be brief.", "messages": [U, A]}), system="S")


def test_history_comes_before_the_question() -> None:
    expected = (Message("user", "Hi"), Message("assistant", "Ahoy"), Message("user", "Go on."))
    assert read(instruction="Go on.", input="", output="Yes.", history=[["Hi", "Ahoy"]])[:3] == expected
    messages = [{"role": m.role, "content": m.content} for m in expected[:2]]
    assert read(prompt="Go on.", completion="Yes.", history=messages, system="S")[1:4] == expected
    with pytest.raises(DataError, match="column 'history' is not a list"):
        read(prompt="Go on.", completion="Yes.", history=[["Hi"]])


def test_a_reply_after_an_assistant_s_prompt_is_refused() -> None:
    """As in preferences: whether it continues that message cannot be told, and two turns would be trained."""
    begun = [U, {"role": "assistant", "content": "Sure,"}]
    for reply in (" it is blue.", [{"role": "assistant", "content": " it is blue."}]):
        with pytest.raises(DataError, match=r"f.parquet:1: 'prompt' ends with an assistant message and 'completion'"):
            read(prompt=begun, completion=reply)
    assert len(read(prompt=[U, A, U], completion="Blue.")) == 4


def test_a_context_follows_an_instruction() -> None:
    assert read(instruction="Who?", context="Bob did it.", output="Bob.")[0].content == "Who?\n\nBob did it."


def test_a_message_of_weight_0_is_context() -> None:
    messages = read(messages=[U, {"role": "assistant", "content": "WRONG", "weight": 0}, U, {**A, "weight": 1}])
    assert trained(messages) == ["Bleu."] and trained(messages, train_on="completion") == ["Bleu."]
    assert "WRONG" not in trained(messages, train_on="all")[0] and "Sky?" in trained(messages, train_on="all")[0]
    with pytest.raises(DataError, match=r"message 2 of 'messages': weight=0.5; expected 0"):
        read(messages=[U, {**A, "weight": 0.5}])
    with pytest.raises(DataError, match="no assistant message with text"):
        read(messages=[U, {**A, "weight": 0}])


def test_openai_s_developer_is_the_system_and_a_refusal_is_the_assistant_s_text() -> None:
    declined = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
    messages = read(messages=[{"role": "developer", "content": "Be brief."}, U, declined])
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be brief."), ("user", "Sky?"), ("assistant", "I cannot help with that."),
    ]  # fmt: skip
    assert read(messages=[U, {**A, "refusal": None}])[-1].content == "Bleu."
    with pytest.raises(DataError, match="message 2 of 'messages' has no|the content of the assistant message is null"):
        read(messages=[U, {"role": "assistant", "content": None, "refusal": None}])
    with pytest.raises(DataError, match="two different system messages"):
        read(system="Be long.", messages=[{"role": "developer", "content": "Be brief."}, U, A])


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_separate_thought_is_trained_or_refused(name: str) -> None:
    messages = read(messages=[U, {**A, name: "I look up."}])
    assert trained(messages, THINKING) == ["<think>I look up.</think>Bleu."]
    assert "I look up." in trained(messages, ZOO["thinks in the last turn"].template)[0]
    with pytest.raises(TemplateError, match=r"leaves out 'I look up.' of assistant message 2"):
        trained(messages)


def test_a_separate_thought_of_an_answer_is_compared() -> None:
    chat = ChatFormat(tokenizer_of(Animal(THINKING)))
    row = Row(
        "f:1", {"prompt": "Sky?", "chosen": [{**A, "thinking": "French."}], "rejected": [{**A, "content": "Blue."}]}
    )
    rows, _ = pair_rows([row_to_preference(row)], chat, 99)
    assert [chat.decode(r.tokens[r.loss_mask]) for r in rows] == ["<think>French.</think>Bleu.", "Blue."]


F: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {}}}
AS_TEXT = {"type": "function", "function": {"name": "f", "arguments": ""}}


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "assistant", "content": None, "tool_calls": [AS_TEXT]},
        {"role": "assistant", "tool_calls": [F]},
    ],
)
def test_calls_are_read_in_all_their_forms(call: dict[str, Any]) -> None:
    answer = {"role": "function", "name": "f", "content": "8"}
    messages = read(messages=[U, call, answer, A])
    assert messages[1] == Message("assistant", "", (F,))
    assert messages[2] == Message("tool", "8", fields={"name": "f"})


def test_nulls_that_arrow_adds_to_arguments_are_left_out_and_those_of_a_text_file_are_kept() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1, "b": None, "c": {"d": None}}}]}
    assert read(messages=[U, call])[1].tool_calls[0]["arguments"] == {"a": 1, "c": {}}
    assert read("f.jsonl:1", messages=[U, call])[1].tool_calls[0]["arguments"] == {"a": 1, "b": None, "c": {"d": None}}
    with pytest.raises(DataError, match="expected a JSON object"):
        read(messages=[U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "three"}]}])


def test_parts_of_text_are_joined() -> None:
    assert (
        read(
            messages=[{"role": "user", "content": [{"type": "text", "text": "Sk"}, {"type": "text", "text": "y?"}]}, A]
        )[0]
        == ASK
    )


def test_preferences_judgements_and_tasks_have_the_same_context() -> None:
    context = {"system": "Answer in French.", "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    p = row_to_preference(Row("f:1", {**context, "question": "Sky?", "chosen": "Bleu.", "rejected": "Blue."}))
    j = row_to_judgement(Row("f:1", {**context, "prompt": "Sky?", "completion": "Bleu.", "label": True}))
    t = row_to_task(Row("f:1", {**context, "prompt": "Sky?", "answer": "Bleu."}), "f")
    fields = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    for messages in (p.prompt, j.prompt, t.messages):
        assert messages == (Message("system", "Answer in French.", fields=fields), ASK)


def test_what_nothing_reads_is_named_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"id": i, "messages": [{**U, "lang": "en"}, {**A, "refusal": None}], "source": "web"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = load_conversations(DataConfig(tasks=str(path), holdout=0), 0).notes
    note = f"{path}: nothing reads column 'id' (3 rows), column 'source' (3 rows), message field 'lang' (3 rows)."
    assert note in notes
    pairs = [{"id": i, "prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    chat = ChatFormat(tokenizer_of(ZOO["chatml"]))
    _, _, notes, _ = read_compared(
        read_rows(str(path)), DataConfig(tasks=str(path), holdout=0), 0, chat, row_to_preference, "p"
    )
    assert f"{path}: nothing reads column 'id' (3 rows)." in notes


def test_fields_that_the_template_does_not_write_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{**U, "name": "Ann"}, A], "chat_template_kwargs": {"enable_thinking": True}}
    path.write_text(json.dumps(row) + "\n")
    source = load_conversations(DataConfig(tasks=str(path), holdout=0), 0).sources[0]
    notes: list[str] = []
    training_rows(source, ChatFormat(tokenizer_of(ZOO["chatml"])), SFTConfig(), notes)
    assert notes == [
        f"{path}: the chat template does not use {name!r} of 1 rows." for name in ("enable_thinking", "name")
    ]
    path.write_text(json.dumps({"prompt": "3 + 5?", "answer": "8", "tools": [TOOL]}) + "\n")
    cfg = DataConfig(tasks=str(path), eval_tasks=str(path))
    with pytest.raises(DataError):
        load_tasks(cfg, 0)  # the only prompt is also held out
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": "8", "tools": [TOOL]}) + "\n" for i in range(4)))
    sets = fit_prompts(
        load_tasks(DataConfig(tasks=str(path)), 0), ChatFormat(tokenizer_of(ZOO["chatml"])), DataConfig()
    )
    assert any("does not use 'tools' of 4 rows" in note for note in sets.notes)


def test_conversations_of_several_turns_that_a_template_rewrites_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": [*turns, U, A]}) + "\n" for turns in ([U, A], [])))
    source = load_conversations(DataConfig(tasks=str(path), holdout=0), 0).sources[0]
    notes: list[str] = []
    rows = training_rows(source, ChatFormat(tokenizer_of(ZOO["thinks in the last turn"])), SFTConfig(), notes)
    assert len(rows) == 3
    assert notes == [
        f"{path}: 1 of 2 conversations became 2 rows, one for each assistant turn, because the chat template rewrites "
        "earlier turns."
    ]


def test_fields_are_kept_in_the_files_of_a_run(tmp_path: Path) -> None:
    context = {"tools": [TOOL], "system": "S", "chat_template_kwargs": {"x": 1}}
    p = row_to_preference(Row("f:1", {**context, "question": "Sky?", "chosen": "Bleu.", "rejected": "Blue."}))
    write_preferences(tmp_path / "p.jsonl", [p])
    assert read_preferences(tmp_path / "p.jsonl") == [p]
    t = row_to_task(Row("f:1", {**context, "prompt": "Sky?", "answer": "Bleu."}), "f")
    write_tasks(tmp_path / "t.jsonl", [t])
    assert read_tasks(tmp_path / "t.jsonl") == [t]
