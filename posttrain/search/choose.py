"""Chooses the result of a search among its completions, and computes what choosing is worth for every n.

Answers are equivalent if the verifier of mathematics says so (1/2 and 0.5), else if their texts are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from posttrain.data.answers import final_answer
from posttrain.rewards.verifiers import is_mathematical
from posttrain.rewards.verifiers import math as equal_in_mathematics
from posttrain.search.tree import Node
from posttrain.types import Message, Task

LONGEST = 200  # characters of an answer that is compared as mathematics


@lru_cache(maxsize=1 << 16)
def equivalent(first: str, second: str) -> bool:
    """Whether two final answers are the same, as mathematics if both are formulas."""
    if first == second:
        return True
    if max(len(first), len(second)) > LONGEST or not (is_mathematical(first) and is_mathematical(second)):
        return False
    task = Task("vote", "vote", (Message("user", "vote"),), first)
    return equal_in_mathematics(task, rf"\boxed{{{second}}}").passed


def classes(texts: Sequence[str]) -> list[int]:
    """The number of each text's answer, the same for equivalent answers, in order of occurrence; −1 for no answer."""
    found: list[str] = []
    numbers: list[int] = []
    for text in texts:
        answer = final_answer(text).strip()
        number = next((i for i, known in enumerate(found) if equivalent(known, answer)), None)
        if number is None and answer:
            number = len(found)
            found.append(answer)
        numbers.append(-1 if number is None else number)
    return numbers


def vote(answers: Sequence[int], weights: Sequence[float]) -> int:
    """Index of the first completion with the winning answer; ties go to the answer that came first.

    `answers` are numbers as `classes` gives them, `weights` are ≥ 0. Returns −1 if no completion has an answer.
    """
    totals: dict[int, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer >= 0:
            totals[answer] = totals.get(answer, 0.0) + weight
    if not totals:
        return -1
    return list(answers).index(max(totals, key=lambda a: totals[a]))


def chosen(nodes: Sequence[Node], how: str) -> Node | None:
    """The completion that a search returns, among those it finished; None if there is none.

    Completions that were cut at the maximum length only count if no other one exists. `vote` and `weighted` choose an
    answer and return its completion with the highest score; a completion without a score has weight 0.
    """
    ended = [node for node in nodes if node.end == "stop"] or list(nodes)
    if not ended:
        return None
    scores = [-math.inf if node.score is None else node.score for node in ended]
    if how == "best":
        return ended[int(np.argmax(scores))]
    answers = classes([node.text for node in ended])
    weights = [1.0] * len(ended) if how == "vote" else [max(0.0, score) for score in scores]
    first = vote(answers, weights)
    if first < 0:
        return ended[int(np.argmax(scores))]
    return max((node for node, a in zip(ended, answers, strict=True) if a == answers[first]),
               key=lambda node: -math.inf if node.score is None else node.score)  # fmt: skip


def expected_vote(answers: Sequence[int], passed: Sequence[bool], n: int) -> float:
    """Expected accuracy of the majority of n completions, over all subsets of N; ties are broken at random.

    `answers` [N] are numbers as `classes` gives them; −1 does not vote. Exact: for each answer c and each number k of
    its votes, the subsets in which no other answer has more than k are counted by a polynomial in the number of
    completions and the number of answers that tie. Raises ValueError unless 1 ≤ n ≤ N.
    """
    total = len(answers)
    if not 1 <= n <= total:
        raise ValueError(f"a majority of n={n} needs 1 ≤ n ≤ N={total} completions.")
    sizes = {a: list(answers).count(a) for a in answers}
    silent = sizes.pop(-1, 0)
    right = {a: passed[list(answers).index(a)] for a in sizes}
    won = sum(_wins(sizes, a, silent, n) for a in sizes if right[a])
    return float(won / math.comb(total, n))


def _wins(sizes: dict[int, int], answer: int, silent: int, n: int) -> Fraction:
    """Number of subsets of n in which an answer wins; a tie of t answers counts 1 / t."""
    won = Fraction(0)
    for k in range(1, min(n, sizes[answer]) + 1):
        ways: dict[tuple[int, int], int] = {(0, 0): 1}  # (completions, tied answers) → subsets of the others
        for size in [*(size for other, size in sizes.items() if other != answer)]:
            new: dict[tuple[int, int], int] = {}
            for (used, tied), count in ways.items():
                for j in range(min(k, size, n - k - used) + 1):
                    at = (used + j, tied + (j == k))
                    new[at] = new.get(at, 0) + count * math.comb(size, j)
            ways = new
        own = math.comb(sizes[answer], k)
        won += sum(
            Fraction(own * count * math.comb(silent, n - k - used), tied + 1) for (used, tied), count in ways.items()
        )
    return won
