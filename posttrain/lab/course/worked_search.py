"""Worked examples of test-time search. Each one calls the functions that search, on trees small enough to follow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from posttrain.config.search import SearchConfig
from posttrain.lab.course.working import Example, Step, Worked, many, one
from posttrain.lab.explore.budgets import frontier
from posttrain.search.adaptive import lead
from posttrain.search.beam import best, shared_equally
from posttrain.search.budget_forcing import think
from posttrain.search.choose import classes, expected_vote, vote
from posttrain.search.mcts import backup, puct
from posttrain.search.rebase import shares
from posttrain.search.tree import Force, Node, Sample, Tree
from posttrain.types import Message, Task

COMPLETIONS = (
    ("371", 0.26),
    ("<think>30*9=270, 6*9=54, 270+54=324</think>324", 0.91),
    ("315", 0.26),
    ("371", 0.25),
    ("348", 0.26),
)
"""Completions for "What is 36*9?" and the model's confidence in each."""
TRIED = "What is 36*9? Five completions: 371, 324 after a thought, 315, 371 and 348, with the model's own confidence."


def weighted_vote() -> Worked:
    """The majority, and the vote weighted by confidence, of the same completions."""
    texts, weights = [text for text, _ in COMPLETIONS], [weight for _, weight in COMPLETIONS]
    answers = classes(texts)
    said = {"371": 0, "324": 1, "315": 2, "348": 4}  # answer → its first completion
    rows: list[tuple[str, ...]] = []
    for answer, first in said.items():
        votes = [weight for number, weight in zip(answers, weights, strict=True) if number == answers[first]]
        rows.append((answer, str(len(votes)), one(sum(votes), 2)))
    names = {first: answer for answer, first in said.items()}
    plain, heavy = names[vote(answers, [1.0] * len(texts))], names[vote(answers, weights)]
    return Worked(
        title="One completion, one vote, or votes that count by confidence",
        given=TRIED,
        calls=("search.choose.classes", "search.choose.vote"),
        steps=(
            Step(r"\arg\max_a \sum_i \mathbb{1}[a_i = a]", "", plain, "The majority:"),
            Step(r"\arg\max_a \sum_i w_i\, \mathbb{1}[a_i = a]", "", heavy, "Weighted by confidence:"),
        ),
        head=("answer", "votes", "sum of confidences"),
        rows=tuple(rows),
        after="Two hasty guesses that happen to agree outvote the thought; their weights together do not.",
    )


def vote_by_size() -> Worked:
    """Expected accuracy of a majority of n of twelve completions, over all subsets."""
    answers = [0] * 4 + [1, 1, 2, 2, 3, 4, 5, 6]  # the right answer four times, then eight wrong ones
    rows = [(str(n), one(expected_vote(answers, [a == 0 for a in answers], n))) for n in (1, 2, 3, 6, 12)]
    return Worked(
        title="A vote can win without a majority",
        given="Twelve completions: the right answer four times, two wrong ones twice each and four wrong ones once. A "
        "vote among n of them, averaged over all subsets; ties are broken at random.",
        calls=("search.choose.expected_vote",),
        head=("n", "the vote is right"),
        rows=tuple(rows),
        after="Only a third of the completions is right, but no wrong answer is as common. Wrong answers usually "
        "scatter, which is why self-consistency works where a vote between two answers would fail.",
    )


