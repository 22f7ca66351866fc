"""Prompts and replies as token ids: what the sampler is prompted with, and what it would write.

The reply's ids are those of prompt and reply encoded together, as long as these begin with the prompt's. Where the
reply's first characters would merge with the prompt's last token (a line break after a line break), the two are encoded
apart, as the sampler does.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from posttrain.data.control_tokens import ControlTokens, Offsets, private_mark
from posttrain.data.messages import thought_of, without_prefill
from posttrain.data.templates import Template, common_prefix, missing_text, written_part
from posttrain.types import Message, TemplateError

_SWITCHES = re.compile(r"/(?:no_)?think\b|/system_override\b")
"""Words in a message that some templates read and leave out (SmolLM3, Nemotron)."""
NEIGHBOURS = "\n.0a"
"""Characters to encode a reply after, one of which it does not merge with, if it cannot be encoded alone."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """The rendered messages with the beginning of an assistant turn.

    `text` has aliases for control tokens if `aliased`; `opened` is a thought that the template opens in the prompt;
    `begun` is the text of a last assistant message, which the completion continues.
    """

    messages: tuple[Message, ...]
    text: str
    aliased: bool
    begun: str
    control: ControlTokens
    template: Template

    @cached_property
    def ids(self) -> list[int]:
        return self.control.encode(self.text, self.aliased)[0]

    @cached_property
    def tail(self) -> tuple[int, list[int]]:
        """Where the text's last control token begins, and the ids from there on, which depend on nothing before."""
        start = self.control.last_in(self.text, self.aliased)
        ids = self.control.encode(self.text[start:], self.aliased)[0] if start else self.ids
        if start and ids[0] not in self.control.ids:  # its text is there, but the tokenizer does not take it as one
            return 0, self.ids
        return start, ids

    @cached_property
    def opened(self) -> str:
        asked = without_prefill(self.messages) if self.begun else self.messages
        if self.aliased or self.begun:
            return self.template.opened_in(self.template.render(asked, True, False), asked)
        return self.template.opened_in(self.text, asked)


@dataclass(frozen=True, eq=False)
class Turn:
    """A reply to a prompt: its text and ids up to and including the first stop token, the ids' offsets in the text, and
    the ids that the template writes after it (`rest`)."""

    prompt: Prompt
    text: str
    ids: list[int]
    offsets: Offsets
    rest: list[int]

    def within(self, whole: str, ids: list[int], offsets: Offsets) -> tuple[int, int] | None:
        """The places of the reply's ids in a longer conversation, whose ids and their offsets are given; None if
        the conversation does not continue this prompt and this reply token by token."""
        before = self.prompt.text
        if not (whole.startswith(before) and whole.startswith(self.text, len(before))):
            return None
        starts = [start for start, _ in offsets]
        tail, begun = self.prompt.tail
        first, last = bisect_left(starts, tail), bisect_left(starts, len(before))
        end = last + len(self.ids)
        return (last, end) if ids[first:last] == begun and ids[last:end] == self.ids else None

    def starts_at(self, shown: str) -> int:
        """Where the message's text `shown` begins in the reply; negative if it begins in the prompt."""
        control, aliased = self.prompt.control, self.prompt.aliased
        opened = self.prompt.opened
        opened = control.alias(opened, control.added) if aliased else opened
        text = opened + self.text[: self.offsets[-1][0]]
        at = text.rfind(shown.strip())
        if at < 0:
            raise TemplateError(
                "the chat template changes the assistant's text, so its steps cannot be located. Use another one."
            )
        return at - len(opened) - (len(shown) - len(shown.lstrip()))


