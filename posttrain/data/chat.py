"""Messages to token ids exactly as the model's own chat template makes them, with two guarantees it does not give.

* Text that a user, the system or a tool wrote never becomes a control token: `<|im_end|>` inside a question is encoded
  as the letters it is made of. Assistant text may use visible added tokens (`<think>`), never special ones.
* Each assistant turn's prompt is a prefix of the whole conversation, so what is trained is what is sampled.

How control tokens are kept out: such a conversation is rendered with placeholders for its texts, every control token
that the *template* wrote is replaced by a private name, the texts are put back, and a twin tokenizer that knows only
the private names encodes the whole. Any other conversation takes the tokenizer's own path, bit for bit.
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

from posttrain.types import DataError, Message, Role, TemplateError

_PROBE = (Message("user", "a"), Message("assistant", "b"))


class ChatFormat:
    """Encodes messages for one tokenizer.

    `format="chat"` uses the tokenizer's template; `format="plain"` feeds the last user message as it is, after BOS
    where the model has one. `bos` is the id every row starts with (None where the model's own encoding has none) and
    `stop_ids` are the ids that end an assistant turn.
    """

    def __init__(self, tokenizer: Any, format: Literal["chat", "plain"] = "chat") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TemplateError(
                f"{type(tokenizer).__name__} has no tokenizer.json behind it, which is needed to locate each token in "
                "the text. Save the tokenizer in the fast format."
            )
        if format == "chat" and not tokenizer.chat_template:
            raise TemplateError(
                "the tokenizer has no chat template, so messages cannot be written the way the model expects them. "
                'Set data.format = "plain" to feed each question as it is.'
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
        self._private = {text: f"\ue000{secrets.token_hex(8)}{i}\ue001" for text, i in self._added.items()}
        self._eos = cast("int | None", tokenizer.eos_token_id)
        self.bos = self._native_bos()
        self.stop_ids: tuple[int, ...] = self._stop_ids()

    @cached_property
    def _twin(self) -> Tokenizer:
        return _twin(self._native, self._private, self._added)

    def prompt_tokens(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids [L] int32 of what the model reads before it answers."""
        if self.format == "plain":
            return self._with_bos(self._encode_text(self._plain_prompt(messages), self._added))
        secured = self._needs_twin(messages)
        ids, _ = self._encode(self._render(messages, True, secured), secured)
        return self._checked(ids)

    def continuation_tokens(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids [n] int32 that follow an assistant's turn that ended with its stop token: what the template writes after
        that token, the messages, and the opening of the next reply.

        The reply itself is not encoded again, and what a template would do to earlier turns plays no part.
        """
        if self.format == "plain":
            raise TemplateError(
                'data.format = "plain" has no turns, so nothing can be said after a reply. Use data.format = "chat".'
            )
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        probe = (_PROBE[0], Message("assistant", mark), *messages)
        secured = self._needs_twin(messages)
        _, found, after = self._render(probe, True, secured).partition(mark)
        ids, _ = self._encode(after, secured)
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        if not found or stop is None:
            raise TemplateError(
                "the chat template does not end an assistant's turn with a stop token, so another turn cannot follow. "
                "Let the template write eos_token after each reply."
            )
        return np.array(ids[stop + 1 :], dtype=np.int32)

    def knows(self, role: Role) -> bool:
        """Whether the template writes what a message of this role says after a reply, and does not refuse the role."""
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        try:
            return mark in self._apply(["a", "b", mark], (*_PROBE, Message(role, mark)), True)
        except TemplateError:
            return False

    def conversation_tokens(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [L] int32 and a mask [L] that is True on what the assistant wrote, end-of-turn token included.

        What the template writes after that token (often a line break) is context. Raises TemplateError where the
        template rewrites earlier turns, or ends a turn without a token that stops generation.
        """
        if not any(m.role == "assistant" for m in messages):
            raise DataError(
                f"a conversation of {len(messages)} messages has no assistant turn, so nothing would train."
            )
        if self.format == "plain":
            return self._plain_conversation(messages)
        secured = self._needs_twin(messages)
        text = self._render(messages, False, secured)
        ids, offsets = self._encode(text, secured)
        tokens = self._checked(ids)
        starts = np.array([a for a, _ in offsets])
        ends = np.array([b for _, b in offsets])
        mask = np.zeros(len(tokens), dtype=bool)
        for k, message in enumerate(messages):
            if message.role == "assistant":
                first, last = self._turn(messages, k, text, secured)
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
        """A conversation that ends with the assistant's answer, and where that answer's characters are in its tokens.

        Returns ids [L] int32, cut after the token that ends the turn, and for each of `marks` (counts of the answer's
        characters) how many tokens begin before that place and how many have ended there, both [len(marks)]. A step
        of the answer that ends at a mark has its last token at `begun - 1`. Raises TemplateError where the template
        changes the answer's text.
        """
        tokens, mask = self.conversation_tokens(messages)
        tokens, answer = tokens[: np.flatnonzero(mask)[-1] + 1], messages[-1]
        secured = self.format == "plain" or self._needs_twin(messages)
        shown = self._hide(answer.content, answer) if secured else answer.content
        if self.format == "plain":
            before, start, text = int(mask.argmax()), 0, shown
        else:
            text = self._render(messages, False, secured)
            first, last = self._turn(messages, len(messages) - 1, text, secured)
            start = text.find(shown.strip(), first, last) - (len(shown) - len(shown.lstrip()))
            before = 0
            if shown.strip() not in text[first:last]:
                raise TemplateError("the chat template changes the assistant's text, so its steps cannot be located.")
        _, offsets = self._encode(text, secured)
        heads = [answer.content[:mark] for mark in marks]
        places = np.array([start + len(self._hide(head, answer) if secured else head) for head in heads], int)
        begun = np.searchsorted([a for a, _ in offsets], places, side="left")
        ended = np.searchsorted([b for _, b in offsets], places, side="right")
        return tokens, before + begun, before + ended

    def text_tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """BOS (where the model has one), text and EOS as ids [L] int32; the mask [L] is True on all but the first."""
        tokens = self._with_bos([*self._encode_text(text, self._special), *self._stop()])
        mask = np.ones(len(tokens), dtype=bool)
        mask[0] = False
        return tokens, mask

    def decode(self, tokens: np.ndarray | Sequence[int]) -> str:
        """The text of ids the model wrote; special tokens are left out, visible added ones (`<think>`) kept."""
        return self._native.decode([int(t) for t in tokens], skip_special_tokens=True)

    def _turn(self, messages: Sequence[Message], k: int, text: str, secured: bool) -> tuple[int, int]:
        """Where in `text` assistant message k starts and ends, once both are known to be prefixes of it."""
        before = self._render(messages[:k], True, secured)
        after = self._render(messages[: k + 1], False, secured)
        if not (after.startswith(before) and text.startswith(after)):
            raise TemplateError(
                f"the chat template rewrites earlier turns: the first {k + 1} messages alone are not how the whole "
                f"conversation begins at message {k + 1}. Train on single turns, or use a template that only appends."
            )
        return len(before), len(after)

    def _render(self, messages: Sequence[Message], generation: bool, secured: bool) -> str:
        """The template's text; `secured` gives the template's own control tokens their private names."""
        if not secured:
            return self._apply([m.content for m in messages], messages, generation)
        marks = [f"\ue000{secrets.token_hex(8)}\ue001" for _ in messages]
        hidden = [mark if self._forbidden(m) else m.content for mark, m in zip(marks, messages, strict=True)]
        skeleton = self._apply(hidden, messages, generation)
        plain = self._apply([m.content for m in messages], messages, generation)
        for trimmed in ((), ("user", "system", "tool"), ("assistant",), ("user", "system", "tool", "assistant")):
            contents = [m.content.strip() if m.role in trimmed else m.content for m in messages]
            if _substitute(skeleton, marks, contents) == plain:
                safe = [self._hide(c, m) for c, m in zip(contents, messages, strict=True)]
                return _substitute(self._privately(skeleton, self._added), marks, safe)
        raise TemplateError(
            "a message contains the text of a control token and the chat template changes that message, so the two "
            "cannot be told apart. Remove the control token from the text."
        )

    def _apply(self, contents: Sequence[str], messages: Sequence[Message], generation: bool) -> str:
        rows: list[dict[str, Any]] = []
        for content, m in zip(contents, messages, strict=True):
            calls = {"tool_calls": [dict(c) for c in m.tool_calls]} if m.tool_calls else {}
            rows.append({"role": m.role, "content": content, **calls})
        try:
            text = self._tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generation)
        except Exception as error:  # templates raise what they like; all of it means these messages do not fit
            roles = ", ".join(m.role for m in messages)
            raise TemplateError(f"the chat template refuses messages by {roles}: {error}") from error
        return cast(str, text)

    def _forbidden(self, message: Message) -> bool:
        """True where encoding the message's text with the model's tokenizer would make a token it may not write.

        Raises TemplateError where a tool call holds such text: templates print calls in forms that cannot be told apart
        from their own control tokens.
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
        # A normalizer may turn other text into a control token's, e.g. by lower-casing; only encoding shows that.
        return not banned.isdisjoint(self._native.encode(message.content, add_special_tokens=False).ids)

    def _needs_twin(self, messages: Sequence[Message]) -> bool:
        return any(self._forbidden(m) for m in messages)

    def _privately(self, text: str, names: Any) -> str:
        return _alternation(names).sub(lambda m: self._private[m.group()], text) if names else text

    def _hide(self, content: str, message: Message) -> str:
        """Text with those added tokens named privately that its author may write."""
        if message.role != "assistant":
            return content
        return self._privately(content, [name for name in self._added if name not in self._special])

    def _encode(self, text: str, secured: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = (self._twin if secured else self._native).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _encode_text(self, text: str, banned: Any) -> list[int]:
        """Text outside any template, in which no token of `banned` is recognised."""
        allowed = [name for name in self._added if name not in banned]
        return self._twin.encode(self._privately(text, allowed), add_special_tokens=False).ids

    def _native_bos(self) -> int | None:
        """The BOS id where the model's own encoding starts rows with it; a role marker that doubles as BOS is none."""
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
            raise TemplateError("the chat template turns these messages into no tokens at all. Check the template.")
        return np.array(ids, dtype=np.int32)

    def _with_bos(self, ids: list[int]) -> np.ndarray:
        ids = [self.bos, *ids] if self.bos is not None else ids
        if not ids:
            raise DataError("an empty text makes no token for this tokenizer, which has no BOS. Remove the row.")
        return np.array(ids, dtype=np.int32)

    def _stop(self) -> list[int]:
        if self._eos is None:
            raise TemplateError("the tokenizer has no eos_token, so texts cannot be ended. Set one in the tokenizer.")
        return [self._eos]

    def _stop_ids(self) -> tuple[int, ...]:
        """EOS, and the special tokens the template writes between an assistant's words and the next turn."""
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
                f'data.format = "plain" feeds one user message, but the task has messages by {roles}. '
                'Leave data.system empty, or use data.format = "chat".'
            )
        return messages[0].content

    def _plain_conversation(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        prompt = self.prompt_tokens(messages[:-1])
        reply = np.array([*self._encode_text(messages[-1].content, self._special), *self._stop()], dtype=np.int32)
        tokens = np.concatenate([prompt, reply])
        return tokens, np.arange(len(tokens)) >= len(prompt)


def _alternation(names: Any) -> re.Pattern[str]:
    """Matches any of the names, longest first; matches nothing where there are none."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _substitute(text: str, marks: Sequence[str], contents: Sequence[str]) -> str:
    for mark, content in zip(marks, contents, strict=True):
        text = text.replace(mark, content)
    return text


def _twin(native: Tokenizer, private: dict[str, str], ids: dict[str, int]) -> Tokenizer:
    """The same tokenizer with every added token under its private name, in the model's vocabulary too."""
    state: dict[str, Any] = json.loads(native.to_str())
    for token in state["added_tokens"]:
        # Private names are matched in the text as it is, before any normalizer could change them.
        token.update(content=private[token["content"]], normalized=False, single_word=False)
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {private.get(piece, piece): i for piece, i in vocab.items()}
    else:  # Unigram: [piece, score] by id
        model["vocab"] = [[private.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = private.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = ((m if isinstance(m, list) else m.split(" ", 1)) for m in model["merges"])
        model["merges"] = [p for p in pairs if private.keys().isdisjoint((p[0], p[1], p[0] + p[1]))]
    state["post_processor"] = None  # it names tokens that are gone; BOS and EOS are placed by ChatFormat
    twin = cast(Tokenizer, Tokenizer.from_str(json.dumps(state)))
    if any(twin.token_to_id(private[name]) != i for name, i in ids.items()):
        raise TemplateError("the tokenizer's added tokens are not numbered consistently. Save the tokenizer again.")
    return twin
