"""Continuing kept prefixes: whether keys and values are kept or computed again makes no difference to any result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import architectures, zoo
from posttrain.cluster.messages import decode, encode
from posttrain.models.kernels.build import library, why_not
from posttrain.models.load import Policy, trainable
from posttrain.models.policy import Route
from posttrain.rollout.decoding import Decoder
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.fused import FusedDecoder
from posttrain.rollout.general import GeneralDecoder
from posttrain.rollout.generator import Generator, Request
from posttrain.rollout.journal import Journal
from posttrain.rollout.plain import PlainDecoder
from posttrain.types import Completion, RolloutError, SamplingParams
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[Policy, int], Decoder]
DECODERS: dict[str, tuple[str, Make]] = {
    "fused": ("abacus", FusedDecoder),
    "plain": ("tiny", PlainDecoder),
    "general": ("gemma 2", GeneralDecoder),
    "a state": ("mamba", GeneralDecoder),
    "whole rows": ("tiny", GeneralDecoder),
}
"""By name: a model and its decoder. `a state` has no keys and values, and `whole rows` has no cache."""
PROMPTS = [np.arange(5, 27), np.arange(9, 12)]
PARAMS = SamplingParams(max_tokens=6)
Said = tuple[list[int], bytes, bytes, str]


class Setup:
    """A model and its decoder; makes generators."""

    def __init__(self, policy: Policy, make: Make) -> None:
        self.policy, self.make = policy, make

    def generator(self, prefix_bytes: int = 1 << 30, slots: int = 32) -> EmbeddedGenerator:
        made = EmbeddedGenerator(self.policy, slots, prefix_bytes=prefix_bytes)
        made.decoder = self.make(self.policy, made.slots)
        return made


@pytest.fixture(scope="module", params=DECODERS)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    model, make = DECODERS[request.param]
    if make is FusedDecoder and library() is None:
        pytest.skip(f"no kernels here: {why_not()}")
    folder = tmp_path_factory.mktemp("model")
    if model == "tiny":
        tiny.make(folder)
    elif model != "abacus":
        of, sizes = zoo.ZOO[model]
        torch.manual_seed(0)
        architectures.save(getattr(transformers, of)(**sizes), folder)
    policy = tiny.load(Path("abacus") if model == "abacus" else folder)
    if request.param == "whole rows":
        policy.route = Route(0, policy.route.own, False)
    return Setup(replace(policy, stop_ids=()), make)


def said(completion: Completion) -> Said:
    return (
        completion.tokens.tolist(), completion.logprobs.tobytes(), completion.kept_logmass.tobytes(), completion.stop
    )  # fmt: skip


def grown(generator: Callable[[int], Generator | Journal], cut: bool = False, depths: int = 3) -> list[Said]:
    """A small tree: two completions of each prompt, and twice pieces after them; the first path of a prompt has two
    children, of which one goes on, and with `cut` the second is cut in its middle."""
    out: list[Said] = []
    paths = [Request(prompt, (10 * p + i,), keep=True) for p, prompt in enumerate(PROMPTS) for i in range(2)]
    for depth in range(depths):
        asked = [replace(r, seeds=(r.seeds[0], 77 + r.seeds[0])) if r.seeds[0] % 10 == 0 else r for r in paths]
        groups = generator(depth).generate(asked, replace(PARAMS, max_tokens=4 + 2 * depth))
        out += [said(completion) for group in groups for completion in group]
        paths = [continued(r, group[-1], cut and r.seeds[0] % 10 == 1) for r, group in zip(paths, groups, strict=True)]
    return out


def continued(request: Request, completion: Completion, half: bool = False) -> Request:
    """The request that continues a completion, or the first half of it."""
    tokens = completion.tokens[: len(completion.tokens) // 2] if half else completion.tokens
    prefix = np.concatenate([request.prefix, tokens])
    return replace(request, prefix=prefix, pieces=(*request.pieces, len(tokens)))


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_kept_and_computed_again_are_the_same_bits(setup: Setup, cut: bool) -> None:
    kept, none = setup.generator(), setup.generator(0)
    truth = grown(lambda _: kept, cut)
    assert grown(lambda _: none, cut) == truth, "nothing is kept"
    assert len(none.prefixes) == 0 < len(kept.prefixes)
    little = setup.generator(kept.prefixes.bytes // 4)
    assert grown(lambda _: little, cut) == truth, "most of it is dropped in the middle"
    assert 0 < little.prefixes.bytes <= little.prefixes.budget
    assert grown(lambda _: setup.generator(), cut) == truth, "each call is another process's"
    few = setup.generator(slots=1)
    few.slots = 2  # so that requests are sampled in several parts, and slots are refilled
    assert grown(lambda _: few, cut) == truth, "few slots"
    if setup.make is not GeneralDecoder:  # whose rounding depends on threads: torch computes it
        with tiny.threads(2):
            threaded = setup.generator()
            begun = grown(lambda _: threaded, cut, depths=2)
        assert begun == truth[: len(begun)], "two threads"


def test_other_requests_and_their_order_make_no_difference(setup: Setup) -> None:
    generator = setup.generator()
    first = [Request(prompt, (i,), keep=True) for i, prompt in enumerate(PROMPTS)]
    begun = generator.generate(first, PARAMS)
    paths = [continued(request, group[0]) for request, group in zip(first, begun, strict=True)]
    alone = [said(generator.generate([path], PARAMS)[0][0]) for path in paths]
    mates = [
        Request(PROMPTS[0], (5, 6)),
        replace(paths[0], pieces=(), keep=False, seeds=(3,)),
        replace(paths[1], pieces=(1, len(paths[1].prefix) - 1), seeds=(4, 5)),
    ]
    for order in ([*mates, *paths], [*paths, *mates], [*mates[::-1], *paths[::-1]]):
        for made in (generator, setup.generator()):
            answers = dict(zip(map(id, order), made.generate(order, PARAMS), strict=True))
            assert [said(answers[id(path)][0]) for path in paths] == alone
            assert [said(c) for c in answers[id(mates[0])]] == [
                said(c) for c in setup.generator().generate(mates[:1], PARAMS)[0]
            ]


def test_every_token_is_decoded_once(setup: Setup) -> None:
    """16 pieces cost the decode steps of one long completion, and prompts are prefilled once."""
    generator = setup.generator()
    steps, prefills = [0], [0]
    inner, prefill = generator.decoder.step, generator.decoder.prefill

    def step(newest: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        return inner(newest, positions)

    def counted(prompts: Sequence[np.ndarray]) -> Any:
        prefills[0] += len(prompts)
        return prefill(prompts)

    generator.decoder.step, generator.decoder.prefill = step, counted  # type: ignore[method-assign]
    requests = [Request(PROMPTS[0], (seed,), keep=True) for seed in range(3)]
    for _ in range(16):
        groups = generator.generate(requests, replace(PARAMS, max_tokens=4))
        requests = [continued(request, group[0]) for request, group in zip(requests, groups, strict=True)]
    assert (steps[0], prefills[0]) == (16 * 4 - 1, 1)


def test_a_journal_in_between_makes_no_difference(setup: Setup, tmp_path: Path) -> None:
    """What the journal answers was not sampled by this process, so it is not kept."""
    inner = setup.generator()
    truth = grown(lambda _: inner)
    once = Journal(setup.generator(), tmp_path, "")
    grown(lambda depth: once if depth < 2 else inner)
    again = Journal(setup.generator(), tmp_path, "")
    assert grown(lambda _: again) == truth
    assert 0 < again.sampled < len(truth)
    pieces = [Request(PROMPTS[0], (1,), prefix=PROMPTS[1], pieces=p) for p in ((), (3,), (1, 2), (2, 1))]
    keys = {key for request in pieces for key in again._keys(request, PARAMS)}
    assert len(keys) == len(pieces), "pieces are part of what a completion depends on"


def test_new_weights_drop_everything(setup: Setup) -> None:
    generator = setup.generator()
    first = Request(PROMPTS[0], (1,), keep=True)
    path = continued(first, generator.generate([first], PARAMS)[0][0])
    before = said(generator.generate([path], PARAMS)[0][0])
    parameter = next(iter(trainable(setup.policy).values()))
    old = parameter.detach().clone()
    with torch.no_grad():
        parameter.mul_(1.5)
    try:
        changed = said(generator.generate([path], PARAMS)[0][0])
        assert changed == said(setup.generator().generate([path], PARAMS)[0][0]) != before
        assert len(generator.prefixes) == 3  # the prompt, the prefix and what was just sampled
    finally:
        generator.load({**generator.weights(), next(iter(trainable(setup.policy))): old}, 1)
    assert len(generator.prefixes) == 0
    assert said(generator.generate([path], PARAMS)[0][0]) == before


@pytest.fixture(scope="module")
def wholes(setup: Setup) -> tuple[EmbeddedGenerator, list[Completion]]:
    generator = setup.generator()
    requests = [Request(prompt, (i,), keep=True) for i, prompt in enumerate(PROMPTS)]
    return generator, [c for (c,) in generator.generate(requests, replace(PARAMS, max_tokens=20))]


@settings(max_examples=8, deadline=None)
@given(which=st.sampled_from([0, 1]), cuts=st.sets(st.integers(1, 19), min_size=1, max_size=4))
def test_a_completion_that_is_cut_and_continued_with_its_own_seed_is_the_uncut_one(
    wholes: tuple[EmbeddedGenerator, list[Completion]], which: int, cuts: set[int]
) -> None:
    generator, completions = wholes
    whole, ends = completions[which], sorted(cuts)
    prefix, pieces = whole.tokens[: ends[-1]], tuple(np.diff([0, *ends]).tolist())
    request = Request(PROMPTS[which], (which,), prefix=prefix, pieces=pieces, keep=True)
    ((rest,),) = generator.generate([request], replace(PARAMS, max_tokens=20 - ends[-1]))
    assert rest.tokens.tolist() == whole.tokens[ends[-1] :].tolist()
    np.testing.assert_allclose(rest.logprobs, whole.logprobs[ends[-1] :], atol=1e-4)


def test_memory_stays_within_the_budget_and_is_counted(setup: Setup) -> None:
    generator = setup.generator(200_000)
    for prompt in range(12):
        request = Request(np.arange(3, 40) + prompt, (prompt,), keep=True)
        generator.generate([request], PARAMS)
        gc.collect()
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for kept, _ in generator.prefixes._kept.values()
            for tensor in tensors(kept)
        }
        assert sum(held.values()) <= generator.prefixes.bytes <= 200_000
    generator.prefixes.clear()
    assert (len(generator.prefixes), generator.prefixes.bytes) == (0, 0)


def tensors(value: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """All tensors in a value."""
    seen = set[int]() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for part in (*parts, *getattr(value, "__dict__", {}).values()) for t in tensors(part, seen)]


BAD = {"too short": (2,), "too long": (3, 1), "empty": (3, 0), "negative": (4, -1)}


@pytest.mark.parametrize("pieces", BAD.values(), ids=BAD)
def test_pieces_that_do_not_add_up_are_refused(pieces: tuple[int, ...]) -> None:
    with pytest.raises(
        RolloutError, match=r"pieces .* for a prefix of 3 tokens; give the length of each part"
    ) as error:
        Request(np.arange(4), (1,), prefix=np.arange(3), pieces=pieces)
    assert "\n" not in str(error.value)


def test_a_prefix_of_unknown_pieces_is_not_kept() -> None:
    with pytest.raises(RolloutError, match=r"pieces \(\) for a prefix of 3 tokens"):
        Request(np.arange(4), (1,), prefix=np.arange(3), keep=True)


def test_pieces_reach_other_processes_and_survive_parts() -> None:
    request = Request(np.arange(4), (1, 2, 3), prefix=np.arange(3), pieces=(2, 1), keep=True)
    for other in (request.part([1]), decode([bytes(part) for part in encode(request)])):
        assert (other.pieces, other.keep) == ((2, 1), True)
