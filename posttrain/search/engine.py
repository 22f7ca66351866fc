"""Samples the continuations that searches ask for, through a collector's generator.

A node is continued by a request whose prefix is the path to it. Its `pieces` are the parts in which the path was
sampled, so the embedded engine reads the keys and values it kept, and computes them again in the same way where it has
not; vLLM uses its own prefix cache. What is sampled for a node depends on its path and its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from posttrain.rollout.collector import Collector
from posttrain.rollout.generator import Request
from posttrain.search.tree import Force, Node, Sample, Tree
from posttrain.types import Completion, RolloutError, Task

Encode = Callable[[str], Sequence[int]]


@dataclass
class _Part:
    """A child that is being sampled."""

    tree: Tree
    parent: Node
    node: Node
    ask: Sample
    separator: str
    begun: int = 0  # tokens of the path to the parent


class Engine:
    """Samples nodes of many trees at once. `generated` counts the tokens of all completions of the generator."""

    def __init__(self, collector: Collector, encode: Encode, separator: str) -> None:
        """`encode` gives the token ids of a text that is forced; `separator` ends a step."""
        if collector.multi_turn is not None:
            raise RolloutError("a search needs tasks that one completion answers, not an environment.", "search")
        self.collector, self.encode, self.separator = collector, encode, separator
        self.generated = 0
        self._prompts: dict[tuple[int, int], np.ndarray] = {}

    def sample(self, asked: Sequence[tuple[Tree, Sample]]) -> list[list[Node]]:
        """The new nodes of each ask, in order, added to their trees."""
        out: list[list[_Part]] = []
        for tree, ask in asked:
            parts: list[_Part] = []
            for parent, seed, index in zip(ask.parents, ask.seeds, ask.indices, strict=True):
                node = Node(0, parent, index, seed, text=parent.text)
                parts.append(_Part(tree, parent, node, ask, "" if ask.whole else self.separator, len(parent.prefix)))
            out.append(parts)
        waiting = [part for parts in out for part in parts]
        while waiting:
            self._sample(waiting)
            waiting = [part for part in waiting if _is_blank(part)]
        for parts in out:
            for part in parts:
                part.tree.add(part.node)
                part.tree.generated += len(part.node.tokens)
        self._prompts.clear()
        return [[part.node for part in parts] for parts in out]

    def force(self, tree: Tree, ask: Force) -> Node:
        """A new node with a given text, cut where the maximum length is reached."""
        parent = self._without(tree, ask.parent, ask.without) if ask.without else ask.parent
        left = self.collector.params.max_tokens - len(parent.prefix)
        tokens = np.array([*self.encode(ask.text)][:left], np.int32)
        node = Node(0, parent, len(parent.children), parent.seed, tokens, np.zeros(len(tokens), np.float32))
        node.pieces, node.forced, node.text = (len(tokens),), True, parent.text + ask.text
        node.end = "length" if len(tokens) == left else ""
        return tree.add(node)

    def _without(self, tree: Tree, node: Node, text: str) -> Node:
        """A sibling of `node` with as many of its tokens as have none of the `text` at its end."""
        assert node.parent is not None, "a root has no text"
        kept = node.text[: node.text.rindex(text)]
        task = replace(tree.task, messages=node.root.messages)
        before, count = node.parent.prefix, len(node.tokens)
        while count and len(self._text(task, np.concatenate([before, node.tokens[:count]]))) > len(kept):
            count -= 1
        cut = Node(0, node.parent, len(node.parent.children), node.seed, node.tokens[:count], node.logprobs[:count])
        cut.pieces, cut.text = (count,) * (count > 0), self._text(task, np.concatenate([before, cut.tokens]))
        return tree.add(cut)

    def _text(self, task: Task, tokens: np.ndarray) -> str:
        """The assistant's text of an unfinished completion."""
        return self.collector.opening(task) + self.collector.decode(tokens)

    def _sample(self, parts: Sequence[_Part]) -> None:
        """Extends each part's node by one request's completion."""
        for stop in dict.fromkeys((part.separator, part.ask.stop) for part in parts):
            same = [part for part in parts if (part.separator, part.ask.stop) == stop]
            requests: dict[tuple[int, int, bytes, tuple[int, ...]], list[_Part]] = {}
            for part in same:
                pieces = (*(n for node in part.parent.path for n in node.pieces), *part.node.pieces)
                at = (id(part.tree), part.parent.root.number, self._context(part).tobytes(), pieces)
                requests.setdefault(at, []).append(part)
            left = self.collector.params.max_tokens
            groups = [*requests.items()]
            asked = [self._request(at[3], members) for at, members in groups]
            longest = max((max(request.limits) for request in asked), default=left)
            strings = (*self.collector.params.stop, *filter(None, (stop[0],)), *stop[1])
            params = replace(self.collector.params, max_tokens=longest, stop=strings)
            for (_, members), completions in zip(groups, self.collector.generator.generate(asked, params), strict=True):
                for part, completion in zip(members, completions, strict=True):
                    self.generated += len(completion.tokens)
                    self._extend(part, completion)

    def _request(self, pieces: tuple[int, ...], members: Sequence[_Part]) -> Request:
        limits = [self._limit(part) for part in members]
        first = members[0]
        keep = any(not part.ask.whole or part.ask.stop or part.ask.limit for part in members)
        return Request(
            self._prompt(first), tuple(part.node.seed for part in members), tuple(limits), self._context(first),
            pieces, keep,
        )  # fmt: skip

    def _limit(self, part: _Part) -> int:
        left = self.collector.params.max_tokens - part.begun - len(part.node.tokens)
        return min(left, part.ask.limit - len(part.node.tokens)) if part.ask.limit else left

    def _prompt(self, part: _Part) -> np.ndarray:
        root = part.parent.root
        at = (id(part.tree), root.number)
        if at not in self._prompts:
            self._prompts[at] = self.collector.encode(replace(part.tree.task, messages=root.messages))
        return self._prompts[at]

    def _context(self, part: _Part) -> np.ndarray:
        return np.concatenate([part.parent.prefix, part.node.tokens])

    def _extend(self, part: _Part, completion: Completion) -> None:
        """Appends a completion's tokens to the node, and finds why it ends."""
        node, begun = part.node, self._context(part)
        task = replace(part.tree.task, messages=part.parent.root.messages)
        node.tokens = np.concatenate([node.tokens, completion.tokens]).astype(np.int32)
        node.logprobs = np.concatenate([node.logprobs, completion.logprobs])
        node.pieces = (*node.pieces, len(completion.tokens))
        step_end = completion.stop_string in (part.separator, *part.ask.stop) and completion.stop_string
        if completion.stop == "stop" and not step_end:
            node.end = "stop"
            node.text = self.collector.text(task, completion, begun)
            return
        node.text = self._text(task, self._context(part))
        full = part.begun + len(node.tokens) >= self.collector.params.max_tokens
        node.end = "length" if full else "step"


def _is_blank(part: _Part) -> bool:
    """Whether a step has no text yet, so that it goes on: several separators in a row do not make empty steps."""
    return part.node.end == "step" and not part.ask.whole and not part.node.text[len(part.parent.text) :].strip()
