"""The embedded generator: equal to a naive loop, and blind to batch-mates, slots, order and threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from posttrain import rng
from posttrain.models.kernels.build import library, why_not
from posttrain.models.load import Policy
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.fused import FusedDecoder
from posttrain.rollout.generator import Request, completion_seed, draw, shape_logits
from posttrain.rollout.plain import PlainDecoder
from posttrain.rollout.scheduler import Scheduler
from posttrain.train.forward import sample_logprobs
from posttrain.types import Completion, RolloutError, Sample, SamplingParams
from tests import tiny
from tests.conftest import shared

MODELS = ["tiny", "tiny-mha", "stories260K"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODELS)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Grouped-query attention (4 heads over 2), plain multi-head attention, and a model that was really trained."""
    if request.param == "stories260K":
        return tiny.load(shared("models", "stories260K"))
    heads = 4 if request.param == "tiny-mha" else 2
    return tiny.load(tiny.make(tmp_path_factory.mktemp(request.param), heads))


@pytest.fixture(scope="module", params=["fused", "plain"])
def engine(policy: Policy, request: pytest.FixtureRequest) -> EmbeddedGenerator:
    if request.param == "fused" and library() is None:
        pytest.skip(f"no kernels here: {why_not()}")
    return engine_with(FusedDecoder if request.param == "fused" else PlainDecoder, policy)


def engine_with(decoder: type[FusedDecoder] | type[PlainDecoder], policy: Policy, slots: int = 32) -> EmbeddedGenerator:
    engine = EmbeddedGenerator(policy, slots)
    engine.decoder = decoder(policy, slots)
    return engine


def requests_for(policy: Policy, count: int, attempts: int = 2, longest: int = 40) -> list[Request]:
    return [
        Request(prompt, tuple(completion_seed(0, "test", 0, f"task-{i}", a) for a in range(attempts)))
        for i, prompt in enumerate(tiny.prompts(policy, count, longest=longest))
    ]


def same(one: Completion, other: Completion) -> bool:
    """Equal to the bit: tokens, log-probabilities, kept masses and why it stopped."""
    columns = ("tokens", "logprobs", "kept_logmass")
    return one.stop == other.stop and all(np.array_equal(getattr(one, c), getattr(other, c)) for c in columns)


def flat(groups: Sequence[Sequence[Completion]]) -> list[Completion]:
    return [c for group in groups for c in group]


@torch.no_grad()
def next_logits(policy: Policy, tokens: Sequence[int]) -> torch.Tensor:
    """(1, V) from a fresh copy of transformers' own forward pass over the whole sequence: no cache, no layout."""
    model = policy.model
    model.set_attn_implementation("sdpa")
    try:
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[:, -1]
    finally:
        model.set_attn_implementation("posttrain")


def naive(policy: Policy, request: Request, params: SamplingParams, index: int = 0) -> list[int]:
    """Recomputes everything for every token."""
    uniforms, out = rng.uniforms(request.seeds[index], params.max_tokens), []
    for number in uniforms:
        logits = next_logits(policy, [*request.prompt.tolist(), *out])
        out.append(int(draw(logits, torch.tensor([number]), params)[0]))
        if out[-1] in policy.stop_ids:
            break
    return out


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_the_engine_writes_what_a_naive_loop_writes(
    policy: Policy, engine: EmbeddedGenerator, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=24)
    requests = requests_for(policy, 4, attempts=1)
    for request, (completion,) in zip(requests, engine.generate(requests, params), strict=True):
        assert completion.tokens.tolist() == naive(policy, request, params)


