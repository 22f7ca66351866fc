"""Encodes messages with the model's own chat template, with two guarantees that templates do not give.

* Text written by a user, the system or a tool never becomes a control token: `<|im_end|>` inside a question is encoded
  as ordinary characters. Assistant text may contain visible added tokens (`<think>`), but not special ones.
* The prompt of each assistant turn is a prefix of the whole conversation, so training sees what sampling sees.

A conversation whose text contains a control token is rendered with placeholders for its texts, each control token
written by the *template* is replaced by a random alias, and the texts are put back. The result is encoded by a copy of
the tokenizer that knows control tokens only by their aliases. All other conversations are encoded by the tokenizer
itself.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

from posttrain.types import DataError, Json, Message, Role, TemplateError

_PROBE = (Message("user", "a"), Message("assistant", "b"))


class ChatFormat:
    """Encodes messages for one tokenizer.

    `format="chat"` uses the tokenizer's template; `format="plain"` uses the user message as it is, after BOS if the
    model has one. `bos` is the id that every row starts with (None if the model's own encoding has none), and
    `stop_ids` are the ids that end an assistant turn.
    """

    def __init__(self, tokenizer: Any, format: Literal["chat", "plain"] = "chat") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TemplateError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json), which is needed to locate each "
                "token in the text. Save the tokenizer in the fast format."
            )
        if format == "chat" and not tokenizer.chat_template:
            raise TemplateError(
                "the tokenizer has no chat template, so messages cannot be formatted for the model. "
                'Set data.format = "plain" to use each question as it is.'
            )
        self.format = format
        self._tokenizer = tokenizer
        self._native = cast(Tokenizer, Tokenizer.from_str(backend.to_str()))  # a copy: no truncation, no padding
        self._native.no_truncation()
        self._native.no_padding()
        added = self._native.get_added_tokens_decoder()
        self._special = {t.content for t in added.values() if t.special} | {
            t for t in (tokenizer.bos_token, tokenizer.eos_token) if t
        }
        self._added = {t.content: i for i, t in added.items()}
        self._find_special = _alternation(self._special)
        self._find_added = _alternation(self._added)
        self._aliases = {text: f"\ue000{secrets.token_hex(8)}{i}\ue001" for text, i in self._added.items()}
        self._eos = cast("int | None", tokenizer.eos_token_id)
        self.bos = self._native_bos()
        self.stop_ids: tuple[int, ...] = self._stop_ids()

    @cached_property
    def _aliased(self) -> Tokenizer:
        return _aliased_tokenizer(self._native, self._aliases, self._added)

    def prompt_tokens(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids [L] int32 of the prompt, up to where the completion begins."""
        if self.format == "plain":
            return self._with_bos(self._encode_text(self._plain_prompt(messages), self._added))
        aliased = self._needs_aliases(messages)
        ids, _ = self._encode(self._render(messages, True, aliased), aliased)
        return self._checked(ids)

    def continuation_tokens(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids [n] int32 to append after an assistant turn that ended with a stop token: what the template writes after
        that token, the new messages, and the beginning of the next assistant turn.

        The earlier turns are not encoded again, so a template cannot change them.
        """
        if self.format == "plain":
            raise TemplateError(
                'data.format = "plain" has no turns, so no message can follow a reply. Use data.format = "chat".'
            )
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        probe = (_PROBE[0], Message("assistant", mark), *messages)
        aliased = self._needs_aliases(messages)
        _, found, after = self._render(probe, True, aliased).partition(mark)
        ids, _ = self._encode(after, aliased)
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        if not found or stop is None:
            raise TemplateError(
                "the chat template does not end an assistant's turn with a stop token, so another turn cannot follow. "
                "Let the template write eos_token after each reply."
            )
        return np.array(ids[stop + 1 :], dtype=np.int32)

    def knows(self, role: Role) -> bool:
        """Whether the template accepts a message of this role after a reply and includes its text."""
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        try:
            return mark in self._apply(["a", "b", mark], (*_PROBE, Message(role, mark)), True)
        except TemplateError:
            return False

    def conversation_tokens(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [L] int32 and a mask [L] that is True on the assistant's tokens, end-of-turn token included.

        What the template writes after that token (often a line break) is not trained. Raises TemplateError if the
        template rewrites earlier turns, or ends a turn without a token that stops generation.
        """
        if not any(m.role == "assistant" for m in messages):
            raise DataError(
                f"a conversation of {len(messages)} messages has no assistant turn, so there is nothing to train on."
            )
        if self.format == "plain":
            return self._plain_conversation(messages)
        aliased = self._needs_aliases(messages)
        text = self._render(messages, False, aliased)
        ids, offsets = self._encode(text, aliased)
        tokens = self._checked(ids)
        starts = np.array([a for a, _ in offsets])
        ends = np.array([b for _, b in offsets])
        mask = np.zeros(len(tokens), dtype=bool)
        for k, message in enumerate(messages):
            if message.role == "assistant":
                first, last = self._turn(messages, k, text, aliased)
                region = np.flatnonzero((starts >= first) & (ends <= last))
                stops = np.flatnonzero(np.isin(tokens[region], self.stop_ids))
                if not len(stops):
                    raise TemplateError(
                        f"the chat template ends assistant message {k + 1} without a token that stops generation, so "
                        "the model would never learn to stop. Let the template write eos_token after each reply."
                    )
                mask[region[: stops[-1] + 1]] = True
        return tokens, mask

    def answer_marks(
        self, messages: Sequence[Message], marks: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encodes a conversation that ends with an assistant message, and maps positions in that message to tokens.

        Returns the ids [L] int32 up to the end-of-turn token and, for each character position in `marks`, the number
        of tokens that begin before it and the number that end at or before it, both [len(marks)]. A step that ends at
        a mark has its last token at `begun - 1`. Raises TemplateError if the template changes the message's text.
        """
        tokens, mask = self.conversation_tokens(messages)
        tokens, answer = tokens[: np.flatnonzero(mask)[-1] + 1], messages[-1]
        aliased = self.format == "plain" or self._needs_aliases(messages)
        shown = self._alias_allowed(answer.content, answer) if aliased else answer.content
        if self.format == "plain":
            before, start, text = int(mask.argmax()), 0, shown
        else:
            text = self._render(messages, False, aliased)
            first, last = self._turn(messages, len(messages) - 1, text, aliased)
            start = text.find(shown.strip(), first, last) - (len(shown) - len(shown.lstrip()))
            before = 0
            if shown.strip() not in text[first:last]:
                raise TemplateError(
                    "the chat template changes the assistant's text, so its steps cannot be located. Use another one."
                )
        _, offsets = self._encode(text, aliased)
        heads = [answer.content[:mark] for mark in marks]
        places = np.array([start + len(self._alias_allowed(head, answer) if aliased else head) for head in heads], int)
        begun = np.searchsorted([a for a, _ in offsets], places, side="left")
        ended = np.searchsorted([b for _, b in offsets], places, side="right")
        return tokens, before + begun, before + ended

    def text_tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """BOS (if the model has one), text and EOS as ids [L] int32; the mask [L] is False on the first token only."""
        tokens = self._with_bos([*self._encode_text(text, self._special), *self._stop()])
        mask = np.ones(len(tokens), dtype=bool)
        mask[0] = False
        return tokens, mask

    @property
    def longest_token(self) -> int:
        """Characters that one token can stand for, at most; 0 if an unknown token can stand for any text."""
        model = self._native.model
        bounded = isinstance(model, BPE) and (model.byte_fallback or not (model.unk_token and model.fuse_unk))
        return max(map(len, self._native.get_vocab())) if bounded else 0

    def decode(self, tokens: np.ndarray | Sequence[int]) -> str:
        """Decodes generated ids; special tokens are left out, visible added tokens (`<think>`) are kept."""
        return self._native.decode([int(t) for t in tokens], skip_special_tokens=True)

    def _turn(self, messages: Sequence[Message], k: int, text: str, aliased: bool) -> tuple[int, int]:
        """Start and end of assistant message k in `text`. Raises TemplateError if an earlier turn was rewritten."""
        before = self._render(messages[:k], True, aliased)
        after = self._render(messages[: k + 1], False, aliased)
        if not (after.startswith(before) and text.startswith(after)):
            raise TemplateError(
                f"the chat template rewrites earlier turns: the first {k + 1} messages alone are rendered differently "
                "than in the whole conversation. Train on single turns, or use a template that only appends."
            )
        return len(before), len(after)

    def _render(self, messages: Sequence[Message], generation: bool, aliased: bool) -> str:
        """Renders the template; with `aliased`, control tokens written by the template get their aliases."""
        if not aliased:
            return self._apply([m.content for m in messages], messages, generation)
        marks = [f"\ue000{secrets.token_hex(8)}\ue001" for _ in messages]
        hidden = [mark if self._has_control_token(m) else m.content for mark, m in zip(marks, messages, strict=True)]
        skeleton = self._apply(hidden, messages, generation)
        plain = self._apply([m.content for m in messages], messages, generation)
        for trimmed in ((), ("user", "system", "tool"), ("assistant",), ("user", "system", "tool", "assistant")):
            contents = [m.content.strip() if m.role in trimmed else m.content for m in messages]
            if _substitute(skeleton, marks, contents) == plain:
                safe = [self._alias_allowed(c, m) for c, m in zip(contents, messages, strict=True)]
                return _substitute(self._alias(skeleton, self._added), marks, safe)
        raise TemplateError(
            "a message contains the text of a control token, and the chat template changes that message, so the token "
            "cannot be escaped. Remove it from the text."
        )

    def _apply(self, contents: Sequence[str], messages: Sequence[Message], generation: bool) -> str:
        rows: list[Json] = []
        for content, m in zip(contents, messages, strict=True):
            calls = {"tool_calls": [dict(c) for c in m.tool_calls]} if m.tool_calls else {}
            rows.append({"role": m.role, "content": content, **calls})
        try:
            text = self._tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generation)
        except Exception as error:  # templates can raise anything; it always means that they reject these messages
            roles = ", ".join(m.role for m in messages)
            raise TemplateError(f"the chat template rejects messages with roles {roles}: {error}") from error
        return cast(str, text)

    def _has_control_token(self, message: Message) -> bool:
        """Whether encoding the message with the model's tokenizer would produce a token its author may not write.

        Raises TemplateError if a tool call contains such a token, because templates format calls in ways that make it
        indistinguishable from their own control tokens.
        """
        assistant = message.role == "assistant"
        calls = json.dumps([dict(c) for c in message.tool_calls], ensure_ascii=False, default=str)
        if found := self._find_special.search(calls):
            raise TemplateError(
                f"a tool call contains the text of the control token {found.group()!r}, which would become that token. "
                "Remove it from the call."
            )
        pattern = self._find_special if assistant else self._find_added
        if pattern.search(message.content):
            return True
        names = self._special if assistant else self._added
        banned = {self._added[n] for n in names if n in self._added and n != self._tokenizer.unk_token}
        # A normalizer may turn other text into a control token, e.g. by lower-casing; only encoding reveals that.
        return not banned.isdisjoint(self._native.encode(message.content, add_special_tokens=False).ids)

    def _needs_aliases(self, messages: Sequence[Message]) -> bool:
        return any(self._has_control_token(m) for m in messages)

    def _alias(self, text: str, names: Any) -> str:
        return _alternation(names).sub(lambda m: self._aliases[m.group()], text) if names else text

    def _alias_allowed(self, content: str, message: Message) -> str:
        """Replaces the added tokens that the message's author may write with their aliases."""
        if message.role != "assistant":
            return content
        return self._alias(content, [name for name in self._added if name not in self._special])

    def _encode(self, text: str, aliased: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = (self._aliased if aliased else self._native).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _encode_text(self, text: str, banned: Any) -> list[int]:
        """Encodes text without a template; tokens in `banned` are not recognised."""
        allowed = [name for name in self._added if name not in banned]
        return self._aliased.encode(self._alias(text, allowed), add_special_tokens=False).ids

    def _native_bos(self) -> int | None:
        """The BOS id if the model's own encoding starts rows with it. A role marker that is also BOS does not count."""
        bos = cast("int | None", self._tokenizer.bos_token_id)
        if bos is None:
            return None
        if not self._tokenizer.chat_template:
            return bos if self._adds_bos(bos) or bos != self._eos else None
        ids, _ = self._encode(self._render(_PROBE[:1], True, False), False)
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

    def _checked(self, ids: list[int]) -> np.ndarray:
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
        """EOS, and the special tokens that the template writes after the text of an assistant turn."""
        found = {self._eos} if self._eos is not None else set()
        if self.format == "chat":
            before, after = self._render(_PROBE[:1], True, False), self._render(_PROBE, False, False)
            tail = after[len(before) :] if after.startswith(before) else ""
            found |= {self._added[m.group()] for m in self._find_special.finditer(tail) if m.group() in self._added}
        return tuple(sorted(found))

    def _plain_prompt(self, messages: Sequence[Message]) -> str:
        if [m.role for m in messages] != ["user"]:
            roles = ", ".join(m.role for m in messages)
            raise TemplateError(
                f'data.format = "plain" takes a single user message, but the task has messages with roles {roles}. '
                'Leave data.system empty, or use data.format = "chat".'
            )
        return messages[0].content

    def _plain_conversation(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        prompt = self.prompt_tokens(messages[:-1])
        reply = np.array([*self._encode_text(messages[-1].content, self._special), *self._stop()], dtype=np.int32)
        tokens = np.concatenate([prompt, reply])
        return tokens, np.arange(len(tokens)) >= len(prompt)


def _alternation(names: Any) -> re.Pattern[str]:
    """A pattern that matches any of the names, longest first; without names it matches nothing."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _substitute(text: str, marks: Sequence[str], contents: Sequence[str]) -> str:
    for mark, content in zip(marks, contents, strict=True):
        text = text.replace(mark, content)
    return text


def _aliased_tokenizer(native: Tokenizer, aliases: dict[str, str], ids: dict[str, int]) -> Tokenizer:
    """A copy of the tokenizer in which every added token has its alias, also in the model's vocabulary."""
    state: Json = json.loads(native.to_str())
    for token in state["added_tokens"]:
        # Aliases are matched in the raw text, before any normalizer could change them.
        token.update(content=aliases[token["content"]], normalized=False, single_word=False)
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {aliases.get(piece, piece): i for piece, i in vocab.items()}
    else:  # Unigram: [piece, score] by id
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = ((m if isinstance(m, list) else m.split(" ", 1)) for m in model["merges"])
        model["merges"] = [p for p in pairs if aliases.keys().isdisjoint((p[0], p[1], p[0] + p[1]))]
    state["post_processor"] = None  # it refers to the original tokens; ChatFormat adds BOS and EOS itself
    aliased = cast(Tokenizer, Tokenizer.from_str(json.dumps(state)))
    if any(aliased.token_to_id(aliases[name]) != i for name, i in ids.items()):
        raise TemplateError("the tokenizer's added tokens are not numbered consistently. Save the tokenizer again.")
    return aliased