def decided() -> Worked:
    """When adaptive consistency stops."""
    counts = ((1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (5, 1), (6, 2))
    rows = [(f"{a} to {b}", one(lead(a, b)), "yes" if lead(a, b) >= 0.95 else "no") for a, b in counts]
    return Worked(
        title="When is a vote decided?",
        given="Sampling goes on until the leading answer is the more common one with probability 0.95, given its votes "
        "and those of the second.",
        calls=("search.adaptive.lead",),
        steps=(
            Step(
                r"P\bigl(p > \tfrac12\bigr),\; p \sim \mathrm{Beta}(v_1 + 1, v_2 + 1)",
                r"1 - \bigl(\tfrac12\bigr)^5",
                one(lead(4, 0)),
                "For four votes to none:",
            ),
        ),
        head=("votes", "probability", "stop"),
        rows=tuple(rows),
        after="Four votes in a row settle it. An easy problem costs four completions instead of sixteen.",
    )


def next_steps() -> Worked:
    """How beam search and rebase share out eight next steps among four first steps."""
    scores = (0.9, 0.8, 0.5, 0.2)
    root = Node(0, None)
    nodes = [Node(i + 1, root, i, score=score) for i, score in enumerate(scores)]
    kept = shared_equally(best(nodes, 2), 8)
    soft, equal = shares(scores, 8, 0.2), shares(scores, 8, math.inf)
    rows = [
        (f"{i + 1}", one(score, 1), str(sum(one is nodes[i] for one in kept)), str(soft[i]), str(equal[i]))
        for i, score in enumerate(scores)
    ]
    total = sum(math.exp(score / 0.2) for score in scores)
    return Worked(
        title="Four steps, and eight next steps to share out",
        given="A process reward model scores four unfinished completions. Beam search with width 8 and 4 expansions "
        "keeps the best 8/4 = 2.",
        calls=("search.beam.best", "search.beam.shared_equally", "search.rebase.shares"),
        steps=(
            Step(
                r"n_i \approx N\, \frac{e^{s_i / T}}{\sum_j e^{s_j / T}}",
                r"8 \cdot \frac{e^{0.9 / 0.2}}{\sum_j e^{s_j / 0.2}}",
                one(8 * math.exp(0.9 / 0.2) / total, 2),
                "Rebase's share of the first step at T = 0.2, which is then rounded:",
            ),
        ),
        head=("step", "score", "beam", "rebase, $T = 0.2$", r"rebase, $T = \infty$"),
        rows=tuple(rows),
        after="Beam search drops all but the best. Rebase lets close scores share, and drops hopeless ones only.",
    )


def visits() -> Worked:
    """PUCT on one node with three children whose values are known."""
    root = Node(0, None)
    values, priors = (0.2, 0.6, 0.5), (0.6, 0.3, 0.1)
    children = [Node(i + 1, root, i, logprobs=np.log(np.array([p], np.float64))) for i, p in enumerate(priors)]
    root.children = children
    rows: list[tuple[str, ...]] = []
    first: list[float] = []
    for number in range(1, 9):
        scores = puct(root, children, 1.0)
        first = first or scores
        at = scores.index(max(scores))
        backup(children[at], values[at])
        rows.append((str(number), *many(scores), str(at + 1)))
    return Worked(
        title="Eight visits by PUCT",
        given="A node with three next steps. The policy gives them the probabilities 0.6, 0.3 and 0.1; visiting them "
        "gives the values 0.2, 0.6 and 0.5. c = 1.",
        calls=("search.mcts.puct", "search.mcts.backup"),
        steps=(
            Step(
                r"Q_a + c\, P_a \frac{\sqrt{N}}{1 + n_a}",
                r"0 + 0.6 \cdot \frac{\sqrt{1}}{1 + 0}",
                one(first[0]),
                "The first step before any visit:",
            ),
        ),
        head=("visit", "step 1", "step 2", "step 3", "chosen"),
        rows=tuple(rows),
        after=f"The visits go to step 1: {children[0].visits}, step 2: {children[1].visits}, step 3: "
        f"{children[2].visits}. The policy's favourite is tried first; after that, values decide. The mean value of "
        f"the node is {one(root.value)}.",
    )


SAID = {
    "": "<think> 98*8=774 </think>",
    "Wait": " 90*8=720 8*8=64 720+64=784 </think>",
    "</think>": " 784",
}
"""What a scripted model says next, by how the text so far ends; a word is a token."""


def forced() -> Worked:
    """Budget forcing on a scripted model, whose words count as tokens."""
    tree = Tree(Task("98*8", "arithmetic", (Message("user", "What is 98*8?"),), "784"), 0)
    run = think(tree, SearchConfig(strategy="budget-forcing", least_thinking=5, wait="Wait"))
    rows: list[tuple[str, ...]] = []
    answer: object = None
    while True:
        try:
            ask = run.send(answer)
        except StopIteration:
            break
        node, asked = (_forced(tree, ask), "writes") if isinstance(ask, Force) else (_sampled(tree, ask), "lets it say")
        rows.append((f"{asked} “{node.text.removeprefix(node.parent.text if node.parent else '').strip()}”",
                     str(len(node.prefix))))  # fmt: skip
        answer = node if isinstance(ask, Force) else [node]
    return Worked(
        title="“Wait”: a thought that is not allowed to end",
        given="A scripted model thinks 98*8=774 and stops after three tokens (here words). At least five are required.",
        calls=("search.budget_forcing.think",),
        head=("budget forcing", "tokens so far"),
        rows=tuple(rows),
        after="The early end of the thought is taken back and replaced by “Wait”. Whether the model then finds its "
        "mistake is up to the model: forcing buys tokens, not insight.",
    )


def _sampled(tree: Tree, ask: Sample | object) -> Node:
    assert isinstance(ask, Sample), "budget forcing samples and forces, and asks for no scores"
    parent = ask.parents[0]
    said = next(text for end, text in reversed(SAID.items()) if parent.text.endswith(end))
    words = np.zeros(len(said.split()), np.int32)
    end = "step" if said.endswith(ask.stop) and ask.stop else "stop"
    return tree.add(Node(0, parent, tokens=words, text=parent.text + said, end=end))


def _forced(tree: Tree, ask: Force) -> Node:
    parent = ask.parent
    if ask.without:
        kept = parent.text.removesuffix(ask.without)
        parent = tree.add(Node(0, parent.parent, tokens=parent.tokens[:-1], text=kept))
    return tree.add(Node(0, parent, tokens=np.zeros(1, np.int32), text=parent.text + ask.text, forced=True))


def measured() -> Worked:
    """The recorded frontier of the page "Think longer"."""
    record = frontier()
    shown = (
        ("majority", "", "majority"),
        ("best-of-n", "confidence", "best of n, by confidence"),
        ("beam", "confidence", "beam, by confidence"),
        ("mcts", "confidence", "tree search, by confidence"),
        ("best-of-n", "self-certainty", "best of n, by self-certainty"),
        ("best-of-n", "checker", "best of n, by the true checker"),
    )
    found = {(one["strategy"], one["scorer"]): {p["budget"]: p for p in one["points"]} for one in record["series"]}
    budgets = (1, 4, 16, 32)
    rows = [(name, *(_share(found[strategy, scorer][n]) for n in budgets)) for strategy, scorer, name in shown]
    return Worked(
        title="What more tokens bought, measured",
        given=f"abacus as it ships on {record['problems']} held-out arithmetic problems, with 1 to 32 completions (or "
        "visits) for each. In brackets: tokens per problem, those that the scorer reads included. Recorded by "
        "bench/search_frontier.py.",
        calls=("lab.explore.budgets.frontier",),
        head=("strategy", *(str(n) for n in budgets)),
        rows=tuple(rows),
        after="With a good scorer, more tokens buy accuracy. With a bad one they cost it: self-certainty likes the "
        "answers that skip the thought, and finds one more surely the more there are.",
    )


def _share(point: Mapping[str, float]) -> str:
    return f"{100 * point['accuracy']:.1f} % ({point['generated'] + point['scored']:.0f})"


EXAMPLES: dict[str, Example] = {
    "weighted-vote": weighted_vote,
    "vote-by-size": vote_by_size,
    "decided": decided,
    "next-steps": next_steps,
    "visits": visits,
    "forced-thinking": forced,
    "measured-search": measured,
}