def test_a_prefix_is_continued_with_the_numbers_of_its_later_positions(
    policy: Policy, engine: EmbeddedGenerator
) -> None:
    """Continuing the first k tokens of a completion with its own seed gives the rest of it."""
    params = SamplingParams(max_tokens=24)
    (request,) = requests_for(policy, 1, attempts=1)
    ((whole,),) = engine.generate([request], params)
    written: list[int] = []
    for k in (0, 1, len(whole.tokens) // 2, len(whole.tokens) - 1):
        rest = replace(params, max_tokens=params.max_tokens - k)
        ((completion,),) = engine.generate([replace(request, prefix=whole.tokens[:k])], rest)
        assert completion.tokens.tolist() == whole.tokens[k:].tolist() and completion.stop == whole.stop
        np.testing.assert_allclose(completion.logprobs, whole.logprobs[k:], atol=1e-4)
        written.append(len(completion.tokens))
    assert written == [len(whole.tokens) - k for k in (0, 1, len(whole.tokens) // 2, len(whole.tokens) - 1)]


def test_continuations_of_one_prefix_are_a_group_like_any_other(policy: Policy, engine: EmbeddedGenerator) -> None:
    params = SamplingParams(max_tokens=8)
    request = replace(requests_for(policy, 1, attempts=5)[0], prefix=np.array([7, 8, 9], np.int32))
    (together,) = engine.generate([request], params)
    alone = [engine.generate([replace(request, seeds=(seed,))], params)[0][0] for seed in request.seeds]
    assert all(same(one, other) for one, other in zip(together, alone, strict=True))
    naively = replace(request, prompt=request.context, prefix=np.zeros(0, np.int32))
    shifted = [rng.uniforms(seed, 3 + params.max_tokens)[3:] for seed in request.seeds]
    for completion, uniforms in zip(together, shifted, strict=True):
        logits = next_logits(policy, naively.prompt.tolist())
        assert int(draw(logits, torch.tensor([uniforms[0]]), params)[0]) == completion.tokens[0]


def test_a_prefix_counts_towards_the_context(policy: Policy, engine: EmbeddedGenerator) -> None:
    context = policy.config.max_position_embeddings
    request = Request(np.arange(3, 13), (0,), prefix=np.full(context - 20, 5, np.int32))
    with pytest.raises(RolloutError, match=f"a prompt of {context - 10} tokens"):
        engine.generate([request], SamplingParams(max_tokens=11))


@pytest.mark.parametrize("truncation", [{}, {"top_k": 40, "top_p": 0.95}], ids=["whole", "truncated"])
def test_a_completion_does_not_depend_on_batch_mates_slots_order_or_threads(
    policy: Policy, engine: EmbeddedGenerator, truncation: dict[str, Any]
) -> None:
    """One prompt is long, so that short ones share calls whose keys reach far beyond their own."""
    params = SamplingParams(max_tokens=16, **truncation)
    requests = requests_for(policy, 14, attempts=3) + requests_for(policy, 1, attempts=3, longest=1)
    requests.append(Request(np.arange(3, 203) % policy.vocab, (5,)))
    together = engine.generate(requests, params)
    kind = FusedDecoder if isinstance(engine.decoder, FusedDecoder) else PlainDecoder
    assert sum(len(r.seeds) for r in requests) > engine.slots  # so slots were refilled and moved
    for number in (0, 3, 14, 15):
        (alone,) = engine.generate([requests[number]], params)
        assert all(same(a, b) for a, b in zip(alone, together[number], strict=True))
    (single,) = engine.generate([Request(requests[2].prompt, requests[2].seeds[1:2])], params)
    assert same(single[0], together[2][1])
    backwards = engine.generate(requests[::-1], params)[::-1]
    assert all(same(a, b) for a, b in zip(flat(backwards), flat(together), strict=True))
    more_slots = engine_with(kind, policy, 96).generate(requests, params)
    assert all(same(a, b) for a, b in zip(flat(more_slots), flat(together), strict=True))
    with tiny.threads(2):
        threaded = engine_with(kind, policy).generate(requests, params)
    assert all(same(a, b) for a, b in zip(flat(threaded), flat(together), strict=True))


def test_attempts_at_one_prompt_differ_by_seed_alone(policy: Policy, engine: EmbeddedGenerator) -> None:
    prompt = tiny.prompts(policy, 1)[0]
    ((first, again, other),) = engine.generate([Request(prompt, (1, 1, 2))], SamplingParams(max_tokens=20))
    assert same(first, again) and first.tokens.tolist() != other.tokens.tolist()


def test_temperature_zero_ignores_the_seed(policy: Policy, engine: EmbeddedGenerator) -> None:
    prompt = tiny.prompts(policy, 1)[0]
    ((first, other),) = engine.generate([Request(prompt, (1, 2))], SamplingParams(temperature=0, max_tokens=20))
    assert same(first, other) and not first.kept_logmass.any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probabilities_are_the_learners(
    policy: Policy, engine: EmbeddedGenerator, temperature: float
) -> None:
    requests = requests_for(policy, 8)
    groups = engine.generate(requests, SamplingParams(temperature=temperature, max_tokens=30, top_k=10, top_p=0.9))
    samples: list[Sample] = []
    for request, group in zip(requests, groups, strict=True):
        for c in group:
            tokens = np.concatenate([request.prompt, c.tokens])
            behaviour = np.concatenate([np.zeros(len(request.prompt), np.float32), c.logprobs])
            samples.append(Sample(tokens, np.arange(len(tokens)) >= len(request.prompt), behaviour, behaviour))
    for sample, logp in zip(samples, sample_logprobs(policy, samples, 200, temperature), strict=True):
        np.testing.assert_allclose(sample.behaviour_logp, logp, rtol=1e-5, atol=1e-5)


def stopping_at(policy: Policy, stop: int) -> EmbeddedGenerator:
    return EmbeddedGenerator(Policy(policy.model, policy.tokenizer, policy.source, (stop,)), slots=32)


def test_a_completion_ends_with_its_stop_token_or_is_marked_as_cut(policy: Policy, engine: EmbeddedGenerator) -> None:
    """The stop token is chosen among what the model wrote, so both ends occur."""
    requests, params = requests_for(policy, 6), SamplingParams(max_tokens=25)
    before = flat(engine.generate(requests, params))
    longest = max(range(len(before)), key=lambda i: len(before[i].tokens))
    stop = int(before[longest].tokens[10])
    after = flat(stopping_at(policy, stop).generate(requests, params))
    assert after[longest].stop == "stop"
    for free, cut in zip(before, after, strict=True):
        written = free.tokens.tolist()
        if free.stop == "length" and stop in written:
            assert cut.stop == "stop" and cut.tokens.tolist() == written[: written.index(stop) + 1]
        if cut.stop == "stop":
            assert cut.tokens[-1] == stop and stop not in cut.tokens[:-1]
        else:
            assert len(cut.tokens) == 25 and stop not in cut.tokens


def test_completions_carry_the_version_of_the_weights_they_were_sampled_from(
    policy: Policy, engine: EmbeddedGenerator
) -> None:
    engine.load(engine.weights(), version=7)
    request = requests_for(policy, 1)
    assert {c.version for c in flat(engine.generate(request, SamplingParams(max_tokens=2)))} == {7}


def test_on_token_hears_every_token_of_every_completion(policy: Policy, engine: EmbeddedGenerator) -> None:
    heard: dict[tuple[int, int], list[int]] = {}
    groups = engine.generate(
        requests_for(policy, 20), SamplingParams(max_tokens=8), lambda g, i, t: heard.setdefault((g, i), []).append(t)
    )
    assert heard == {(g, i): c.tokens.tolist() for g, group in enumerate(groups) for i, c in enumerate(group)}


def test_a_limit_cuts_one_completion_where_it_says_and_leaves_the_others_alone(
    policy: Policy, engine: EmbeddedGenerator
) -> None:
    requests, params = requests_for(policy, 12), SamplingParams(max_tokens=12)
    limits = [(1 + i % 5, 30) for i in range(len(requests))]
    limited = [replace(r, limits=limit) for r, limit in zip(requests, limits, strict=True)]
    before, after = engine.generate(requests, params), engine.generate(limited, params)
    for (free, other), (cut, same_other), (limit, _) in zip(before, after, limits, strict=True):
        assert cut.tokens.tolist() == free.tokens[:limit].tolist()
        assert same(other, same_other)


def test_limits_that_do_not_fit_the_seeds_are_refused() -> None:
    for limits in ((3,), (3, 0)):
        with pytest.raises(RolloutError, match="give one limit of at least 1 per seed"):
            Request(np.ones(2, int), (1, 2), limits)


def test_a_context_that_cannot_hold_the_answer_is_refused(policy: Policy, engine: EmbeddedGenerator) -> None:
    context = policy.config.max_position_embeddings
    fits = Request(np.full(context - 4, 5), (1,))
    assert len(engine.generate([fits], SamplingParams(max_tokens=4))[0][0].tokens) <= 4
    with pytest.raises(RolloutError, match=f"exceeds the model's context of {context}") as error:
        engine.generate([fits], SamplingParams(max_tokens=5))
    assert error.value.boundary == "generator"


def test_a_request_without_prompt_or_seed_is_refused() -> None:
    for prompt, seeds in ((np.zeros(0, int), (1,)), (np.ones(2, int), ())):
        with pytest.raises(RolloutError, match="both must be at least 1"):
            Request(prompt, seeds)


# --- drawing one token -------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[0.0, 2.0, -1.0, 1.0, 0.5, -3.0, 1.5, -0.5]])
GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), {0, 1, 2, 3, 4, 5, 6, 7}),
        (SamplingParams(top_k=3), {1, 6, 3}),
        (SamplingParams(top_k=1), {1}),
        (SamplingParams(top_k=99), {0, 1, 2, 3, 4, 5, 6, 7}),
        (SamplingParams(top_p=0.4), {1}),
        (SamplingParams(top_p=0.6), {1, 6}),
        (SamplingParams(top_p=1e-9), {1}),
        (SamplingParams(top_p=0.85, top_k=4), {1, 6, 3}),
        (SamplingParams(temperature=0.5, top_p=0.9), {1, 6, 3}),
        (SamplingParams(temperature=3.0, top_k=2), {1, 6}),
    ],
    ids=str,
)
def test_draws_follow_the_truncated_distribution(params: SamplingParams, kept: set[int]) -> None:
    """Over an even grid of uniforms each token comes up as often as its probability says, to one grid point."""
    p = (LOGITS[0].double() / params.temperature).softmax(0)
    inside = torch.tensor([i in kept for i in range(8)])
    tokens, logprobs, mass = draw(LOGITS.expand(len(GRID), -1), GRID, params)
    assert set(tokens.tolist()) == kept
    expected = torch.where(inside, p / p[inside].sum(), 0) * len(GRID)
    counts = torch.bincount(tokens, minlength=8)
    assert (counts - expected).abs().max() <= 1.01
    torch.testing.assert_close(logprobs, p.log()[tokens].float())
    torch.testing.assert_close(mass, p[inside].sum().log().float().expand(len(GRID)), rtol=0, atol=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """Probabilities 0.5, 0.25, 0.125, 0.125: 0.5 is reached by one token, anything more needs two."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    sizes = [int((shape_logits(logits, SamplingParams(top_p=p))[1] > -math.inf).sum()) for p in (0.49, 0.51, 0.76, 0.9)]
    assert sizes == [1, 2, 3, 4]


def test_random_logits_never_yield_a_dropped_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(500, 97, generator=generator)
    edge = torch.tensor([0.0, 1 - 2**-53, 0.5, 1e-300, 2**-53], dtype=torch.float64).repeat(100)
    for params in (SamplingParams(top_k=5), SamplingParams(top_p=0.7), SamplingParams(top_k=20, top_p=0.9)):
        full, kept = shape_logits(logits, params)
        tokens, logprobs, mass = draw(logits, edge, params)
        assert (kept.gather(1, tokens.unsqueeze(1)) > -math.inf).all()
        assert torch.equal(logprobs, full.gather(1, tokens.unsqueeze(1)).squeeze(1))
        torch.testing.assert_close(mass, kept.double().exp().sum(1).log().float())
        assert (mass <= 1e-6).all() and (logprobs <= mass + 1e-6).all()


def test_equal_logits_are_never_told_apart_by_top_k() -> None:
    """A tie at the k-th place keeps all of it: which equal token a sort puts first must not matter."""
    _, kept = shape_logits(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), SamplingParams(top_k=2))
    assert (kept > -math.inf).tolist() == [[True, True, True, False]]


# --- who decodes where -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 32])
def test_the_scheduler_runs_every_sequence_once_and_keeps_used_slots_in_front(slots: int) -> None:
    draw_from, members = np.random.default_rng(slots), [3, 1, 4, 1, 5]
    scheduler, where, started = Scheduler(slots, members), dict[int, tuple[int, int]](), []
    while scheduler.waiting or where:
        for slot, group, index in scheduler.admit():
            assert slot < slots and slot not in where
            where[slot] = (group, index)
            started.append((group, index))
        assert len(where) == slots or not scheduler.waiting  # a free slot never waits
        ended = [s for s in where if draw_from.random() < 0.4]
        for slot in ended:
            scheduler.finish(slot)
            del where[slot]
        for source, target in scheduler.compact():
            assert target < source and target not in where
            where[target] = where.pop(source)
        assert sorted(where) == list(range(scheduler.active))
    assert started == [(g, i) for g, count in enumerate(members) for i in range(count)]


def test_a_group_is_over_when_none_of_it_waits() -> None:
    scheduler = Scheduler(2, [3, 1])
    scheduler.admit()
    assert not scheduler.last_of_group(0)
    scheduler.finish(0)
    scheduler.admit()
    assert scheduler.last_of_group(0) and not scheduler.last_of_group(1)
