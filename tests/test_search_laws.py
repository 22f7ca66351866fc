"""Laws of the search strategies, on games whose trees are known in full and on the built-in model."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain import config
from posttrain.config.evaluation import EvalRecipe
from posttrain.config.search import SearchConfig, rounds
from posttrain.data.chat import ChatFormat
from posttrain.data.tasks.load import TaskSets
from posttrain.models.load import Policy, load_policy
from posttrain.rewards.judging import Verifier
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import Collector
from posttrain.rollout.tasks import judged_tasks
from posttrain.search import adaptive, choose, mcts, particles, rebase
from posttrain.search.best_of_n import expected_pick
from posttrain.search.engine import Engine
from posttrain.search.run import SearchResult, check, search, search_all
from posttrain.search.scorers import Confidence, Reward, Scored, lowest_confidence
from posttrain.search.strategies import STRATEGIES
from posttrain.search.tree import Node
from posttrain.types import ConfigError, Task, Verdict
from tests.search_games import TASK, Game, Path, Values, moves

strategies = pytest.mark.parametrize("name", STRATEGIES)
SEPARATOR = ", "


@cache
def model() -> tuple[Policy, ChatFormat]:
    policy = load_policy(config.ModelConfig(path="abacus"))
    return policy, ChatFormat(policy.tokenizer, "chat")


@cache
def problems() -> tuple[TaskSets, Verifier]:
    recipe = config.resolve_as(EvalRecipe, {}, {"data.tasks": "arithmetic", "eval.problems": 6, "data.count": 64})
    return judged_tasks(recipe, model()[1], train=False)


def opened(**rollout: Any) -> tuple[Collector, list[Task]]:
    """A collector on the built-in model, and held-out problems."""
    settings = {"rollout.max_tokens": 48} | {f"rollout.{k}": v for k, v in rollout.items()}
    policy, chat = model()
    sets, verify = problems()
    return make_collector(policy, chat, verify, config.resolve_as(EvalRecipe, {}, settings)), list(sets.test)


def found(cfg: SearchConfig, scorer: Any = None, tasks: int = 6, **rollout: Any) -> tuple[list[SearchResult], Engine]:
    collector, held_out = opened(**rollout)
    engine = Engine(collector, model()[1].written_tokens, SEPARATOR)
    results = dict(search_all(held_out[:tasks], engine, scorer, cfg, 0, collector.generator.slots))  # type: ignore
    return [results[i] for i in range(tasks)], engine


def settings(name: str, budget: int = 4, **more: Any) -> SearchConfig:
    own = {"budget-forcing": {"least_thinking": 20, "most_thinking": 40}}.get(name, {})
    return SearchConfig(strategy=name, budget=budget, scorer="confidence", **(own | more))  # type: ignore[arg-type]


def tokens_of(results: list[SearchResult]) -> list[list[list[int]]]:
    """The tokens of all completions of each problem, sorted."""
    return [sorted(node.prefix.tolist() for node in one.completions) for one in results]


def trees(results: list[SearchResult]) -> list[Any]:
    return [one.tree.as_dict() for one in results]


class Constant(Values):
    """The same score for everything."""

    def __init__(self) -> None:
        super().__init__(lambda path: 0.5)

    def __call__(self, nodes: Any) -> list[Scored]:
        return [Scored((0.5,)) for _ in nodes]


# ---- what every strategy does


@strategies
def test_tokens_reported_are_tokens_the_engine_counted(name: str) -> None:
    collector, tasks = opened()
    counted = 0
    plain = collector.generator.generate

    def counting(*given: Any, **named: Any) -> Any:
        nonlocal counted
        made = plain(*given, **named)
        counted += sum(len(completion.tokens) for group in made for completion in group)
        return made

    collector.generator.generate = counting  # type: ignore[method-assign]
    engine = Engine(collector, model()[1].written_tokens, SEPARATOR)
    results = dict(search_all(tasks, engine, Confidence(), settings(name), 0))
    assert counted == engine.generated == sum(one.generated for one in results.values()) > 0
    for one in results.values():
        assert one.chosen in one.completions and one.completions


@strategies
def test_slots_threads_and_the_other_problems_change_nothing(name: str) -> None:
    whole, _ = found(settings(name, 3), Confidence(), tasks=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads < 3 else 1)
    try:
        assert trees(found(settings(name, 3), Confidence(), tasks=2, slots=16)[0]) == trees(whole)
    finally:
        torch.set_num_threads(threads)
    alone, _ = found(settings(name, 3), Confidence(), tasks=1)
    assert trees(alone) == trees(whole)[:1]


@strategies
def test_a_doubled_budget_begins_with_what_was_sampled_before(name: str) -> None:
    width = {"width": 2} if "width" in STRATEGIES[name].settings else {}
    half, _ = found(settings(name, 2, **width), Confidence(), tasks=3)
    double, _ = found(settings(name, 4, **width), Confidence(), tasks=3)
    if name == "adaptive":  # both may stop before the budget
        double = [replace(b, completions=b.completions) for b in double]
    for small, large in zip(half, double, strict=True):
        first = [node["tokens"] for node in small.tree.as_dict()["nodes"]]
        assert [node["tokens"] for node in large.tree.as_dict()["nodes"]][: len(first)] == first


@strategies
def test_a_completion_is_within_its_length_and_its_text_is_that_of_its_tokens(name: str) -> None:
    results, engine = found(settings(name), Confidence())
    for one in results:
        for node in one.completions:
            assert 1 <= len(node.prefix) <= 48 and sum(n for part in node.path for n in part.pieces) == len(node.prefix)
            shown = engine.collector.decode(node.prefix[:-1] if node.end == "stop" else node.prefix)
            assert node.text == shown


@strategies
def test_settings_of_other_strategies_are_refused(name: str) -> None:
    own = STRATEGIES[name].settings
    others = {"width": 2, "expansions": 3, "exploration": 2.0, "confidence": 0.9, "least_thinking": 3,
              "share_temperature": 1.0, "resample_below": 0.1, "wait": "Hm", "most_thinking": 9}  # fmt: skip
    for setting, value in others.items():
        cfg = SearchConfig(strategy=name, scorer="confidence", **{setting: value})  # type: ignore[arg-type]
        if setting in own:
            check(cfg, Confidence())
        else:
            with pytest.raises(ConfigError, match=f"search.{setting}"):
                check(cfg, Confidence())


@strategies
def test_missing_scores_are_refused_before_anything_is_sampled(name: str) -> None:
    needs = STRATEGIES[name].scores
    whole = Reward(lambda task, text: Verdict(1.0, True))
    if needs == "none":
        check(SearchConfig(strategy=name), None)
        with pytest.raises(ConfigError, match="needs scores"):
            check(SearchConfig(strategy=name, choose="weighted"), None)
        return
    with pytest.raises(ConfigError, match="needs scores"):
        check(SearchConfig(strategy=name), None)
    if needs == "steps":
        with pytest.raises(ConfigError, match="reads finished ones only"):
            check(SearchConfig(strategy=name, scorer="auto"), whole)
    else:
        check(SearchConfig(strategy=name, scorer="auto"), whole)


# ---- equalities between strategies


def independent(budget: int) -> list[list[list[int]]]:
    return tokens_of(found(SearchConfig(strategy="majority", budget=budget))[0])


@pytest.mark.parametrize(
    "cfg",
    [
        settings("beam", 6, expansions=1),
        settings("beam", 6, expansions=1, width=2),
        settings("dvts", 6, expansions=1),
        settings("best-of-n", 6),
    ],
    ids=["beam", "beam in rounds", "dvts", "best-of-n"],
)
def test_without_pruning_there_are_independent_samples(cfg: SearchConfig) -> None:
    results, engine = found(cfg, Confidence())
    assert tokens_of(results) == independent(6)
    assert any(len(node.path) > 2 for one in results for node in one.completions) or cfg.strategy == "best-of-n"


def test_particles_with_a_constant_score_are_independent_samples() -> None:
    assert tokens_of(found(settings("particles", 6), Constant())[0]) == independent(6)


def test_rebase_with_equal_shares_is_independent_samples() -> None:
    results, _ = found(settings("rebase", 6, share_temperature=math.inf), Confidence())
    assert tokens_of(results) == independent(6)


def test_dvts_with_one_subtree_is_beam_that_keeps_one() -> None:
    beam, _ = found(settings("beam", 4, expansions=4), Confidence())
    dvts, _ = found(settings("dvts", 4, expansions=4), Confidence())
    assert trees(beam) == trees(dvts)


def test_weighted_majority_with_equal_weights_is_majority() -> None:
    plain, _ = found(settings("majority", 8), Constant())
    weighted, _ = found(settings("majority", 8, choose="weighted"), Constant())
    assert [one.answer for one in plain] == [one.answer for one in weighted]


def test_early_rejection_keeps_the_best_and_rejects_nothing_at_zero() -> None:
    none, _ = found(settings("best-of-n", 6), Confidence())
    some, engine = found(settings("best-of-n", 6, reject=0.5), Confidence())
    assert tokens_of(none) == independent(6)
    assert all(len(a.completions) < len(b.completions) for a, b in zip(some, none, strict=True)) or engine.generated
    assert sum(one.generated for one in some) < sum(one.generated for one in none)


# ---- MCTS on enumerable trees


def random_game(seed: int) -> tuple[int, int, Callable[[Path], float]]:
    """Branches, depth and exact values of a random tree."""
    draw = random.Random(seed)
    branches, depth = draw.choice([2, 3]), draw.choice([2, 3])
    leaves = {path: draw.random() for path in itertools.product(range(branches), repeat=depth)}

    @cache
    def value(path: Path) -> float:
        return leaves[path] if len(path) == depth else max(value((*path, i)) for i in range(branches))

    return branches, depth, value


def played(seed: int, exploration: float, partial: bool = True, factor: int = 10) -> tuple[SearchResult, int]:
    """MCTS on a random tree with `factor` times as many simulations as leaves, and the best first move."""
    branches, depth, value = random_game(seed)
    game = Game(lambda path: branches if len(path) < depth else 0)
    cfg = SearchConfig(strategy="mcts", budget=factor * branches**depth, expansions=branches, scorer="exact",
                       exploration=exploration)  # fmt: skip
    best = max(range(branches), key=lambda move: value((move,)))
    return search(TASK, game, Values(value, partial), cfg, 0), best  # type: ignore[arg-type]


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_mcts_finds_the_best_move_of_random_trees(first: int) -> None:
    for seed in range(first, first + 50):
        result, best = played(seed, 0.5)
        assert result.chosen is not None and moves(result.chosen)[0] == best, seed


def test_mcts_without_exploration_and_exact_values_walks_the_best_path() -> None:
    for seed in range(30):
        branches, depth, value = random_game(seed)
        result, _ = played(seed, 0.0, factor=1)
        walked = [node for node in mcts.most_visited(result.tree.root).path]
        for node in walked:
            assert value(moves(node)) == max(value((*moves(node)[:-1], i)) for i in range(branches))


def test_mcts_values_converge_and_visits_add_up() -> None:
    for seed in range(10):
        result, _ = played(seed, 0.5, factor=40)
        branches, _, value = random_game(seed)
        root = result.tree.root
        assert abs(root.value - value(())) < 0.1
        for node in result.tree.nodes:
            if inner := mcts.steps(node):
                assert node.visits - sum(child.visits for child in inner) in (0, 1)  # its own first evaluation


def test_puct_by_hand() -> None:
    parent = Node(0, None)
    parent.visits = 9
    children = [Node(i + 1, parent, i) for i in range(3)]
    for child, visits, value, p in zip(children, (4, 4, 0), (0.5, 0.25, 0.0), (0.5, 0.25, 0.25), strict=True):
        child.visits, child.value, child.logprobs = visits, value, np.log([p]).astype(np.float32)
    children[2].score = 0.4
    # Q + c · P · √9 / (1 + n) with c = 2
    expected = [0.5 + 2 * 0.5 * 3 / 5, 0.25 + 2 * 0.25 * 3 / 5, 0.4 + 2 * 0.25 * 3 / 1]
    assert mcts.puct(parent, children, 2.0) == pytest.approx(expected, abs=1e-6)


def test_visits_follow_puct_worked_by_hand() -> None:
    # one node, two endings worth 1 and 0, equal priors, c = 1: the first evaluation of the root expands it
    game = Game(lambda path: 2 if not path else 0)
    cfg = SearchConfig(strategy="mcts", budget=6, expansions=2, scorer="exact", exploration=1.0)
    result = search(TASK, game, Values(lambda path: 1.0 - path[0]), cfg, 0)  # type: ignore[arg-type]
    # a: 1 + ½√N/(1+n), b: 0 + ½√N/(1+m). N counts the root's visits: a at 1..6 while 1 + ½√N/(1+n) > ½√N
    assert [child.visits for child in result.tree.root.children] == [6, 0]
    equal = search(TASK, Game(lambda path: 2 if not path else 0), Values(lambda path: 0.5), cfg, 0)  # type: ignore
    assert [child.visits for child in equal.tree.root.children] == [3, 3]


def test_rollouts_give_values_where_unfinished_completions_cannot_be_scored() -> None:
    result, best = played(3, 0.5, partial=False)
    assert result.chosen is not None and moves(result.chosen)[0] == best
    assert any(node.note == mcts.ROLLOUT for node in result.tree.nodes)


# ---- shares, particles, votes


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 40), st.sampled_from([0.05, 0.2, 1.0, math.inf])
)
def test_shares_add_up_follow_the_scores_and_are_equal_at_infinite_temperature(
    scores: list[float], width: int, temperature: float
) -> None:
    counts = rebase.shares(scores, width, temperature)
    assert sum(counts) == width and min(counts) >= 0
    for (a, i), (b, j) in itertools.permutations(zip(scores, counts, strict=True), 2):
        assert not a > b + 1e-6 or i >= j - (math.isinf(temperature))
    if math.isinf(temperature):
        assert max(counts) - min(counts) <= 1


def test_shares_by_hand() -> None:
    # softmax([ln 2, 0, 0]) = ½, ¼, ¼
    assert rebase.shares([math.log(2), 0, 0], 8, 1.0) == [4, 2, 2]
    assert rebase.shares([math.log(2), 0, 0], 6, 1.0) == [3, 2, 1]
    assert rebase.shares([-math.inf, 0.2], 3, 1.0) == [0, 3] and rebase.shares([-math.inf] * 2, 3, 1.0) == [2, 1]


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20), st.floats(0, 0.999))
def test_systematic_resampling_is_within_one_of_the_weights(weights: list[float], place: float) -> None:
    shares = [weight / sum(weights) for weight in weights]
    kept = Counter(particles.systematic(shares, place))
    assert sum(kept.values()) == len(weights)
    for i, share in enumerate(shares):
        assert math.floor(share * len(weights) - 1e-6) <= kept[i] <= math.ceil(share * len(weights) + 1e-6)
    assert 1 - 1e-9 <= particles.ess(shares) <= len(weights) + 1e-6


def test_the_vote_is_decided_by_the_beta_posterior() -> None:
    # Beta(n + 1, 1) has the mass 1 − 2^−(n+1) above one half
    assert [adaptive.lead(n, 0) for n in (1, 2, 4)] == [0.75, 0.875, 0.96875]
    assert adaptive.lead(3, 3) == 0.5
    share = np.linspace(0, 1, 40001)
    density = share**5 * (1 - share) ** 2
    above = np.where(share >= 0.5, density, 0).sum() / density.sum()
    assert adaptive.lead(5, 2) == pytest.approx(above, abs=1e-3)


def test_adaptive_stops_when_all_agree_and_asks_on_when_they_do_not() -> None:
    same = Game(lambda path: 0)
    cfg = SearchConfig(strategy="adaptive", budget=16, confidence=0.95)
    fixed = _answering(same, lambda n: "7")
    assert len(search(TASK, fixed, None, cfg, 0).completions) == 4  # 1 − 2⁻⁵ ≥ 0.95
    split = _answering(Game(lambda path: 0), lambda n: str(n))
    assert len(search(TASK, split, None, cfg, 0).completions) == 16


def _answering(game: Game, text: Callable[[int], str]) -> Any:
    """The game, whose n-th completion has the text n."""
    plain = game.sample

    def sample(asked: Any) -> Any:
        made = plain(asked)
        for nodes in made:
            for node in nodes:
                node.text = text(node.index)
        return made

    game.sample = sample  # type: ignore[method-assign]
    return game


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=8), st.data())
def test_expected_majority_is_the_mean_over_all_subsets(answers: list[int], data: st.DataObject) -> None:
    right = data.draw(st.sets(st.integers(0, 4)))
    passed = [answer in right for answer in answers]
    n = data.draw(st.integers(1, len(answers)))
    total = 0.0
    subsets = list(itertools.combinations(range(len(answers)), n))
    for subset in subsets:
        votes = Counter(answers[i] for i in subset if answers[i] >= 0)
        top = [answer for answer, count in votes.items() if count == max(votes.values())]
        total += sum(answer in right for answer in top) / len(top) if top else 0
    assert choose.expected_vote(answers, passed, n) == pytest.approx(total / len(subsets))


def test_expected_majority_by_hand_and_at_its_ends() -> None:
    # A A B: of the three pairs one is AA, two tie
    assert choose.expected_vote([0, 0, 1], [True, True, False], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert choose.expected_vote([0, 0, 1], [True, True, False], 3) == 1.0
    assert choose.expected_vote([0, 0, 1], [True, True, False], 1) == pytest.approx(2 / 3)
    assert choose.expected_vote([0] * 200 + [1] * 56, [True] * 200 + [False] * 56, 64) > 0.999
    with pytest.raises(ValueError, match="1 ≤ n ≤ N=2"):
        choose.expected_vote([0, 1], [True, False], 3)
    assert expected_pick(np.array([0.1, 0.9]), np.array([0.0, 1.0]), 2) == 1.0


def test_answers_vote_as_mathematics() -> None:
    texts = [r"\boxed{1/2}", r"The answer is 0.5", r"#### 3", r"\boxed{\frac{1}{2}}", ""]
    assert choose.classes(texts) == [0, 0, 1, 0, -1]
    assert choose.vote([0, 0, 1, -1], [1, 1, 3, 9]) == 2 and choose.vote([-1], [1.0]) == -1
    assert choose.vote([1, 0, 0, 1], [1, 1, 1, 1]) == 0  # ties go to the answer that came first


def test_the_lowest_confidence_is_that_of_the_worst_window() -> None:
    node = Node(1, Node(0, None), logprobs=np.log(np.array([0.5, 0.5, 0.125, 0.125, 1.0], np.float32)))
    assert lowest_confidence(node, 2) == pytest.approx(0.125)
    assert lowest_confidence(node, 8) == pytest.approx((0.5 * 0.5 / 64) ** (1 / 5))


def test_rounds_spend_the_whole_budget() -> None:
    for budget, width in itertools.product(range(1, 20), range(0, 20)):
        if width <= budget:
            spent = rounds(SearchConfig(strategy="beam", budget=budget, width=width))
            assert sum(spent) == budget and all(one == (width or budget) for one in spent[:-1])


def test_budget_forcing_holds_thinking_between_its_bounds() -> None:
    results, _ = found(settings("budget-forcing", 4, least_thinking=16, most_thinking=30), Confidence())
    thoughts = [node for one in results for node in one.completions if node.text.startswith("<think>")]
    assert thoughts
    for node in thoughts:
        *_, end = [part for part in node.path if "</think>" in part.text]
        closed = next(part for part in node.path if "</think>" in part.text)
        before = len(closed.prefix)
        assert 16 <= before <= 30 + len("</think>") or end is closed
