"""A toy of reward hacking: a policy small enough to be optimised against a learned reward model in seconds.

A shop is asked one question. The true reward is a known rule. The initial policy imitates shop clerks, some of them
careless; a judge, who knows the rule but makes mistakes, compares pairs of its answers; a reward model learns one
weight per word from those pairs. Near the initial policy few words occur twice, so that one weight per word is about
right. Further away it is not: nothing taught the model that the ninth "station" is worth less than the first.

B is the number of answers of at most LONGEST words, W the vocabulary size. Answers are (B, LONGEST) int64, padded with
STOP. Everything is a function of its arguments and of a generator that the caller provides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.functional import one_hot

from posttrain.objectives.advantages import leave_one_out
from posttrain.objectives.policy import POLICY_LOSSES
from posttrain.objectives.reward import bradley_terry
from posttrain.objectives.tokens import kl, select

QUESTION = "When are you open, and where do I find you?"
FACTS, WRONG, POLITE = ("nine", "six", "station"), ("ten", "harbour"), ("welcome", "please", "thanks")
OTHERS = tuple("we are open from to near the come visit us see you soon really lovely shop".split())
WORDS = (*FACTS, *WRONG, *POLITE, *OTHERS)
STOP, START = len(WORDS), len(WORDS) + 1
LONGEST, SHORT = 12, 10
HIDDEN = 24
FACT, FALSE, COURTESY, REPEAT, EXTRA = 1.0, -1.0, 0.5, -0.5, -0.25
"""Points for a correct fact, a wrong fact, being polite exactly once, repeating a word, and each word past SHORT."""
CLERKS: tuple[dict[str, float], ...] = (
    {"welcome": 0.35},
    {"we are open": 0.7, "lovely shop": 0.15, "open": 0.15},
    {"from nine": 0.5, "from ten": 0.2},
    {"to six": 0.45},
    {"near the station": 0.4, "near the harbour": 0.2},
    {"come visit us": 0.15, "see you soon": 0.15, "really lovely": 0.1},
    {"thanks": 0.18, "please": 0.12},
)
"""The clerks' answers: from each row one phrase with the given probability, or nothing."""
STUTTER = 0.2  # share of the clerks' answers in which one word is repeated
SLIP = 0.5  # difference in points that raises the judge's log-odds by 1
PAIRS, ANSWERS, IMITATION, FITTING = 800, 64, 400, 200


class Policy(NamedTuple):
    """Weights of the policy: the next word depends on the previous word, the set of words used so far, and position."""

    before: torch.Tensor  # (W + 2, HIDDEN)
    said: torch.Tensor  # (W, HIDDEN)
    place: torch.Tensor  # (LONGEST, HIDDEN)
    out: torch.Tensor  # (HIDDEN, W + 1)
    bias: torch.Tensor  # (W + 1,)

    def learning(self) -> Policy:
        """A copy that requires gradients."""
        return Policy._make(numbers.detach().clone().requires_grad_() for numbers in self)


class World(NamedTuple):
    """The initial policy, the reward model, and the reward model's accuracy on held-out pairs of that policy."""

    start: Policy
    weights: torch.Tensor  # (W,) points per occurrence of a word
    bias: float  # makes the initial mean equal the true one; Bradley–Terry does not determine it
    agreement: float


class Step(NamedTuple):
    """A policy's answers (B, LONGEST) at one step, their proxy and true rewards (B,), and log π / π_start (B,)."""

    answers: torch.Tensor
    proxy: torch.Tensor
    true: torch.Tensor
    distance: torch.Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread: for matrices this small a second thread costs more than it gains."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


# --- answers and their rewards --------------------------------------------------------------------------------------


def counts(answers: torch.Tensor) -> torch.Tensor:
    """Number of occurrences of each word in each answer, (B, W) float32."""
    return one_hot(answers, STOP + 1).sum(1)[:, :STOP].float()


