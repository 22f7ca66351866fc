"""Searches of the built-in model for the page "Think longer": one problem, one strategy, and the tree that it grew.

The searches are posttrain.search's own, on abacus as it ships; a step of its thoughts ends with a comma. A result
depends only on the problem, the seed, the strategy, the scorer and the budget.
"""

from __future__ import annotations

import threading
from functools import cached_property, lru_cache, partial
from typing import TypedDict

from posttrain.data.answers import final_answer
from posttrain.data.chat import ChatFormat
from posttrain.data.thoughts import shown_text
from posttrain.lab import checkpoints
from posttrain.lab.explore.budgets import UNSCORED, settings
from posttrain.lab.explore.problems import task_of
from posttrain.lab.folders import Place
from posttrain.models.load import Policy
from posttrain.rewards.auto import verifier_for
from posttrain.rollout.collector import Collector
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.search.build import certainties
from posttrain.search.engine import Engine
from posttrain.search.mcts import ROLLOUT
from posttrain.search.run import SearchResult, search
from posttrain.search.scorers import Confidence, Reward, Scorer, SelfCertainty
from posttrain.search.tree import Node
from posttrain.types import SamplingParams, Task, Verdict

PARAMS = SamplingParams(temperature=1.0, max_tokens=96)
SEPARATOR = ", "
SLOTS = 32
MICRO_BATCH_TOKENS = 4096


class Branch(TypedDict):
    """A node of a tree for the page. `text` is its own part of the completion; `passed` is null unless it ends one."""

    parent: int | None
    text: str
    tokens: int
    score: float | None
    visits: int
    value: float
    end: str
    rollout: bool
    passed: bool | None


class Found(TypedDict):
    """What a search found and what it cost, for the page. `chosen` is the number of a node, `right` counts the
    completions that the checker accepts."""

    strategy: str
    answer: str
    passed: bool
    chosen: int | None
    completions: int
    right: int
    generated: int
    scored: int
    nodes: list[Branch]


def verify(task: Task, text: str) -> Verdict:
    """The verdict of the checker that knows the right answer."""
    return verifier_for(task)(task, text)


class Searcher:
    """abacus with the engine of its searches. `lock` is held while it searches."""

    def __init__(self, policy: Policy, slots: int = SLOTS) -> None:
        self.policy, self.chat, self.slots = policy, ChatFormat(policy.tokenizer), slots
        self.lock = threading.Lock()

    @cached_property
    def collector(self) -> Collector:
        """Samples with abacus at temperature 1."""
        return Collector(
            generator=EmbeddedGenerator(self.policy, self.slots),
            encode=lambda task: self.chat.prompt_tokens(task.messages),
            decode=partial(shown_text, self.policy.tokenizer),
            verify=verify,
            params=PARAMS,
            seed=0,
        )

    def engine(self) -> Engine:
        """An engine whose steps end with a comma."""
        return Engine(self.collector, self.chat.written_tokens, SEPARATOR)

    def scorer(self, name: str) -> Scorer:
        """`confidence`, `self-certainty`, or `checker`, which knows the right answer."""
        if name == "checker":
            return Reward(verify)
        if name == "self-certainty":
            return SelfCertainty(partial(certainties, self.policy, MICRO_BATCH_TOKENS), self.collector.encode)
        return Confidence()

    @lru_cache(maxsize=256)  # noqa: B019 - there is a single searcher, which lives as long as the lab
    def found(self, problem: str, seed: int, strategy: str, scorer: str, budget: int) -> Found:
        """Searches for the answer to a problem; equal arguments always give the same result."""
        cfg = settings(strategy, scorer, budget)
        judge = None if strategy in UNSCORED else self.scorer(scorer)
        with self.lock:
            return describe(search(task_of(problem), self.engine(), judge, cfg, seed), strategy)


@lru_cache(maxsize=1)
def open_searcher(place: Place) -> Searcher:
    """This lab's searcher; the first call takes seconds."""
    return Searcher(checkpoints.open_model(place, checkpoints.SHIPPED).policy)


def describe(result: SearchResult, strategy: str) -> Found:
    """A result for the page."""
    nodes = [_branch(result.task, node) for node in result.tree.nodes]
    return {
        "strategy": strategy,
        "answer": final_answer(result.answer),
        "passed": result.chosen is not None and bool(nodes[result.chosen.number]["passed"]),
        "chosen": result.chosen.number if result.chosen else None,
        "completions": len(result.completions),
        "right": sum(bool(node["passed"]) for node in nodes),
        "generated": result.generated,
        "scored": result.scored,
        "nodes": nodes,
    }


def _branch(task: Task, node: Node) -> Branch:
    return {
        "parent": node.parent.number if node.parent else None,
        "text": node.added,
        "tokens": len(node.tokens),
        "score": node.score,
        "visits": node.visits,
        "value": node.value,
        "end": node.end,
        "rollout": node.note == ROLLOUT,
        "passed": verify(task, node.text).passed if node.ended else None,
    }
