"""Encodes messages with the model's own chat template, with three guarantees that templates do not give.

* Text written by a user, the system or a tool never becomes a control token: `<|im_end|>` inside a question is encoded
  as ordinary characters. Assistant text may contain visible added tokens (`<think>`), but not special ones.
* What is trained is, id for id, what the sampler is prompted with plus what it would write, up to its stop token.
* All of an assistant's text is in the tokens that are trained; a template that leaves some out is refused.

A conversation whose text contains a control token is rendered with placeholders for its texts, each control token
written by the *template* is replaced by a random alias, and the texts are put back. The result is encoded by a copy of
the tokenizer that knows control tokens only by their aliases. All other conversations are encoded by the tokenizer
itself (posttrain/data/control_tokens.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import date
from typing import Any, Literal, cast

import numpy as np
from tokenizers.models import BPE

from posttrain.data.control_tokens import ControlTokens, Offsets, private_mark
from posttrain.data.messages import is_trained, without_prefill
from posttrain.data.stops import stop_ids
from posttrain.data.templates import PROBE, Template
from posttrain.data.thoughts import shown_text
from posttrain.data.turns import Prompt, Turn, Turns
from posttrain.types import DataError, JsonView, Message, Role, TemplateError

Row = tuple[np.ndarray, np.ndarray]
"""Ids [L] int32 of a row, and its mask [L] of trained tokens."""
REMEMBERED = 2**15  # prompts


class ChatFormat:
    """Encodes messages for one tokenizer.

    `format="chat"` uses the tokenizer's template; `format="plain"` uses the user message as it is, after BOS if the
    model has one. `arguments` are given to the template each time (`data.template_kwargs`), and `day` is the date it
    reads, today by default. `bos` is the id that every row starts with (None if the model's own encoding has none), and
    `stop_ids` are the ids that end an assistant turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        format: Literal["chat", "plain"] = "chat",
        arguments: JsonView | None = None,
        day: date | None = None,
    ) -> None:
        self._control = ControlTokens(tokenizer)
        self._native = self._control.native
        if format == "chat" and not tokenizer.chat_template:
            raise TemplateError(
                "the tokenizer has no chat template, so messages cannot be formatted for the model. "
                'Set data.format = "plain" to use each question as it is.'
            )
        if format == "plain" and arguments:
            raise TemplateError('data.format = "plain" uses no chat template, so it has no data.template_kwargs.')
        self.format = format
        self.day = day or date.today()
        self.arguments = dict(arguments or {})
        self._tokenizer = tokenizer
        self._template = Template(tokenizer, self._control, self.arguments, self.day)
        self._eos = cast("int | None", tokenizer.eos_token_id)
        self.bos = self._native_bos()
        self.stop_ids: tuple[int, ...] = self._stop_ids()
        self._turns = Turns(self._template, self._control, self.stop_ids)
        self._prompts: dict[tuple[tuple[Message, ...], bool, bool], Prompt] = {}

    @property
    def dated(self) -> bool:
        """Whether the template writes the date."""
        return self.format == "chat" and self._template.mentions("strftime_now")

    def about(self) -> dict[str, str]:
        """What else a model's input depends on, to save with a scalar head: the template's arguments and its date."""
        given = {"template_kwargs": json.dumps(self.arguments)} if self.arguments else {}
        return given | ({"day": self.day.isoformat()} if self.dated else {})

    def prompt_tokens(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids [L] int32 of the prompt, up to where the completion begins. A last assistant message is continued."""
        if self.format == "plain":
            asked = without_prefill(messages)
            ids = self._encode_text(self._plain_prompt(asked), self._control.added)
            begun = [i for m in messages[len(asked) :] for i in self._encode_text(m.content, self._control.special)]
            return self._with_bos([*ids, *begun])
        return self._checked(self._prompt(messages).ids)

    def opening(self, messages: Sequence[Message]) -> str:
        """The beginning of the assistant's text that is in the prompt already: a thought that the template opens, such
        as `<think>`, and the text of a last assistant message. A verifier reads it in front of the completion."""
        if self.format == "plain":
            return "".join(m.content for m in messages[len(without_prefill(messages)) :])
        prompt = self._prompt(messages)
        return prompt.opened + prompt.begun

    def continuation_tokens(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids [n] int32 to append after an assistant turn that ended with a stop token: what the template writes after
        that token, the new messages, and the beginning of the next assistant turn.

        The earlier turns are not encoded again, so a template cannot change them.
        """
        if self.format == "plain":
            raise TemplateError(
                'data.format = "plain" has no turns, so no message can follow a reply. Use data.format = "chat".'
            )
        mark = private_mark()
        probe = (PROBE[0], Message("assistant", mark), *messages)
        aliased = self._needs_aliases(messages)
        _, found, after = self._render(probe, True, aliased).partition(mark)
        ids, _ = self._encode(after, aliased)
        ends = {*self.stop_ids}  # some templates end an earlier turn with another token than the last (GPT-OSS)
        special = {self._control.added[name] for name in self._control.special if name in self._control.added}
        stop = next((i for i, token in enumerate(ids) if token in ends or token in special), None)
        if not found or stop is None:
            raise TemplateError(
                "the chat template does not end an assistant's turn with a stop token, so another turn cannot follow. "
                "Let the template write eos_token after each reply."
            )
        return np.array(ids[stop + 1 :], dtype=np.int32)

    def knows(self, role: Role) -> bool:
        """Whether the template accepts a message of this role after a reply and includes its text."""
        return self._template.reads(role)

    def rendered(self, messages: Sequence[Message]) -> str:
        """The conversation as the template writes it, to compare with another one."""
        return self._render(messages, False, False) if self.format == "chat" else messages[-1].content

    def rows(self, messages: Sequence[Message], turns: Collection[int] | None = None) -> list[Row]:
        """Rows that train assistant messages, by default all whose `weight` is not 0; `turns` are their indices.

        It is one row if the template writes the conversation as a sequence of prompts and replies. If it rewrites
        earlier turns (thoughts are left out, the prompt of a reply is not how it begins later on), it is one row for
        each of these messages: the prompt, and the reply as the template writes it last. A mask is True on replies, up
        to and including the first token that stops generation. Raises DataError if there is no assistant message, and
        TemplateError if one cannot be trained.
        """
        if not any(m.role == "assistant" for m in messages):
            raise DataError(
                f"a conversation of {len(messages)} messages has no assistant turn, so there is nothing to train on."
            )
        if self.format == "plain":
            return [self._plain_conversation(messages)]
        wanted = [k for k, m in enumerate(messages) if is_trained(m)] if turns is None else sorted(turns)
        aliased = self._needs_aliases(messages)
        text = self._render(messages, False, aliased)
        found = [self._turn(messages, k, aliased, text) for k in wanted]
        ids, offsets = self._encode(text, aliased)
        spans = [turn.within(text, ids, offsets) for turn in found]
        if all(span is not None for span in spans):
            tokens = self._checked(ids)
            mask = np.zeros(len(tokens), dtype=bool)
            for first, last in cast("list[tuple[int, int]]", spans):
                mask[first:last] = True
            return [(tokens, mask)]
        return [self._row(turn) for turn in found]

    def conversation_tokens(self, messages: Sequence[Message]) -> Row:
        """The only row of `rows`. Raises TemplateError if there are several."""
        rows = self.rows(messages)
        if len(rows) > 1:
            k = [k for k, m in enumerate(messages) if is_trained(m)][0]
            raise TemplateError(
                f"the chat template rewrites earlier turns: the first {k + 1} messages alone are rendered differently "
                "than in the whole conversation, so each turn needs a row of its own."
            )
        return rows[0]

    def answer_row(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """The row that trains only the last message, an assistant's. Its prompt is encoded once for many answers."""
        if self.format == "plain":
            return self._plain_conversation(messages)
        aliased = self._needs_aliases(messages)
        return self._row(self._turn(messages, len(messages) - 1, aliased))

    def answer_marks(
        self, messages: Sequence[Message], marks: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encodes a conversation that ends with an assistant message, and maps positions in that message to tokens.

        Returns the ids [L] int32 up to the end-of-turn token and, for each character position in `marks`, the number
        of tokens that begin before it and the number that end at or before it, both [len(marks)]. A step that ends at
        a mark has its last token at `begun - 1`. Raises TemplateError if the template changes the message's text.
        """
        answer = messages[-1]
        if self.format == "plain":
            tokens, mask = self._plain_conversation(messages)
            before, start = int(mask.argmax()), 0
            offsets = self._encode(self._control.alias_allowed(answer.content, answer), True)[1]
            aliased = True
        else:
            aliased = self._needs_aliases(messages)
            turn = self._turn(messages, len(messages) - 1, aliased)
            tokens, before, offsets = self._checked([*turn.prompt.ids, *turn.ids]), len(turn.prompt.ids), turn.offsets
            start = turn.starts_at(self._shown(answer.content, answer, aliased)) if marks else 0
        heads = [answer.content[:mark] for mark in marks]
        places = np.array([start + len(self._shown(head, answer, aliased)) for head in heads], int)
        begun = np.searchsorted([a for a, _ in offsets], places, side="left")
        ended = np.searchsorted([b for _, b in offsets], places, side="right")
        return tokens, before + begun, before + ended

    def text_tokens(self, text: str) -> Row:
        """BOS (if the model has one), text and EOS as ids [L] int32; the mask [L] is False on the first token only."""
        tokens = self._with_bos([*self._encode_text(text, self._control.special), *self._stop()])
        mask = np.ones(len(tokens), dtype=bool)
        mask[0] = False
        return tokens, mask

    def written_tokens(self, text: str) -> list[int]:
        """Ids of a piece of the assistant's text, with the tags of thoughts as the tokens that the model writes."""
        return self._encode_text(text, self._control.special)

    @property
    def longest_token(self) -> int:
        """Characters that one token can stand for, at most; 0 if an unknown token can stand for any text."""
        model = self._native.model
        bounded = isinstance(model, BPE) and (model.byte_fallback or not (model.unk_token and model.fuse_unk))
        return max(map(len, self._native.get_vocab())) if bounded else 0

    def decode(self, tokens: np.ndarray | Sequence[int]) -> str:
        """Decodes generated ids; special tokens are left out, visible added tokens (`<think>`) are kept."""
        return shown_text(self._native, tokens)

    def _prompt(self, messages: Sequence[Message], aliased: bool | None = None, continues: bool = True) -> Prompt:
        """The encoded prompt; prompts are remembered, so that two answers share one.

        With `continues`, the completion continues a last assistant message; else it is a turn after that message.
        """
        aliased = self._needs_aliases(messages) if aliased is None else aliased
        continues = continues and messages[-1].role == "assistant"
        key = (tuple(messages), aliased, continues)
        try:
            if (known := self._prompts.get(key)) is not None:
                return known
        except TypeError:  # tool calls cannot be hashed
            return self._turns.prompt(*key)
        if len(self._prompts) >= REMEMBERED:
            self._prompts.clear()
        self._prompts[key] = self._turns.prompt(*key)
        return self._prompts[key]

    def _turn(self, messages: Sequence[Message], k: int, aliased: bool, whole: str | None = None) -> Turn:
        after = whole if k == len(messages) - 1 else None
        return self._turns.turn(self._prompt(messages[:k], aliased, continues=False), messages[k], k, after)

    def _row(self, turn: Turn) -> Row:
        """The row of one turn: its prompt, its reply and what the template writes after it, which is not trained."""
        tokens = self._checked([*turn.prompt.ids, *turn.ids, *turn.rest])
        places, first = np.arange(len(tokens)), len(turn.prompt.ids)
        return tokens, (places >= first) & (places < first + len(turn.ids))

    def _render(self, messages: Sequence[Message], generation: bool, aliased: bool) -> str:
        return self._template.render(messages, generation, aliased)

    def _needs_aliases(self, messages: Sequence[Message]) -> bool:
        return any([self._control.written_in(m) for m in messages])  # all of them, as each may raise an error

    def _shown(self, content: str, message: Message, aliased: bool) -> str:
        return self._control.alias_allowed(content, message) if aliased else content

    def _encode(self, text: str, aliased: bool) -> tuple[list[int], Offsets]:
        return self._control.encode(text, aliased)

    def _encode_text(self, text: str, banned: Collection[str]) -> list[int]:
        return self._control.encode_text(text, banned)

    def _native_bos(self) -> int | None:
        """The BOS id if the model's own encoding starts rows with it. A role marker that is also BOS does not count."""
        bos = cast("int | None", self._tokenizer.bos_token_id)
        if bos is None:
            return None
        if not self._tokenizer.chat_template:
            return bos if self._adds_bos(bos) or bos != self._eos else None
        ids, _ = self._encode(self._render(PROBE[:1], True, False), False)
        written = ids.count(bos)
        if ids[:2] == [bos, bos] or (written > 1 and self._adds_bos(bos)):
            raise self._bos_error(written)
        return bos if written == 1 and ids[0] == bos else None

    def _adds_bos(self, bos: int) -> bool:
        return self._native.encode("a").ids[:1] == [bos]

    def _bos_error(self, count: int) -> TemplateError:
        return TemplateError(
            f"the chat template writes the beginning-of-sequence token {self._tokenizer.bos_token!r} {count} times, "
            "expected once, at the start. Remove it from the template's turns."
        )

    def _checked(self, ids: Sequence[int]) -> np.ndarray:
        if self.bos is not None and (ids.count(self.bos) != 1 or ids[0] != self.bos):
            raise self._bos_error(ids.count(self.bos))
        if not ids:
            raise TemplateError("the chat template renders these messages as an empty text. Check the template.")
        return np.array(ids, dtype=np.int32)

    def _with_bos(self, ids: list[int]) -> np.ndarray:
        ids = [self.bos, *ids] if self.bos is not None else ids
        if not ids:
            raise DataError("an empty text gives no tokens, because this tokenizer has no BOS. Remove the row.")
        return np.array(ids, dtype=np.int32)

    def _stop(self) -> list[int]:
        if self._eos is None:
            raise TemplateError("the tokenizer has no eos_token to end texts with. Set one in the tokenizer.")
        return [self._eos]

    def _stop_ids(self) -> tuple[int, ...]:
        """EOS, and the special tokens with which the template ends an assistant turn."""
        found = {self._eos} if self._eos is not None else set[int]()
        if self.format == "chat":
            found |= stop_ids(self._template, self._control, found)
        return tuple(sorted(found))

    def _plain_prompt(self, messages: Sequence[Message]) -> str:
        if [m.role for m in messages] != ["user"]:
            roles = ", ".join(m.role for m in messages)
            raise TemplateError(
                f'data.format = "plain" takes a single user message, but the task has messages with roles {roles}. '
                'Leave data.system empty, or use data.format = "chat".'
            )
        return messages[0].content

    def _plain_conversation(self, messages: Sequence[Message]) -> Row:
        prompt = self.prompt_tokens(messages[:-1])
        content = messages[-1].content
        reply = np.array([*self._encode_text(content, self._control.special), *self._stop()], dtype=np.int32)
        tokens = np.concatenate([prompt, reply])
        return tokens, np.arange(len(tokens)) >= len(prompt)