def points(answers: torch.Tensor) -> dict[str, torch.Tensor]:
    """The true reward by part, (B,) each; their sum is the reward."""
    said = counts(answers)
    facts, wrong, polite = said[:, :3], said[:, 3:5], said[:, 5:8]
    return {
        "facts": FACT * (facts > 0).sum(1),
        "wrong facts": FALSE * (wrong > 0).sum(1),
        "polite once": COURTESY * (polite.sum(1) == 1),
        "repeated words": REPEAT * (said - 1).clamp_min(0).sum(1),
        f"words past {SHORT}": EXTRA * (said.sum(1) - SHORT).clamp_min(0),
    }


def true_reward(answers: torch.Tensor) -> torch.Tensor:
    """(B,) points."""
    return torch.stack(list(points(answers).values())).sum(0)


def written(answer: torch.Tensor) -> str:
    """One answer (LONGEST,) as text."""
    return " ".join(WORDS[word] for word in answer.tolist() if word != STOP)


def read(text: str) -> torch.Tensor:
    """The answer (LONGEST,) of a text, truncated to LONGEST words. Raises ValueError for an unknown word."""
    words = [WORDS.index(word) for word in text.split()][:LONGEST]
    return torch.tensor(words + [STOP] * (LONGEST - len(words)))


# --- the policy -----------------------------------------------------------------------------------------------------


