"""Sequential revision: the model sees its earlier answer and tries again (arXiv 2408.03314, section 6.1).

Where the scorer explains itself (a judge, or a reward function that returns words), its words are passed on.
"""

from __future__ import annotations

from posttrain.config.search import SearchConfig, rounds
from posttrain.search.tree import Asks, Node, Tree
from posttrain.types import Message

REQUEST = "Check this answer. If something is wrong, correct it; otherwise give the same answer again."


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Chains of `width` answers, each of which revises the one before."""
    for length in rounds(cfg):
        (answer,) = yield from tree.grow([tree.root], whole=True)
        for _ in range(length - 1):
            yield from tree.score([answer])
            root = tree.restart(conversation(tree.task.messages, answer))
            (answer,) = yield from tree.grow([root], whole=True)


def conversation(asked: tuple[Message, ...], answer: Node) -> tuple[Message, ...]:
    """The prompt of a revision: the task, one earlier answer, and the request to check it."""
    words = f"{answer.words}\n\n" if answer.words else ""
    return (*asked, Message("assistant", answer.text), Message("user", words + REQUEST))
