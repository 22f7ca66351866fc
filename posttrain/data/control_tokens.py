"""Encodes text so that nobody's words become a control token of the model.

A control token is an added token of the tokenizer (`<|im_end|>`, `<think>`). `ControlTokens` knows two tokenizers: the
model's own, and a copy that knows each added token only by a random alias. Text in which the template's control tokens
have been replaced by their aliases can contain the names of control tokens as ordinary characters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any, cast

from tokenizers import Tokenizer

from posttrain.data.messages import thought_of, without_thought
from posttrain.data.thoughts import TAG
from posttrain.types import Json, Message, TemplateError

Offsets = list[tuple[int, int]]
"""Start and end of each token in the text."""


class ControlTokens:
    """The added tokens of a tokenizer: `added` maps their texts to ids, `special` are those that nobody may write.

    Added tokens of white space only, as Gemma has for several line breaks, are ordinary text. The tags of a thought
    are not special here, even where the tokenizer marks them so: an assistant writes them.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TemplateError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json), which is needed to locate each "
                "token in the text. Save the tokenizer in the fast format."
            )
        self.native = cast(Tokenizer, Tokenizer.from_str(backend.to_str()))  # a copy: no truncation, no padding
        self.native.no_truncation()
        self.native.no_padding()
        decoder = self.native.get_added_tokens_decoder()
        self.special = {t.content for t in decoder.values() if t.special and not TAG.fullmatch(t.content)} | {
            t for t in (tokenizer.bos_token, tokenizer.eos_token) if t
        }
        blank = {t.content for t in decoder.values() if not (t.content.replace("▁", " ").strip() or t.special)}
        self.added: dict[str, int] = {t.content: i for i, t in decoder.items() if t.content not in blank}
        self.ids = frozenset(self.added.values())
        self._unknown = cast("str | None", tokenizer.unk_token)
        self._aliases = {text: f"\ue000{secrets.token_hex(8)}{i}\ue001" for text, i in self.added.items()}
        self._names = {alias: text for text, alias in self._aliases.items()}
        known = {n: i for n, i in self.added.items() if n != self._unknown}
        self._banned_to_assistant = frozenset(i for n, i in known.items() if n in self.special)
        self._banned_to_others = frozenset(known.values())
        self.find_special = alternation(self.special)
        self._find_added = alternation(self.added)
        self._find_alias = alternation(self._names)

    @cached_property
    def _aliased(self) -> Tokenizer:
        return _aliased_tokenizer(self.native, self._aliases, self.added)

    def encode(self, text: str, aliased: bool) -> tuple[list[int], Offsets]:
        """Ids of a rendered text and their offsets; with `aliased`, control tokens are known by their aliases."""
        encoding = (self._aliased if aliased else self.native).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_text(self, text: str, banned: Collection[str]) -> list[int]:
        """Encodes text without a template; tokens in `banned` are not recognised."""
        return self.encode(self.alias(text, [name for name in self.added if name not in banned]), True)[0]

    def written_in(self, message: Message) -> bool:
        """Whether encoding the message with the model's tokenizer would produce a token its author may not write.

        Raises TemplateError if a tool call, a thought or another field contains such a token, because templates format
        these in ways that make it indistinguishable from their own control tokens.
        """
        assistant = message.role == "assistant"
        pattern = self.find_special if assistant else self._find_added
        for what, value, banned in (
            ("a tool call", [*message.tool_calls], self.find_special),
            ("a thought", thought_of(message), self.find_special),
            ("a tool, a name or another field", without_thought(message), self._find_added),
        ):
            shown = json.dumps(value, ensure_ascii=False, default=str) if value else ""
            if found := banned.search(shown):
                raise TemplateError(
                    f"{what} contains the text of the control token {found.group()!r}, which would become that token. "
                    "Remove it there."
                )
            if shown and self._forges(shown, banned is self.find_special):
                raise TemplateError(f"{what} would be encoded as a control token: {shown[:60]}. Change it.")
        return bool(pattern.search(message.content)) or self._forges(message.content, assistant)

    def _forges(self, text: str, assistant: bool) -> bool:
        """Whether a normalizer makes a control token of the text, e.g. by lower-casing; only encoding reveals that."""
        banned = self._banned_to_assistant if assistant else self._banned_to_others
        return not banned.isdisjoint(self.native.encode(text, add_special_tokens=False).ids)

    def alias(self, text: str, names: Iterable[str]) -> str:
        """Replaces control tokens by their aliases."""
        names = list(names)
        return alternation(names).sub(lambda m: self._aliases[m.group()], text) if names else text

    def alias_allowed(self, content: str, message: Message) -> str:
        """Replaces the added tokens that the message's author may write by their aliases."""
        if message.role != "assistant":
            return content
        return self.alias(content, [name for name in self.added if name not in self.special])

    def unalias(self, text: str) -> str:
        """Replaces aliases by the control tokens they stand for."""
        return self._find_alias.sub(lambda m: self._names[m.group()], text)

    def last_in(self, text: str, aliased: bool) -> int:
        """Where the last control token of a rendered text begins; 0 if there is none.

        Tokenizers split a text at its control tokens first, so what follows is encoded independently of what precedes.
        """
        pattern = self._find_alias if aliased else self._find_added
        return max((match.start() for match in pattern.finditer(text)), default=0)

    def in_text(self, token: str, aliased: bool) -> str:
        """The control token as it is written in a rendered text."""
        return self._aliases.get(token, token) if aliased else token


def alternation(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the names, longest first; without names it matches nothing."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def private_mark() -> str:
    """A random text that stands for another one while a template is rendered."""
    return f"\ue000{secrets.token_hex(8)}\ue001"


def substitute(text: str, marks: Sequence[str], contents: Sequence[str]) -> str:
    """The text with each mark replaced by its content."""
    for mark, content in zip(marks, contents, strict=True):
        text = text.replace(mark, content)
    return text


def _aliased_tokenizer(native: Tokenizer, aliases: dict[str, str], ids: dict[str, int]) -> Tokenizer:
    """A copy of the tokenizer in which every added token has its alias, also in the model's vocabulary."""
    state: Json = json.loads(native.to_str())
    for token in state["added_tokens"]:
        # Aliases are matched in the raw text, before any normalizer could change them.
        if token["content"] in aliases:
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
