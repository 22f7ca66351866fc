"""Renders messages with a tokenizer's chat template, and finds out what the template reads and writes.

A template is an arbitrary program, so everything about it is measured with probes: short conversations in which a
random mark stands for one text. `ChatFormat` (posttrain/data/chat.py) encodes what is rendered here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import cached_property
from typing import Any, cast

from posttrain.data.control_tokens import ControlTokens, private_mark, substitute
from posttrain.data.messages import THOUGHT_NAMES, TOOLS, template_arguments, template_fields, thought_of
from posttrain.data.thoughts import OPENED, TAG
from posttrain.types import Json, JsonView, Message, TemplateError

PROBE = (Message("user", "a"), Message("assistant", "b"))
RESERVED = ("conversation", "messages", "documents", "chat_template", "tokenize", "padding", "truncation", "max_length",
            "add_generation_prompt", "continue_final_message", "return_tensors", "return_dict", "strftime_now",
            "return_assistant_tokens_mask", "tokenizer_kwargs", TOOLS)  # fmt: skip
"""Names that `data.template_kwargs` and a row's `chat_template_kwargs` may not use."""
_DAY = "posttrain_day"
_CODES = (*(f"%-{c}" for c in "dmyHIMSj"), *(f"%{c}" for c in "aAbBcdDeFfGhHIjmMpSuUVwWxXyYzZ%"))
_FIXED_DATE = (  # transformers' own strftime_now reads the clock; the line break is removed by its `trim_blocks`
    "{%- macro strftime_now(format) -%}{%- set out = namespace(text=format) -%}{%- for code, value in "
    + _DAY
    + ".items() -%}{%- set out.text = out.text.replace(code, value) -%}{%- endfor -%}{{- out.text -}}{%- endmacro %}\n"
)


