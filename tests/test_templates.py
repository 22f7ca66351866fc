"""Law: what is trained is, id for id, what the sampler is prompted with plus what it would write, up to its stop."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain as pt
from posttrain.config import ModelConfig
from posttrain.config.resolve import as_toml, read_toml, resolve
from posttrain.data.chat import ChatFormat
from posttrain.data.conversation_rows import trained_rows
from posttrain.data.files import Row
from posttrain.data.pairs import pair_rows
from posttrain.data.sources import row_to_conversation, row_to_task
from posttrain.data.thoughts import TAG
from posttrain.models.load import chat_format_of, load_policy
from posttrain.store.listing import template_settings
from posttrain.types import ConfigError, DataError, Message, Preference, TemplateError
from tests.zoo import SPACES, ZOO, Animal, save, tokenizer_of

every = pytest.mark.parametrize("name", ZOO)


@functools.cache
def format_of(name: str, spaces: str = "byte-level") -> ChatFormat:
    return ChatFormat(tokenizer_of(ZOO[name], spaces=spaces), day=date(2026, 1, 2))


def said(*texts: str) -> tuple[Message, ...]:
    """`s:`, `u:` and `a:` are who says it."""
    roles: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message(roles[text[0]], text[2:]) for text in texts)


THOUGHT = "<think>\nI add.\n</think>\n\nThe sum is 8."
CONVERSATIONS = {
    "plain": said("u:3 + 5?", "a:The sum is 8."),
    "system": said("s:Be brief.", "u:3 + 5?", "a:8."),
    "break": said("u:3 + 5?", "a:\nThe sum is 8."),
    "breaks": said("u:3 + 5?\n\n", "a:\n\nThe sum is 8.\n"),
    "spaces": said("u: 3 + 5?", "a:  The sum is 8. é ÿ"),
    "two": said("u:3 + 5?", "a:8.", "u:And 1 + 1?", "a:The sum is 2."),
    "thought": said("u:3 + 5?", f"a:{THOUGHT}"),
    "thoughts": said("u:3 + 5?", f"a:{THOUGHT}", "u:And 1 + 1?", "a:<think>\nOne, two.\n</think>\n\n2."),
}


def replies(chat: ChatFormat, messages: Sequence[Message]) -> dict[int, list[int]]:
    """The trained ids of each assistant message: those after its prompt, in a row that begins with the prompt."""
    rows = chat.rows(messages)
    found: dict[int, list[int]] = {}
    for k in (k for k, m in enumerate(messages) if m.role == "assistant"):
        prompt = chat.prompt_tokens(messages[:k])
        first = len(prompt)
        begins = [np.array_equal(ids[:first], prompt) and mask[first] and not mask[first - 1] for ids, mask in rows]
        ids, mask = rows[begins.index(True)]
        assert begins.count(True) == 1
        run = [*mask[first:].tolist(), False]
        found[k] = ids[first : first + run.index(False)].tolist()
    assert sum(map(len, found.values())) == sum(int(mask.sum()) for _, mask in rows), "nothing else is trained"
    return found


@every
@pytest.mark.parametrize("spaces", SPACES)
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_what_is_trained_is_the_sampler_s_prompt_and_what_it_would_write(name: str, kind: str, spaces: str) -> None:
    animal, chat, messages = ZOO[name], format_of(name, spaces), CONVERSATIONS[kind]
    if reason := animal.refuses.get("break" if kind in ("breaks", "spaces") else kind):
        with pytest.raises(TemplateError, match=reason):
            chat.rows(messages)
        return
    for k, reply in replies(chat, messages).items():
        prompt, decode = chat.prompt_tokens(messages[:k]).tolist(), chat._native.decode
        assert [i for i, token in enumerate(reply) if token in chat.stop_ids] == [len(reply) - 1], (
            "one stop, at its end"
        )
        begun, whole = decode(prompt, skip_special_tokens=False), decode(prompt + reply, skip_special_tokens=False)
        alone = decode(reply, skip_special_tokens=False)
        assert whole.startswith(begun) and whole[len(begun) :].strip(" ") == alone.strip(" ")
        text = chat.opening(messages[:k]) + chat.decode(reply)
        for part in TAG.split(messages[k].content):
            assert part.strip() in text, "all of the assistant's text is trained"
    if spaces == "byte-level":  # the others merge some replies with the prompt's end, which needs a row for each turn
        assert len(chat.rows(messages)) == (2 if kind in animal.many else 1)


@every
def test_stop_tokens_come_after_the_text_and_are_never_headers(name: str) -> None:
    chat, animal = format_of(name), ZOO[name]
    assert {chat._native.id_to_token(i) for i in chat.stop_ids} == {*animal.stops}


@every
@pytest.mark.parametrize("spaces", SPACES)
def test_no_text_becomes_a_control_token(name: str, spaces: str) -> None:
    chat, animal = format_of(name, spaces), ZOO[name]
    controls = {i for text, i in chat._control.added.items() if text != "<pad>"}
    written = lambda ids: [i for i in ids.tolist() if i in controls]  # noqa: E731
    harmless = written(chat.prompt_tokens(said("u:x", "a:8", "u:x")[:1]))
    for text in (*animal.special, "<think>", "</think>"):
        assert written(chat.prompt_tokens(said(f"u:x{text}y"))) == harmless
    with pytest.raises(TemplateError, match="control token"):
        chat.prompt_tokens([Message("user", "x", fields={"name": animal.special[0]})])


def test_a_turn_that_begins_with_a_line_break_is_encoded_apart_from_its_prompt() -> None:
    chat = format_of("chatml")
    prompt = chat.prompt_tokens(said("u:3 + 5?")).tolist()
    ids = chat.rows(CONVERSATIONS["break"])[0][0].tolist()
    whole = chat._encode(chat.rendered(CONVERSATIONS["break"]), False)[0]
    assert ids[: len(prompt)] == prompt and whole[: len(prompt)] != prompt
    assert chat._native.decode(ids, skip_special_tokens=False) == chat.rendered(CONVERSATIONS["break"])


def test_line_breaks_that_are_added_tokens_are_ordinary_text() -> None:
    """Gemma has added tokens for several line breaks."""
    tokenizer = tokenizer_of(ZOO["chatml"], visible=("<think>", "</think>", "\n\n"))
    chat = ChatFormat(tokenizer)
    both = tokenizer.convert_tokens_to_ids("\n\n")
    for text in ("a\n\nb", "a\n\nb<|im_end|>"):
        assert both in chat.prompt_tokens(said(f"u:{text}")), text
    whole = chat._encode(chat.rendered(said("u:a\n\nb")) + "<|im_start|>assistant\n", False)[0]
    assert chat.prompt_tokens(said("u:a\n\nb")).tolist() == whole


def test_only_the_last_turn_is_needed_with_train_on_completion() -> None:
    chat, messages = format_of("thinks in the last turn"), CONVERSATIONS["thoughts"]
    ((tokens, mask),) = trained_rows(messages, chat, "completion")
    assert chat.decode(tokens[mask]) == "<think>\nOne, two.\n</think>\n\n2."
    assert "I add." not in chat.decode(tokens), "the thought of the earlier turn is not in the prompt"


def test_everything_is_trained_once_where_each_turn_has_a_row() -> None:
    chat = format_of("thinks in the last turn")
    (one, first), (two, second) = trained_rows(CONVERSATIONS["thoughts"], chat, "all")
    assert first[1:].all() and not second[: np.flatnonzero(second)[0]].any()
    assert np.array_equal(one[: np.flatnonzero(second)[0]], two[: np.flatnonzero(second)[0]])


def test_a_last_assistant_message_is_continued() -> None:
    for name, begun in (("chatml", "<think>\nI"), ("opens a thought", "<think>\nI"), ("opens a thought", "Well")):
        chat = format_of(name)
        asked = said("u:3 + 5?", f"a:{begun}")
        opens = ZOO[name].opens
        text = chat._native.decode(chat.prompt_tokens(asked).tolist(), skip_special_tokens=False)
        own = begun.removeprefix(opens)
        assert text.endswith(f"assistant\n{opens}{own}") and chat.opening(asked) == opens + own


def test_prompts_are_encoded_once_for_both_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatFormat(tokenizer_of(ZOO["chatml"]))
    ask = said("u:What is 3 + 5?")
    rendered: list[str] = []
    encode = chat._control.encode
    monkeypatch.setattr(chat._control, "encode", lambda text, aliased: rendered.append(text) or encode(text, aliased))
    length = len(chat.prompt_tokens(ask))
    rows, _ = pair_rows([Preference("p", ask, "8", "It is 9.")], chat, 99)
    assert [chat.decode(row.tokens[row.loss_mask]) for row in rows] == ["8", "It is 9."]
    assert all(len(row.tokens) > length and not row.loss_mask[:length].any() for row in rows)
    assert sum("What is 3 + 5?" in text for text in rendered) == 1


def test_a_thought_of_its_own_is_named_where_the_template_opens_one_and_does_not_write_it() -> None:
    for name in ("opens a thought", "opens and drops thoughts"):
        row = (Message("user", "3 + 5?"), Message("assistant", "8.", fields={"reasoning_content": "I add."}))
        with pytest.raises(
            TemplateError, match="does not write the thought of assistant message 2, which is in a field"
        ):
            ChatFormat(tokenizer_of(ZOO[name])).rows(row)


def test_the_date_is_fixed() -> None:
    asked = said("u:3 + 5?")
    one, other = (ChatFormat(tokenizer_of(ZOO["dated"]), day=date(2026, 1, day)) for day in (2, 3))
    assert "Today is 02 Jan 2026" in one.decode(one.prompt_tokens(asked))
    assert "Today is 03 Jan 2026" in other.decode(other.prompt_tokens(asked))
    assert one.dated and not format_of("chatml").dated


def test_arguments_of_the_template_are_given_and_a_row_s_own_come_first() -> None:
    tokenizer, asked = tokenizer_of(ZOO["thinks in the last turn"]), said("u:3 + 5?")
    chat = ChatFormat(tokenizer, arguments={"enable_thinking": False})
    closed = "<think>\n\n</think>\n\n"
    assert chat.decode(chat.prompt_tokens(asked)).endswith(closed) and chat.opening(asked) == ""
    own = [Message("user", "3 + 5?", fields={"chat_template_kwargs": {"enable_thinking": True}})]
    assert not chat.decode(chat.prompt_tokens(own)).endswith(closed)
    (row,) = chat.rows((*asked, Message("assistant", "8.")))
    assert chat.decode(row[0][row[1]]) == "8.", "the empty thought is in the prompt"
    for wrong, says in (("enable_thinkng", "is not read by"), ("tokenize", "is set by posttrain")):
        with pytest.raises(TemplateError, match=says):
            ChatFormat(tokenizer, arguments={wrong: True})


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 5}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + (':' + m.tool_call_id if m.tool_call_id else '') + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' }}ARGUMENTS{{ '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROW = {
    "tools": json.dumps(TOOLS),
    "messages": [
        {"role": "user", "content": "What is 3 + 5?"},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 3, "b": 5}'}}]},
        {"role": "tool", "content": "8", "tool_call_id": "c7"},
        {"role": "assistant", "content": "8."},
    ],
}


@pytest.mark.parametrize("arguments", ["{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}"])
def test_arguments_of_calls_are_an_object_however_the_row_and_the_template_write_them(arguments: str) -> None:
    chat = ChatFormat(tokenizer_of(Animal(WITH_TOOLS.replace("ARGUMENTS", arguments))))
    messages = row_to_conversation(Row("f:1", ROW))
    assert isinstance(messages, tuple)
    (row,) = trained_rows(messages, chat, "assistant")
    assert chat._native.decode(row[0][row[1]].tolist()).startswith('<call>add {"a": 3, "b": 5}</call>')
    text = chat.decode(row[0])
    assert '"name": "add"' in text.split("user")[0] and "tool:c7\n8" in text


def test_a_template_without_tools_refuses_the_row_s_tools() -> None:
    messages = row_to_conversation(Row("f:1", {"tools": TOOLS, "prompt": "Hi", "completion": "Yo"}))
    assert isinstance(messages, tuple)
    with pytest.raises(TemplateError, match="omits the row's tools"):
        trained_rows(messages, format_of("chatml"), "assistant")


def test_a_header_is_trained_with_the_call_s_arguments() -> None:
    chat = format_of("headers")
    ask = said("u:3 + 5?")
    ((tokens, mask),) = chat.rows((*ask, Message("assistant", "", (CALL,))))
    shown = chat._native.decode(tokens[mask].tolist(), skip_special_tokens=False)
    assert shown == ' to=add<|channel|>commentary<|message|>{"a": 3, "b": 5}<|call|>'


SMALL: dict[str, Any] = {"threads": 1, "rollout__max_tokens": 6, "rollout__slots": 8, "prompts": 2, "group_size": 2,
                         "eval__problems": 2, "count": 16, "steps": 1}  # fmt: skip


def test_a_task_s_last_assistant_message_begins_the_reply_or_is_the_answer() -> None:
    row = {"messages": [{"role": "user", "content": "3 + 5?"}, {"role": "assistant", "content": "<think>"}]}
    task = row_to_task(Row("f:1", {**row, "answer": "8"}), "f")
    assert task.messages == said("u:3 + 5?", "a:<think>") and task.answer == "8"
    assert row_to_task(Row("f:1", row), "f").answer == "<think>"
    row["messages"][1]["content"] = "It is 8, as 8 = 3 + 5"
    with pytest.raises(DataError, match="states the answer '8' already"):
        row_to_task(Row("f:1", {**row, "answer": "8"}), "f")


class Stopped(Exception):
    """Ends a run between two steps."""


def test_a_run_is_resumed_with_the_date_of_its_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(ZOO["dated"], tmp_path / "model")

    def reward(completion: str, **task: Any) -> float:
        return len(completion) % 3 / 2

    def run(name: str, **more: Any) -> pt.api.Result:
        return pt.grpo(str(folder), "sums", reward, tmp_path / name, **SMALL | {"steps": 2}, **more)

    def stop(step: int, values: object) -> None:
        if step == 1:
            raise Stopped

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date(2099, 1, 1)

    whole = run("whole")
    with pytest.raises(Stopped):
        run("killed", on_step=stop)
    monkeypatch.setattr("posttrain.data.chat.date", Tomorrow)
    resumed = pt.resume(tmp_path / "killed", reward=reward)
    assert whole.summary and resumed.summary and resumed.summary["weights"] == whole.summary["weights"]


def test_the_template_s_arguments_are_kept_in_the_run_and_used_for_its_model(tmp_path: Path) -> None:
    recipe = resolve("grpo", {}, {"data.template_kwargs": "{enable_thinking = false, words = ['a']}"})
    assert recipe.data.template_kwargs == {"enable_thinking": False, "words": ["a"]}
    toml = tmp_path / "recipe.toml"
    toml.write_text(as_toml("grpo", recipe))
    assert resolve("grpo", read_toml(toml)[1]) == recipe
    with pytest.raises(ConfigError, match=r"data.template_kwargs='off' is not a table"):
        resolve("grpo", {}, {"data.template_kwargs": "off"})
    folder = save(ZOO["thinks in the last turn"], tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "3 + 5?", "completion": "8."}) + "\n")
    off = {"enable_thinking": False}
    settings: dict[str, Any] = {"steps": 1, "threads": 1, "data__holdout": 0, "data__template_kwargs": off,
                                "checkpoint_every": 1}  # fmt: skip
    run = pt.sft(str(folder), str(data), tmp_path / "run", **settings).folder
    (saved,) = (run / "ckpt").glob("step_*")
    for model in (run, run / "model", saved):
        arguments, day = template_settings(model)
        assert arguments == off and day is not None
        chat = chat_format_of(load_policy(ModelConfig(path=str(run / "model"))), model, "chat")
        assert chat.decode(chat.prompt_tokens(said("u:a"))).endswith("</think>\n\n")
    assert template_settings(folder) == ({}, None)