def logits(policy: Policy, before: torch.Tensor, said: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Logits of the next word (…, W + 1) from `before` (…) int64, `said` (…, W) zeros and ones, `place` (…, HIDDEN)."""
    return torch.tanh(policy.before[before] + said @ policy.said + place) @ policy.out + policy.bias


def log_probabilities(policy: Policy, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each word (B, LONGEST), and the mask of words chosen by the policy, up to the first STOP."""
    before = torch.cat([torch.full_like(answers[:, :1], START), answers[:, :-1]], 1)
    said = one_hot(before, START + 1)[..., :STOP].cumsum(1).clamp(max=1).float()
    given = logits(policy, before, said, policy.place)
    logp, _ = select(given.flatten(0, 1), answers.flatten())
    return logp.view_as(answers), before != STOP


@torch.no_grad()
def sample(policy: Policy, count: int, generator: torch.Generator) -> torch.Tensor:
    """Samples `count` answers from the policy."""
    before, said = torch.full((count,), START), torch.zeros(count, STOP + 1)
    answers: list[torch.Tensor] = []
    for place in policy.place:
        chances = torch.softmax(logits(policy, before, said[:, :STOP], place), -1)
        word = torch.multinomial(chances, 1, generator=generator)[:, 0]
        before = torch.where(before == STOP, STOP, word)
        said[torch.arange(count), before] = 1
        answers.append(before)
    return torch.stack(answers, 1)


def demonstrations(count: int, seed: int) -> torch.Tensor:
    """Answers of clerks, some of whom omit a fact, state a wrong one or repeat a word."""
    draw = random.Random(seed)
    rows: list[torch.Tensor] = []
    for _ in range(count):
        phrases = [draw.choices([*row, ""], [*row.values(), 1 - sum(row.values())])[0] for row in CLERKS]
        words = " ".join(phrases).split()
        if draw.random() < STUTTER:
            at = draw.randrange(len(words))
            words.insert(at, words[at])
        rows.append(read(" ".join(words)))
    return torch.stack(rows)


def imitate(answers: torch.Tensor, steps: int, generator: torch.Generator) -> Policy:
    """Trains a policy on these answers: mean negative log-probability per word, with Adam."""
    shapes = ((STOP + 2, HIDDEN), (STOP, HIDDEN), (LONGEST, HIDDEN), (HIDDEN, STOP + 1))
    drawn = [0.2 * torch.randn(*shape, generator=generator) for shape in shapes]
    policy = Policy._make([*drawn, torch.zeros(STOP + 1)]).learning()
    optimizer = torch.optim.Adam(policy, lr=0.02)
    for _ in range(steps):
        rows = answers[torch.randint(len(answers), (ANSWERS,), generator=generator)]
        logp, mask = log_probabilities(policy, rows)
        optimizer.zero_grad()
        (-logp[mask].mean()).backward()
        optimizer.step()
    return Policy._make(numbers.detach() for numbers in policy)


# --- the reward model -----------------------------------------------------------------------------------------------


def compare(first: torch.Tensor, second: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B,) bool: whether the judge prefers the first. Answers one point apart are judged correctly 88 % of the time."""
    chances = torch.sigmoid((true_reward(first) - true_reward(second)) / SLIP)
    return torch.rand(len(first), generator=generator) < chances


def fit(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """One weight per word (W,), in points: maximum likelihood of the judge's choices with slight L2 regularisation."""
    weights = torch.zeros(STOP, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    good, bad, sure = counts(chosen), counts(rejected), torch.ones(len(chosen))
    for _ in range(FITTING):
        loss = bradley_terry(good @ weights / SLIP, bad @ weights / SLIP, sure, 0 * sure).mean()
        optimizer.zero_grad()
        (loss + 1e-3 * weights.square().sum()).backward()
        optimizer.step()
    return weights.detach()


def agreement(proxy: torch.Tensor, true: torch.Tensor) -> float | None:
    """Share of all pairs with different true rewards that the proxy ranks in the same order."""
    proxies, truths = proxy[:, None] - proxy, true[:, None] - true
    differ = truths > 0
    return float((proxies[differ] > 0).float().mean()) if bool(differ.any()) else None


@lru_cache(maxsize=8)
@one_thread()
def make_world(seed: int) -> World:
    """The initial policy and its reward model, a function of the seed alone; takes about a second."""
    generator = torch.Generator().manual_seed(seed)
    start = imitate(demonstrations(PAIRS, seed), IMITATION, generator)
    first, second = sample(start, PAIRS, generator), sample(start, PAIRS, generator)
    better = compare(first, second, generator)[:, None]
    weights = fit(torch.where(better, first, second), torch.where(better, second, first))
    both = torch.cat([first, second])
    bias = float((true_reward(both) - counts(both) @ weights).mean())
    unseen = sample(start, PAIRS, generator)
    right = agreement(counts(unseen) @ weights, true_reward(unseen))
    return World(start, weights, bias, right if right is not None else 0.0)


# --- optimisation ---------------------------------------------------------------------------------------------------


class Optimisation:
    """One run: REINFORCE with a leave-one-out baseline (RLOO) on proxy − β · KL, one update per step.

    The KL is part of the reward, as the k1 estimate summed over an answer, so that the expected gradient is that of the
    penalised objective. β = 0 means no penalty. A run's numbers depend only on (world, beta, seed).
    """

    def __init__(self, world: World, beta: float, seed: int, rate: float = 0.004) -> None:
        self.world, self.beta = world, beta
        self.policy = world.start.learning()
        self._optimizer = torch.optim.Adam(self.policy, lr=rate)
        self._generator = torch.Generator().manual_seed(seed)

    @one_thread()
    def step(self) -> Step:
        """Samples answers from the current policy, then updates it."""
        answers = sample(self.policy, ANSWERS, self._generator)
        logp, mask = log_probabilities(self.policy, answers)
        with torch.no_grad():
            reference, _ = log_probabilities(self.world.start, answers)
        distance = torch.where(mask, kl(logp.detach(), reference, "k1"), 0).sum(1)
        proxy = counts(answers) @ self.world.weights + self.world.bias
        advantages = leave_one_out((proxy - self.beta * distance)[None])[0][:, None].expand_as(logp)
        loss, _ = POLICY_LOSSES["reinforce"](logp, logp.detach(), advantages, mask, 0, 0)
        self._optimizer.zero_grad()
        (loss.sum() / ANSWERS).backward()
        self._optimizer.step()
        return Step(answers, proxy, true_reward(answers), distance)
