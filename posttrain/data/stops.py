"""Finds the tokens with which a chat template ends an assistant turn."""

from __future__ import annotations

from posttrain.data.control_tokens import ControlTokens, private_mark
from posttrain.data.templates import PROBE, Template
from posttrain.types import Message, TemplateError


def stop_ids(template: Template, control: ControlTokens, known: set[int]) -> set[int]:
    """Ids of the first special token that the template writes after the text of a reply, and after a tool call.

    Special tokens before the text (`<|channel|>`, `<|START_RESPONSE|>`) are the turn's header. After a call, another
    token counts only if none of the others follows, because a template may mark the end of each of several calls.
    """
    text = _after(template, control, Message("assistant", private_mark()))
    found = known | set(text[:1])
    call = {"name": "f", "arguments": {"a": private_mark()}}
    called = {"id": "call00000", "type": "function", "function": call}
    after_call = _after(template, control, Message("assistant", "", (called,)))
    if found.isdisjoint(after_call):
        found |= set(after_call[:1])
    return found - known


def _after(template: Template, control: ControlTokens, reply: Message) -> list[int]:
    """Ids of the special tokens after the last words of a reply; none if the template does not write them."""
    try:
        whole = template.render((PROBE[0], reply), False, False)
    except TemplateError:
        return []
    words = reply.content or reply.tool_calls[0]["function"]["arguments"]["a"]
    _, _, tail = whole.rpartition(words) if words in whole else ("", "", "")
    return [control.added[m.group()] for m in control.find_special.finditer(tail) if m.group() in control.added]