class Template:
    """The chat template of a tokenizer, with fixed arguments and a fixed date.

    `arguments` are passed to the template each time; a row's own take precedence. `day` is the date that the template's
    `strftime_now` reads. Raises TemplateError if the template doesn't read one of the arguments.
    """

    def __init__(self, tokenizer: Any, control: ControlTokens, arguments: JsonView, day: date) -> None:
        self._tokenizer, self._control = tokenizer, control
        self._arguments = dict(arguments)
        at = datetime(day.year, day.month, day.day)
        self._day = {code: at.strftime(code) for code in _CODES}
        self._dated = self.mentions("strftime_now")
        for name in self._arguments:
            if name in RESERVED or not self.mentions(name):
                why = "is set by posttrain" if name in RESERVED else "is not read by this tokenizer's chat template"
                raise TemplateError(f"data.template_kwargs has {name!r}, which {why}. Remove it.")

    def mentions(self, name: str) -> bool:
        """Whether the template's text has this variable's name."""
        text = self._tokenizer.chat_template
        return bool(re.search(rf"\b{re.escape(name)}\b", text if isinstance(text, str) else str(text)))

    def render(self, messages: Sequence[Message], generation: bool, aliased: bool) -> str:
        """Renders the messages; `generation` adds the beginning of an assistant turn. With `aliased`, control tokens
        that the template writes get their aliases."""
        contents = [m.content for m in messages]
        plain = self.apply(contents, messages, generation)
        if not aliased:
            return plain
        marks = [private_mark() for _ in messages]
        forging = map(self._control.written_in, messages)
        hidden = [mark if forges else m.content for mark, m, forges in zip(marks, messages, forging, strict=True)]
        skeleton = self.apply(hidden, messages, generation)
        others = ("user", "system", "tool")
        for trimmed in ((), others, ("assistant",), (*others, "assistant")):
            contents = [m.content.strip() if m.role in trimmed else m.content for m in messages]
            if substitute(skeleton, marks, contents) == plain:
                safe = [self._control.alias_allowed(c, m) for c, m in zip(contents, messages, strict=True)]
                return substitute(self._control.alias(skeleton, self._control.added), marks, safe)
        raise TemplateError(
            "a message contains the text of a control token, and the chat template changes that message, so the token "
            "cannot be escaped. Remove it from the text."
        )

    def apply(self, contents: Sequence[str], messages: Sequence[Message], generation: bool) -> str:
        """Renders the messages with these contents."""
        rows = [self._row(content, m) for content, m in zip(contents, messages, strict=True)]
        return self._apply(rows, generation, template_arguments(messages))

    def opened_in(self, prompt: str, messages: Sequence[Message]) -> str:
        """The thought that the generation prompt of `messages` opens and does not close, such as `<think>` and a line
        break; `prompt` is its rendered text."""
        if not OPENED.search(prompt):
            return ""
        found = OPENED.search(prompt, common_prefix(self.render(messages, False, False), prompt))
        return found.group() if found else ""

    def reads(self, role: str) -> bool:
        """Whether the template accepts a message of this role after a reply and includes its text."""
        mark = private_mark()
        try:
            return mark in self.apply(["a", "b", mark], (*PROBE, Message(cast(Any, role), mark)), True)
        except TemplateError:
            return False

    @cached_property
    def thought_name(self) -> str | None:
        """The name of the message field from which the template writes a thought, if there is one."""
        mark = private_mark()
        rows: list[Json] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for name in THOUGHT_NAMES:
            try:
                if self.mentions(name) and mark in self._apply([rows[0], {**rows[1], name: mark}], False, {}):
                    return name
            except TemplateError:
                continue
        return None

    @cached_property
    def _parts(self) -> bool:
        """Whether the template takes contents only as a list of parts, as those of vision models do."""
        mark = private_mark()

        def written(content: object) -> bool:
            try:
                return mark in self._apply([{"role": "user", "content": content}], True, {})
            except TemplateError:
                return False

        return not written(mark) and written([{"type": "text", "text": mark}])

    @cached_property
    def _calls_as_text(self) -> bool:
        """Whether the template writes a call's arguments well only if they are JSON text, not an object."""

        def written(arguments: object) -> str | None:
            call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": arguments}}
            rows = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                return self._apply(cast(Any, rows), False, {})
            except TemplateError:
                return None

        as_object = written({"key": "value"})
        if as_object is not None and "{'key'" not in as_object:  # else it is Python's text of the object
            return False
        as_text = written('{"key": "value"}')
        return as_text is not None and '{"key": "value"}' in as_text

    def _row(self, content: str, message: Message) -> Json:
        row: Json = {"role": message.role, "content": content, **template_fields(message)}
        if self._parts:
            row["content"] = [{"type": "text", "text": content}]
        if message.tool_calls:
            row["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if thought := thought_of(message):
            row[self.thought_name or THOUGHT_NAMES[0]] = thought
        return row

    def _call(self, call: JsonView) -> Json:
        inner = call.get("function")
        if isinstance(inner, Mapping):
            return {**call, "function": self._call(cast(JsonView, inner))}
        if "arguments" in call and not isinstance(call["arguments"], str) and self._calls_as_text:
            return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        return dict(call)

    def _apply(self, rows: list[Json], generation: bool, arguments: JsonView) -> str:
        given = {**self._arguments, **arguments}
        try:
            if self._dated:
                own = self._tokenizer.get_chat_template(None, given.get(TOOLS))
                given |= {"chat_template": _FIXED_DATE + own, _DAY: self._day}
            text = self._tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generation, **given)
        except Exception as error:  # templates can raise anything; it always means that they reject these messages
            roles = ", ".join(row["role"] for row in rows)
            raise TemplateError(f"the chat template rejects messages with roles {roles}: {error}") from error
        return cast(str, text)


def written_part(prompt: str, whole: str, text: str) -> str | None:
    """The part of a rendered conversation that belongs to its last message, where the template renders the messages
    before it differently than in their prompt; None if it cannot be told apart.

    `whole` has that message, whose content is the mark `text`. A prompt that differs only in its beginning (Mistral
    moves the system message) ends with the same words as what precedes the message in `whole`.
    """
    before = whole[: whole.find(text)]
    best, length = 0, 0
    for cut in range(len(before), max(0, len(before) - 80), -1):
        same = common_prefix(before[:cut][::-1], prompt[::-1])
        if same > length:
            best, length = cut, same
    return before[best:] if length else None


def common_prefix(one: str, other: str) -> int:
    """Length of the longest common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def missing_text(message: Message, shown: str) -> str:
    """The first part of an assistant's thought or content that is not in the text `shown`; empty if all of it is.

    White space is not compared, and neither are the tags around a thought, which templates write in their own way.
    """
    found, start = _compact(shown), 0
    thought = thought_of(message)
    if _compact(thought) not in found:
        return thought.strip()
    for part in TAG.split(message.content):
        at = found.find(_compact(part), start)
        if at < 0:
            return part.strip()
        start = at + len(_compact(part))
    return ""


def _compact(text: str) -> str:
    return "".join(text.split())