class Turns:
    """Renders and encodes prompts and the replies to them."""

    def __init__(self, template: Template, control: ControlTokens, stop_ids: Sequence[int]) -> None:
        self._template, self._control, self._stops = template, control, frozenset(stop_ids)

    def prompt(self, messages: tuple[Message, ...], aliased: bool, continues: bool) -> Prompt:
        """The prompt; with `continues`, the completion continues the text of the last message, an assistant's."""
        asked = without_prefill(messages) if continues else messages
        text = self._template.render(asked, True, aliased)
        self._require_words(text, asked)
        begun = ""
        if continues:
            if messages[-1].tool_calls:
                raise TemplateError("the last message of a prompt calls tools, so a completion cannot continue it.")
            bare = Prompt(asked, text, aliased, "", self._control, self._template)
            body = _after_opening(bare.opened, messages[-1].content)
            begun = messages[-1].content if body is None else body
            text += self._control.alias_allowed(begun, messages[-1]) if aliased else begun
        return Prompt(messages, text, aliased, begun, self._control, self._template)

    def turn(self, prompt: Prompt, message: Message, k: int, after: str | None = None) -> Turn:
        """Message k as a reply to the prompt. `after` is the conversation up to it, if it has been rendered already."""
        whole = (*prompt.messages, message)
        after = self._template.render(whole, False, prompt.aliased) if after is None else after
        reply = after[len(prompt.text) :] if after.startswith(prompt.text) else None
        if reply is not None and not self._missing(prompt, message, reply):
            return self._encoded(prompt, reply, k)
        mark = private_mark()
        probe = self._template.render((*prompt.messages, replace(message, content=mark)), False, prompt.aliased)
        if mark not in probe:
            raise _left_out(message.content, k) if message.content.strip() else _unclear(k)
        opened = prompt.opened
        body = _after_opening(opened, message.content)
        if body is not None:  # the template opened this thought in the prompt; the sampler writes what follows
            body = self._control.alias_allowed(body, message) if prompt.aliased else body
            reply = body + probe[probe.find(mark) + len(mark) :]
        elif reply is None:
            if opened and thought_of(message):
                raise _apart(opened, k)
            reply = self._separated(prompt, after, probe, mark, k)
        if missing := self._missing(prompt, message, reply):
            raise _left_out(missing, k)
        return self._encoded(prompt, reply, k)

    def _separated(self, prompt: Prompt, after: str, probe: str, mark: str, k: int) -> str:
        """What the template writes for message k where it renders the prompt differently once a reply follows."""
        if prompt.opened:
            raise TemplateError(
                f"the chat template opens each reply with {prompt.opened!r}, but assistant message {k + 1} has no such "
                "thought. Write the thought in its text, or turn thinking off with data.template_kwargs if the "
                "template can."
            )
        same = common_prefix(prompt.text, probe)
        last = prompt.messages[-1].content.strip()
        if prompt.text.rfind(last) + len(last) <= same:
            start = same  # the prompt ends with more than the turn begins with, such as an empty thought
        else:
            header = written_part(prompt.text, probe, mark)
            if header is None or (last and last not in probe[: probe.find(mark) - len(header)]):
                raise _unclear(k)
            start = probe.find(mark) - len(header)
        if after[:start] != probe[:start]:
            raise _unclear(k)
        return after[start:]

    def _missing(self, prompt: Prompt, message: Message, reply: str) -> str:
        """A part of the message's text that is not in the reply; empty if all of it is."""
        return missing_text(message, self._control.unalias(reply) if prompt.aliased else reply)

    def _encoded(self, prompt: Prompt, reply: str, k: int) -> Turn:
        ids, offsets = self._reply_ids(prompt, reply)
        stop = next((i for i, token in enumerate(ids) if token in self._stops), None)
        if stop is None:
            raise TemplateError(
                f"the chat template ends assistant message {k + 1} without a token that stops generation, so "
                "the model would never learn to stop. Let the template write eos_token after each reply."
            )
        cut = stop + 1
        return Turn(prompt, reply[: offsets[stop][1]], ids[:cut], offsets[:cut], ids[cut:])

    def _reply_ids(self, prompt: Prompt, reply: str) -> tuple[list[int], Offsets]:
        """The ids that the sampler writes for the reply, with offsets in it."""
        encode, aliased = self._control.encode, prompt.aliased
        start, begun = prompt.tail
        tail = prompt.text[start:]
        joint, offsets = encode(tail + reply, aliased)
        if joint[: len(begun)] == begun:
            return joint[len(begun) :], [(a - len(tail), b - len(tail)) for a, b in offsets[len(begun) :]]
        decode = self._control.native.decode
        expected = decode(joint, skip_special_tokens=False)
        # Some tokenizers put a space before the first word of a text, others also after a control token.
        control = next(iter(sorted(self._control.special & self._control.added.keys())), "")
        control = self._control.in_text(control, aliased) if control else ""
        for lead in dict.fromkeys((control, "", *(control + neighbour for neighbour in NEIGHBOURS))):
            apart, (ids, offsets) = encode(lead, aliased)[0], encode(lead + reply, aliased)
            skip = len(apart)
            if ids[:skip] == apart and decode([*begun, *ids[skip:]], skip_special_tokens=False) == expected:
                return ids[skip:], [(max(0, a - len(lead)), b - len(lead)) for a, b in offsets[skip:]]
        raise TemplateError(
            f"the beginning of a reply, {reply[:20]!r}, is one token together with the end of its prompt, so the model "
            "could not write it. Change the beginning of the reply."
        )

    def _require_words(self, text: str, messages: Sequence[Message]) -> None:
        """Raises TemplateError if the prompt leaves out what the system or the user wrote."""
        for message in messages:
            content = message.content.strip()
            if message.role not in ("system", "user") or content in text:
                continue
            words = _plain(_SWITCHES.sub("", content))
            escaped = _plain(json.dumps(content, ensure_ascii=False)[1:-1])
            shown = _plain(text)
            if words not in shown and escaped not in shown:
                raise TemplateError(
                    f"the chat template leaves out the {message.role} message {content[:40]!r}, or changes its words. "
                    "Use a template that writes it, or remove it."
                )


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()


def _unclear(k: int) -> TemplateError:
    return TemplateError(
        f"the chat template writes the prompt differently once assistant message {k + 1} follows, and where the "
        "message begins cannot be told. Use another template."
    )


def _apart(opened: str, k: int) -> TemplateError:
    return TemplateError(
        f"the chat template opens each reply with {opened!r} and does not write the thought of assistant message "
        f"{k + 1}, which is in a field of its own. Write it in the message's text, between the tags of the template."
    )


def _left_out(text: str, k: int) -> TemplateError:
    return TemplateError(
        f"the chat template leaves out {text.strip()[:60]!r} of assistant message {k + 1}, so it would not be trained. "
        "Use a template that writes it, or remove it from the row."
    )


def _after_opening(opened: str, content: str) -> str | None:
    """The content after the beginning that the prompt opened already; None if the content does not begin with it."""
    if not opened:
        return None
    if content.startswith(opened):
        return content[len(opened) :]
    begun = opened.strip()
    if not content.lstrip().startswith(begun):
        return None
    rest = content.lstrip()[len(begun) :]
    return rest.lstrip() if opened != begun else rest
