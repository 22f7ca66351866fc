"""Kept keys and values of prompts and of the pieces in which completions were sampled, so that a search over beginnings
of completions computes each of them once.

The pieces form a tree: a prompt, and below each node the pieces that were sampled after it. A node is found by its
content, so it makes no difference which request sampled it. What is not there, because the least recently used nodes
are dropped or another process sampled it, is decoded again in the same pieces, which gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.rollout.decoding import Decoder, weights_seen
from posttrain.rollout.generator import Request

BUDGET = 1 << 30  # bytes of keys and values that a generator keeps
_WORD = np.int64().itemsize  # bytes of a token id in a key

Key = tuple[bytes, bytes]
"""The path to a node's parent, and the node's own token ids as int64."""


@dataclass(frozen=True)
class Kept:
    """What a decoder keeps of the first `count` tokens of a node; `logits` (1, V) follow them if they are all."""

    state: Any
    count: int
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Place:
    """A node of the tree as a decoder reads it: the path to it, the number of tokens up to it, and its prompt."""

    path: bytes
    length: int
    prompt: Any


class Prefixes:
    """The kept nodes of one generator, least recently used first, in at most `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self._kept: OrderedDict[Key, tuple[Kept, int]] = OrderedDict()  # with its size in bytes
        self._below: dict[bytes, set[bytes]] = {}  # parent's path → token ids of kept nodes
        self._weights: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drops everything."""
        self._kept.clear()
        self._below.clear()
        self.bytes = 0

    def places(self, decoder: Decoder, requests: Sequence[Request]) -> list[Place]:
        """Where the completions of each request begin. Uses the decoder's slots, of which there must be one for each
        request."""
        seen = weights_seen(decoder.policy)
        if seen != self._weights:
            self.clear()
            self._weights = seen
        used: list[Key] = []
        reached = self._prompts(decoder, requests, used)
        begun = [0] * len(requests)  # tokens of the prefix up to the place that was reached
        for depth in range(max(len(request.pieces) for request in requests)):
            members: dict[Key, list[int]] = {}
            for i, request in enumerate(requests):
                if depth < len(request.pieces):
                    end = begun[i] + request.pieces[depth]
                    members.setdefault((reached[i].path, _ids(request.prefix[begun[i] : end])), []).append(i)
                    begun[i] = end
            found = self._pieces(decoder, {key: reached[own[0]] for key, own in members.items()})
            for key, own in members.items():
                for i in own:
                    reached[i] = found[key]
            used += members
        for key in reversed(used):  # a node is kept at least as long as those below it
            if key in self._kept:
                self._kept.move_to_end(key)
        return reached

    def keep(self, decoder: Decoder, slot: int, path: bytes, tokens: np.ndarray) -> None:
        """Keeps what a slot holds of a completion [n] after `path` that has ended: its last token was not decoded."""
        if len(tokens) > 1 and self.budget:
            count = len(tokens) - 1
            key = path, _ids(tokens)
            if key not in self._kept:
                self._add(key, Kept(decoder.kept(slot, count), count))

    def _prompts(self, decoder: Decoder, requests: Sequence[Request], used: list[Key]) -> list[Place]:
        """Places after the requests' prompts; prefills those that are not kept."""
        kind = type(decoder).__name__.encode()  # decoders differ in what they keep, and in rounding
        keys = [(kind, _ids(request.prompt)) for request in requests]
        prompts = {key: self._kept[key][0].state for key in keys if key in self._kept}
        missing = {key: request.prompt for key, request in zip(keys, requests, strict=True) if key not in prompts}
        prompts |= zip(missing, decoder.prefill([*missing.values()]) if missing else (), strict=True)
        for key in missing:
            self._add(key, Kept(prompts[key], len(missing[key]), prompts[key].logits))
        used += dict.fromkeys(keys)
        return [Place(_path(key), len(r.prompt), prompts[key]) for key, r in zip(keys, requests, strict=True)]

    def _pieces(self, decoder: Decoder, parents: Mapping[Key, Place]) -> dict[Key, Place]:
        """The places after pieces, given those before them; decodes the tokens whose keys and values are not kept."""
        found = {key: self._find(key, decoder.divisible) for key in parents}
        short = {key: kept for key, kept in found.items() if kept.logits is None}
        for key, kept in _decoded(decoder, short, parents).items():
            self._add(key, kept)
            found[key] = kept
        places: dict[Key, Place] = {}
        for key, kept in found.items():
            assert kept.logits is not None, "a whole piece has the logits after it"
            prompt = decoder.extended(parents[key].prompt, kept.state, kept.logits)
            places[key] = Place(_path(key), parents[key].length + kept.count, prompt)
        return places

    def _find(self, key: Key, divisible: bool) -> Kept:
        """What is kept of a piece, perhaps as the beginning of a longer one: all of it with the logits after it, or all
        but its last token, or nothing."""
        if key in self._kept:
            return self._kept[key][0]
        path, ids = key
        count = len(ids) // _WORD - 1
        if divisible and count:
            for other in self._below.get(path, ()):
                kept = self._kept[path, other][0]
                if kept.count >= count and other.startswith(ids[: count * _WORD]):
                    return Kept(kept.state, count)
        return Kept(None, 0)

    def _add(self, key: Key, kept: Kept) -> None:
        """Adds or replaces a node, and drops the least recently used ones beyond the budget."""
        size = _bytes((kept.state, kept.logits), set())
        if size > self.budget:
            return
        self._drop(key)
        self._kept[key] = kept, size
        self._below.setdefault(key[0], set()).add(key[1])
        self.bytes += size
        while self.bytes > self.budget:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        if key in self._kept:
            self.bytes -= self._kept.pop(key)[1]
            self._below[key[0]].discard(key[1])
            if not self._below[key[0]]:
                del self._below[key[0]]


def _ids(tokens: np.ndarray) -> bytes:
    return tokens.astype(np.int64).tobytes()


def _path(key: Key) -> bytes:
    return hashlib.sha256(b"".join(key)).digest()


def _decoded(decoder: Decoder, short: Mapping[Key, Kept], parents: Mapping[Key, Place]) -> dict[Key, Kept]:
    """Whole pieces, given what is kept of them: decodes the rest of all of them together."""
    tokens = {key: np.frombuffer(key[1], np.int64) for key in short}
    left = {key: len(tokens[key]) - kept.count for key, kept in short.items()}
    order = sorted(short, key=lambda key: -left[key])  # a decode step computes the first slots
    for slot, key in enumerate(order):
        decoder.start(slot, parents[key].prompt, short[key].state, short[key].count)
    done: dict[Key, Kept] = {}
    for step in range(left[order[0]] if order else 0):
        rows = [key for key in order if left[key] > step]
        at = np.array([short[key].count + step for key in rows])
        newest = np.array([tokens[key][n] for key, n in zip(rows, at, strict=True)])
        begun = np.array([parents[key].length for key in rows])
        logits = decoder.step(torch.from_numpy(newest), torch.from_numpy(begun + at))
        for slot, key in enumerate(rows):
            if left[key] == step + 1:
                count = len(tokens[key])
                done[key] = Kept(decoder.kept(slot, count), count, logits[slot : slot + 1].clone())
    return done


def _bytes(value: Any, counted: set[int]) -> int:
    """Bytes that the tensors in a value keep in memory; each is counted once."""
    if isinstance(value, torch.Tensor):
        value = value.untyped_storage()  # of a view, all that it is a view of
        place, size = value.data_ptr(), value.nbytes()
        new = place not in counted
        counted.add(place)
        return size if new else 0
    if id(value) in counted or isinstance(value, (str, bytes, int, float, type, type(None))):
        return 0
    counted.add(id(value))
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif isinstance(value, (list, tuple, set)):
        parts = value
    else:
        parts = vars(value).values() if hasattr(value, "__dict__") else ()
    return sum(_bytes(part, counted) for part in parts)
