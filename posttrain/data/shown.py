"""Checks that the chat template writes what a conversation has beside its texts: tools, names, its own arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from posttrain.data.chat import ChatFormat
from posttrain.data.messages import ARGUMENTS, TOOLS, template_fields
from posttrain.types import Json, Message, TemplateError


def unread_fields(messages: Sequence[Message], chat: ChatFormat) -> list[str]:
    """Names of the message fields and template arguments of a conversation that its template does not write."""
    names = {n for m in messages for n in (*template_fields(m), *m.fields.get(ARGUMENTS, {}))}
    names |= {TOOLS for m in messages if m.fields.get(TOOLS)}
    return [name for name in sorted(names) if _same(messages, chat, lambda m, name=name: _without(m, name))]


def unread_notes(name: str, unread: Counter[str], kind: str = "") -> list[str]:
    """Notes on the fields that a source's rows have and its chat template does not write."""
    return [f"{name}: the chat template does not use {field!r} of {n} {kind}rows." for field, n in unread.items()]


def require_tools_shown(row: Sequence[Message], chat: ChatFormat) -> None:
    """Raises TemplateError if the chat template omits the tools, which of them were called, or what they returned."""
    for change, what in (
        (lambda m: replace(m, tool_calls=()), "the assistant's tool_calls"),
        (lambda m: replace(m, content=m.content + ".") if m.role == "tool" else m, "what a tool returned"),
        (lambda m: _without(m, TOOLS), "the row's tools"),
    ):
        if _same(row, chat, change):
            raise TemplateError(
                f"the chat template does not support tools: it omits {what}, so the model would be trained without "
                "them. Use a tokenizer whose template renders tool turns, or write them as text."
            )


def _same(messages: Sequence[Message], chat: ChatFormat, change: Callable[[Message], Message]) -> bool:
    """Whether the template writes the changed messages in the same way; False if nothing changes."""
    other = tuple(map(change, messages))
    if other == tuple(messages):
        return False
    try:
        return chat.rendered(other) == chat.rendered(messages)
    except TemplateError:
        return False  # the template rejects the changed messages, so it reads them


def _without(message: Message, name: str) -> Message:
    fields: Json = {n: v for n, v in message.fields.items() if n != name}
    if name in fields.get(ARGUMENTS, {}):
        fields[ARGUMENTS] = {n: v for n, v in fields[ARGUMENTS].items() if n != name}
    return replace(message, fields=fields)
