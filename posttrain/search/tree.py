"""The tree of one problem: what was sampled from where, its scores, and what it cost.

A strategy is a generator function on one problem's tree: it yields what it wants sampled or scored (`Sample`, `Score`)
and continues when that is done. The driver (run.py) answers many problems at once, so that a strategy reads as if it
were alone and the engine always has a full batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np

from posttrain import rng
from posttrain.rollout.generator import completion_seed
from posttrain.types import Json, Message, Task

T = TypeVar("T")
End = Literal["", "step", "stop", "length"]
"""Why a node ends: "" (a root or forced text), a step's end, the end of the completion, or the limit of its length."""


@dataclass(eq=False)
class Node:
    """Tokens sampled after those of `parent`: a step, or all the rest of a completion.

    `values` are the scores of the steps up to here, `score` is their aggregate. `visits` and `value` are counts and
    mean values that a strategy keeps. A root has no tokens; `messages` is its prompt.
    """

    number: int
    parent: Node | None
    index: int = 0  # among the children of its parent
    seed: int = 0  # token t of the completion is drawn with this seed's random number t
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    pieces: tuple[int, ...] = ()  # lengths of the parts in which the tokens were sampled
    text: str = ""  # the assistant's text from its beginning to the end of this node
    end: End = ""
    values: tuple[float, ...] = ()
    score: float | None = None
    note: str = ""  # what a strategy notes about the node
    words: str = ""  # what the scorer said, or why there is no score
    visits: int = 0
    value: float = 0.0
    messages: tuple[Message, ...] = ()
    forced: bool = False
    children: list[Node] = field(default_factory=lambda: [])

    @property
    def ended(self) -> bool:
        """Whether the completion is over."""
        return self.end in ("stop", "length")

    @cached_property
    def path(self) -> list[Node]:
        """The nodes from below the root to this one."""
        return [*self.parent.path, self] if self.parent else []

    @property
    def root(self) -> Node:
        """The node with the prompt."""
        return self.parent.root if self.parent else self

    @cached_property
    def prefix(self) -> np.ndarray:
        """Token ids [k] of the completion up to here, once the node is in its tree."""
        return np.concatenate([self.parent.prefix, self.tokens]) if self.parent else self.tokens

    @property
    def added(self) -> str:
        """The text that this node adds to its parent's; all of it if a character of the parent's was not complete."""
        return self.text.removeprefix(self.parent.text) if self.parent else self.text


@dataclass(frozen=True)
class Sample:
    """Asks for one continuation of each parent, by a step or to the end; `seeds` and `indices` are the children's.

    `stop` are further strings at which it is cut, `limit` is the maximum number of its tokens (0: no further limit).
    """

    parents: Sequence[Node]
    seeds: Sequence[int]
    indices: Sequence[int]
    whole: bool
    stop: tuple[str, ...] = ()
    limit: int = 0


@dataclass(frozen=True)
class Score:
    """Asks for the scores of nodes."""

    nodes: Sequence[Node]


@dataclass(frozen=True)
class Force:
    """Asks for a node with a given text after `parent`, whose own text loses `without` at its end."""

    parent: Node
    text: str
    without: str = ""


Ask = Sample | Score | Force
Asks = Generator[Ask, Any, T]
"""A strategy, or a part of one, that returns T."""


class Tree:
    """The search tree of one problem. `generated` and `scored` count tokens."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.nodes: list[Node] = []
        self.generated = self.scored = 0
        self.partial = True  # whether unfinished completions can be scored
        self.root = self.add(Node(0, None, messages=task.messages))

    def add(self, node: Node) -> Node:
        """Adds a node below its parent."""
        node.number = len(self.nodes)
        self.nodes.append(node)
        if node.parent:
            node.parent.children.append(node)
        return node

    def child_seed(self, parent: Node, index: int) -> int:
        """Seed of a node's child. The first child continues with the node's own seed, so a path of first children has
        the tokens of one completion; the others get seeds of their own."""
        if parent.parent is None:
            return completion_seed(self.seed, f"search-{parent.number}" if parent.number else "search", 0,
                                   self.task.id, index)  # fmt: skip
        return parent.seed if index == 0 else rng.key("search", parent.seed, len(parent.prefix), index)

    def grow(
        self, parents: Sequence[Node], whole: bool = False, stop: tuple[str, ...] = (), limit: int = 0
    ) -> Asks[list[Node]]:
        """Samples one more child of each parent (a parent may occur several times): its next step, or all the rest."""
        taken: dict[int, int] = {}
        indices: list[int] = []
        for parent in parents:
            indices.append(len(parent.children) + taken.get(parent.number, 0))
            taken[parent.number] = taken.get(parent.number, 0) + 1
        seeds = [self.child_seed(parent, index) for parent, index in zip(parents, indices, strict=True)]
        return (yield Sample(parents, seeds, indices, whole, stop, limit)) if parents else []

    def score(self, nodes: Sequence[Node]) -> Asks[None]:
        """Scores those of the nodes that have no score."""
        missing = [node for node in nodes if node.score is None and not node.words]
        if missing:
            yield Score(missing)

    def force(self, parent: Node, text: str, without: str = "") -> Asks[Node]:
        """A node with a given text after `parent`, or after a copy of `parent` that lacks `without` at its end."""
        return (yield Force(parent, text, without))

    def restart(self, messages: tuple[Message, ...]) -> Node:
        """A root with another prompt."""
        return self.add(Node(0, None, messages=messages))

    @property
    def completions(self) -> list[Node]:
        """The nodes at which a completion ends."""
        return [node for node in self.nodes if node.ended]

    def as_dict(self) -> Json:
        """The whole tree as JSON: a list of nodes, each with the number of its parent."""
        return {"task": self.task.id, "generated": self.generated, "scored": self.scored, "nodes": [
            _node(node) for node in self.nodes]}  # fmt: skip


def _node(node: Node) -> Json:
    return {
        "parent": node.parent.number if node.parent else None,
        "text": node.added,
        "tokens": node.tokens.tolist(),
        "logprob": float(node.logprobs.sum(dtype=np.float64)),
        "end": node.end,
        "seed": node.seed,
        "values": list(node.values),
        "score": node.score,
        "note": node.note,
        "words": node.words,
        "visits": node.visits,
        "value": node.value,
        "forced": node.forced,
    }
