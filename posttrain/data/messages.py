"""The fields of a message beside role, content and tool calls, and messages as JSON.

`Message.fields` has the fields of a row's message that something reads, under these names:

* `reasoning_content`: an assistant's thought that is stored apart from its content;
* `weight`: 0 for an assistant turn that is context only, and not trained;
* `name` and `tool_call_id`, which are given to the chat template as they are;
* `tools` and `chat_template_kwargs`: arguments of the chat template for the whole conversation, on its first message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from posttrain.types import Json, JsonView, Message

THOUGHT, WEIGHT, TOOLS, ARGUMENTS = "reasoning_content", "weight", "tools", "chat_template_kwargs"
THOUGHT_NAMES = (THOUGHT, "thinking", "reasoning")
"""Names of the field with an assistant's thought, in data files and in chat templates."""
_NOT_FOR_TEMPLATE = (THOUGHT, WEIGHT, TOOLS, ARGUMENTS)


def thought_of(message: Message) -> str:
    """The thought that is stored apart from the content, or an empty text."""
    return message.fields.get(THOUGHT, "")


def is_trained(message: Message) -> bool:
    """Whether this is an assistant turn that is trained, not context only (`weight: 0`)."""
    return message.role == "assistant" and message.fields.get(WEIGHT, 1) != 0


def template_fields(message: Message) -> Json:
    """The fields that the chat template gets as they are: `name` and `tool_call_id`."""
    return {name: value for name, value in message.fields.items() if name not in _NOT_FOR_TEMPLATE}


def without_thought(message: Message) -> Json:
    """All fields but the thought and the weight: what templates may write that the assistant did not."""
    return {name: value for name, value in message.fields.items() if name not in (THOUGHT, WEIGHT)}


def template_arguments(messages: Sequence[Message]) -> Json:
    """The chat template's arguments for a conversation: `tools` and what `chat_template_kwargs` holds."""
    found: Json = {}
    for message in messages:
        found |= message.fields.get(ARGUMENTS, {})
        found |= {TOOLS: message.fields[TOOLS]} if message.fields.get(TOOLS) else {}
    return found


def with_arguments(messages: tuple[Message, ...], arguments: JsonView) -> tuple[Message, ...]:
    """The conversation with fields `tools` and `chat_template_kwargs` on its first message."""
    if not arguments:
        return messages
    return (replace(messages[0], fields={**messages[0].fields, **arguments}), *messages[1:])


def without_prefill(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages without a last assistant turn, which a completion would continue."""
    return tuple(messages[:-1] if messages and messages[-1].role == "assistant" else messages)


def continued(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The messages with `text` as the beginning of the assistant's next turn, or added to the turn begun there."""
    begun = messages[-1].content if messages and messages[-1].role == "assistant" else ""
    return (*without_prefill(messages), Message("assistant", begun + text))


class Answer(str):
    """An answer's text together with the other fields of its message, such as a separate thought."""

    fields: JsonView = {}

    @classmethod
    def of(cls, message: Message) -> str:
        """The text of an assistant's message, as an `Answer` if the message has other fields."""
        if not message.fields:
            return message.content
        answer = cls(message.content)
        answer.fields = dict(message.fields)
        return answer


def answer_message(answer: str) -> Message:
    """The assistant's message with this answer."""
    return Message("assistant", str(answer), fields=answer.fields if isinstance(answer, Answer) else {})


def as_json(message: Message) -> Json:
    """The message as JSON, to write it to a file."""
    calls = [*map(dict, message.tool_calls)]
    return {"role": message.role, "content": message.content, "tool_calls": calls, **message.fields}


def from_json(row: JsonView) -> Message:
    """The message written by `as_json`."""
    fields = {name: value for name, value in row.items() if name not in ("role", "content", "tool_calls")}
    return Message(row["role"], row["content"], tuple(row["tool_calls"]), fields)


def text_key(messages: Sequence[Message]) -> str:
    """A text that is equal exactly if the conversations are equal; held-out splits depend on it."""
    extra = [dict(m.fields) for m in messages]
    return repr(messages) + (json.dumps(extra, sort_keys=True, default=str) if any(extra) else "")
