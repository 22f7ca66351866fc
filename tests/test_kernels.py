"""The fused operations are the operations they replace, in value and gradient; the fused decoder is the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import posttrain as pt
from posttrain.models import decoder, kernels, lora
from posttrain.models.attention import NAME
from posttrain.models.check import check_forward
from posttrain.models.kernels.build import library, why_not
from posttrain.models.packing import Packed
from posttrain.models.policy import Policy
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.fused import FusedDecoder
from posttrain.rollout.generator import Request
from posttrain.rollout.generator import draw as plain_draw
from posttrain.rollout.plain import PlainDecoder
from posttrain.store.run import Run
from posttrain.types import ConfigError, SamplingParams
from tests import tiny

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {why_not()}")

sizes = st.integers(1, 70)
few = settings(max_examples=30, deadline=None)


def numbers(*shape: int, seed: int, grad: bool = False) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_() if grad else made


def assert_same_with_gradients(
    ours: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    rounding: float = 3e-6,
    terms: float = 0.0,
) -> None:
    """Values and gradients agree with a float64 computation from the same inputs, relative to the largest number.

    `terms` is the size of numbers whose difference a gradient is: where they cancel, their rounding is left.
    """
    grads = [numbers(*value.shape, seed=99 + i) for i, value in enumerate(ours)]
    mine = torch.autograd.grad(list(ours), inputs, grads)
    exact = torch.autograd.grad(list(truth), inputs, [g.double() for g in grads])
    for value, true in zip([*ours, *mine], [*truth, *exact], strict=True):
        allowed = rounding * max(1.0, float(true.detach().abs().max())) + 1e-6 * terms
        torch.testing.assert_close(value.double(), true.double(), rtol=0, atol=allowed)


@few
@given(rows=sizes, width=sizes, seed=st.integers(0, 99), added=st.booleans())
def test_the_norm_with_its_residual_sum_is_the_formula(rows: int, width: int, seed: int, added: bool) -> None:
    x, weight = numbers(rows, width, seed=seed, grad=True), numbers(width, seed=seed + 1, grad=True)
    delta = numbers(rows, width, seed=seed + 2, grad=True) if added else None
    total = x.double() + (delta.double() if delta is not None else 0)
    truth = total, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-3) * weight.double()
    inputs = [x, weight] + ([delta] if delta is not None else [])
    assert_same_with_gradients(kernels.add_norm(x, delta, weight, 1e-3), truth, inputs, 2e-5)


@few
@given(rows=sizes, width=sizes, seed=st.integers(0, 99))
def test_the_gated_unit_is_silu_times_up(rows: int, width: int, seed: int) -> None:
    gate, up = (numbers(rows, width, seed=seed + i, grad=True) for i in (0, 1))
    truth = torch.nn.functional.silu(gate.double() * 4) * up.double()
    assert_same_with_gradients([kernels.swiglu(gate * 4, up)], [truth], [gate, up])
    out, both = torch.empty(rows, width), torch.cat([gate * 4, up], 1).detach()
    kernels.bound("swiglu", both, both[:, width:], out, rows, width, 2 * width)()
    torch.testing.assert_close(
        out.double(), truth.detach(), rtol=0, atol=3e-6 * max(1.0, float(truth.detach().abs().max()))
    )


@few
@given(rows=sizes, heads=st.integers(1, 5), half=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_rotary_turn_is_a_rotation_of_pairs(rows: int, heads: int, half: int, seed: int) -> None:
    x, angle = numbers(rows, heads, 2 * half, seed=seed, grad=True), numbers(rows, half, seed=seed + 1)
    c, s = angle.cos(), angle.sin()
    a, b = x.double().chunk(2, -1)
    cd, sd = c.double().unsqueeze(1), s.double().unsqueeze(1)
    assert_same_with_gradients([kernels.rotary(x, c, s)], [torch.cat([a * cd - b * sd, b * cd + a * sd], -1)], [x])


@few
@given(
    rows=st.integers(1, 9), vocab=st.integers(2, 700), temperature=st.sampled_from([0.3, 1.0, 1.7]),
    seed=st.integers(0, 99), entropy_too=st.booleans(),
)  # fmt: skip
def test_log_probabilities_and_entropies_have_the_gradient_of_a_log_softmax(
    rows: int, vocab: int, temperature: float, seed: int, entropy_too: bool
) -> None:
    logits = (numbers(rows, vocab, seed=seed) * 4).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    full = torch.log_softmax(logits.double() / temperature, -1)
    logp, entropy = full.gather(1, targets.unsqueeze(1))[:, 0], -(full.exp() * full).sum(-1)
    ours = kernels.select_logp(logits.detach(), targets, temperature)
    torch.testing.assert_close(ours[0].double(), logp.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[1].double(), entropy.detach(), rtol=2e-6, atol=5e-6)
    dlogp, dentropy = numbers(rows, seed=seed + 1), numbers(rows, seed=seed + 2) if entropy_too else None
    outputs = [logp, entropy] if entropy_too else [logp]
    weights = [dlogp.double()] + ([dentropy.double()] if dentropy is not None else [])
    (exact,) = torch.autograd.grad(outputs, logits, weights)
    gradient = logits.detach().clone()
    kernels.select_logp_grad_(gradient, targets, temperature, ours[1:], dlogp, dentropy)
    torch.testing.assert_close(gradient.double(), exact.double(), rtol=0, atol=1e-5 / temperature)


@few
@given(
    rows=st.integers(1, 40), vocab=st.integers(1, 900), temperature=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_token_is_drawn_where_the_running_probability_passes_its_number(
    rows: int, vocab: int, temperature: float, seed: int
) -> None:
    logits = numbers(rows, vocab, seed=seed) * 3
    uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tokens, logp = kernels.draw(logits, uniforms, temperature)
    plain, plain_logp, _ = plain_draw(logits.double(), uniforms, SamplingParams(temperature=temperature))
    same = tokens == plain
    full = torch.log_softmax(logits.double() / (temperature or 1.0), -1).exp().cumsum(-1)
    edge = (full - uniforms.unsqueeze(1)).abs().amin(-1)  # a number this close to an edge may round either way
    assert bool((same | (edge < 1e-6)).all())
    torch.testing.assert_close(logp[same], plain_logp[same].float(), rtol=2e-6, atol=2e-6)


def test_impossible_tokens_are_never_drawn_even_at_the_ends() -> None:
    logits = torch.full((3, 600), -torch.inf)
    logits[:, 300:302] = 0.0
    tokens, logp = kernels.draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [300, 301, 301] and torch.allclose(logp, torch.tensor(0.5).log())


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 24},
}


def model_of(family: str) -> Policy:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=90, hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.2, max_position_embeddings=256, attn_implementation="sdpa", **FAMILIES[family],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # as trained ones are: not all zeros and ones
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return Policy(model, None, family, (1,))


def requests(vocab: int) -> list[Request]:
    drawn = np.random.default_rng(0)
    lengths = (1, 15, 16, 17, 33, 70)
    return [Request(drawn.integers(2, vocab, n).astype(np.int32), (3 * n, 3 * n + 1, 3 * n + 2)) for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_decoded_as_transformers_computes_it(family: str) -> None:
    """Greedy tokens equal and log-probabilities to 1e-5; and a prompt in the middle of a block loses no key."""
    policy = model_of(family)
    assert decoder.fits(policy.body)
    assert check_forward(policy) < 1e-4
    fused, plain = EmbeddedGenerator(policy, 32), EmbeddedGenerator(policy, 32)
    assert isinstance(fused.decoder, FusedDecoder)
    plain.decoder = PlainDecoder(policy, 32)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_tokens=40)
        ours, theirs = (e.generate(requests(90), params) for e in (fused, plain))
        for one, other in zip([c for g in ours for c in g], [c for g in theirs for c in g], strict=True):
            assert one.tokens.tolist() == other.tokens.tolist() and one.stop == other.stop
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_the_gradient_of_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model_of(family)
    check_forward(policy)
    model = policy.model
    tokens = torch.arange(2, 60).remainder(90)
    layout = Packed(torch.tensor([30, 28]))

    def gradient() -> list[torch.Tensor]:
        model.zero_grad()
        out = model.get_decoder()(
            input_ids=tokens.unsqueeze(0), position_ids=layout.positions, use_cache=False, layout=layout
        ).last_hidden_state
        out.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert model.config._attn_implementation == NAME
    theirs = gradient()
    model.zero_grad()
    decoder.forward(policy.body, tokens.unsqueeze(0), layout.positions, layout).square().sum().backward()
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([t.norm() for t in theirs]).norm()
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / norm) < 1e-5


def test_new_weights_and_adapters_reach_the_packed_copy() -> None:
    """After an update, and with LoRA, the sampler's log-probabilities are the changed model's."""
    policy = model_of("llama")
    check_forward(policy)
    policy.model = lora.attach(policy.model, 4, 8)
    engine = EmbeddedGenerator(policy, 32)
    assert isinstance(engine.decoder, FusedDecoder)
    params = SamplingParams(max_tokens=8)
    before = engine.generate(requests(90), params)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    after, plain = engine.generate(requests(90), params), EmbeddedGenerator(policy, 32)
    plain.decoder = PlainDecoder(policy, 32)
    for old, new, true in zip(before, after, plain.generate(requests(90), params), strict=True):
        assert any(not np.array_equal(o.logprobs, n.logprobs) for o, n in zip(old, new, strict=True))
        for n, t in zip(new, true, strict=True):
            assert n.tokens.tolist() == t.tokens.tolist()
            np.testing.assert_allclose(n.logprobs, t.logprobs, rtol=1e-5, atol=1e-5)


def test_products_in_bfloat16_differ_by_their_rounding_and_the_run_corrects_for_it(tmp_path: Path) -> None:
    """The sampler reports the probabilities it sampled with; the learner's are close, and the difference is logged."""
    policy = model_of("qwen2")
    check_forward(policy)
    narrow, own = EmbeddedGenerator(policy, 32, torch.bfloat16), EmbeddedGenerator(policy, 32)
    params = SamplingParams(max_tokens=1)
    gaps = [
        abs(float(a.logprobs[0] - b.logprobs[0]))
        for one, other in zip(narrow.generate(requests(90), params), own.generate(requests(90), params), strict=True)
        for a, b in zip(one, other, strict=True)
        if a.tokens[0] == b.tokens[0]
    ]
    assert len(gaps) > 9 and 0 < max(gaps) < 0.3
    alone = [narrow.generate([request], SamplingParams(max_tokens=9))[0] for request in requests(90)]
    for one, other in zip(alone, narrow.generate(requests(90), SamplingParams(max_tokens=9)), strict=True):
        assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(one, other, strict=True))
    shared = {"model": "abacus", "tasks": "arithmetic", "steps": 2, "prompts": 2, "group_size": 4, "eval__problems": 2}
    result = pt.grpo(**shared, out=tmp_path / "run", rollout__dtype="bfloat16", rollout__max_tokens=16)
    with Run.read(result.folder) as run:
        assert 1e-4 < max(run.curve("mismatch")[1]) < 0.5


def test_other_products_than_the_models_are_refused_where_they_cannot_be_had() -> None:
    policy = model_of("llama")
    policy.model.bfloat16()
    EmbeddedGenerator(policy, 32, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"asks for products in torch.float16 on a torch.bfloat16 model"):
        EmbeddedGenerator(policy, 32, torch.float16)


def test_more_slots_or_longer_answers_or_other_threads_make_room_without_changing_a_bit() -> None:
    policy = model_of("llama")
    check_forward(policy)
    engine = EmbeddedGenerator(policy, 32)
    short = engine.generate(requests(90), SamplingParams(max_tokens=20))
    engine.generate(requests(90), SamplingParams(max_tokens=150))
    with tiny.threads(2):
        again = engine.generate(requests(90), SamplingParams(max_tokens=20))
    for one, other in zip([c for g in short for c in g], [c for g in again for c in g], strict=True):
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.logprobs, other.logprobs)


@few
@given(
    rows=st.integers(1, 140), inner=st.sampled_from([1, 8, 16, 24, 100, 688, 1100]), threads=st.sampled_from([1, 2, 3]),
    outer=st.one_of(st.integers(1, 200), st.sampled_from([256, 8193])), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_row_of_a_product_has_the_same_bits_alone_and_among_others_packed_and_in_place(
    rows: int, inner: int, threads: int, outer: int, bias: bool, seed: int
) -> None:
    x, weight = numbers(rows, inner, seed=seed), numbers(outer, inner, seed=seed + 1)
    added = numbers(outer, seed=seed + 2) if bias else None
    panels = torch.empty(-(-outer // kernels.PANEL), inner, kernels.PANEL)
    kernels.pack_weight(weight, panels)
    scratch = torch.empty(-(-rows // kernels.PANEL), inner, kernels.PANEL)

    def packed(part: torch.Tensor, threads: int) -> torch.Tensor:
        out = torch.full((len(part), outer), torch.nan)
        kernels.bound("packed_product", part, panels, added, out, len(part), inner, outer, threads)()
        return out

    together, in_place = packed(x, threads), torch.full((rows, outer), torch.nan)
    kernels.bound("product", x, weight, added, in_place, scratch, rows, inner, outer, threads)()
    truth = x.double() @ weight.double().t() + (0 if added is None else added.double())
    torch.testing.assert_close(together.double(), truth, rtol=0, atol=1e-6 * inner + 1e-6)
    assert torch.equal(together, in_place)
    at = rows // 3
    assert torch.equal(packed(x[at : at + 1], 1), together[at : at + 1])
    assert torch.equal(packed(x[at:], 2), together[at:])


def test_what_the_fused_pass_does_not_compute_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not decoder.fits(model_of("llama").model.bfloat16().get_decoder())
    windowed = model_of("mistral")
    windowed.model.config.sliding_window = 16
    assert not decoder.fits(windowed.body)
    other = transformers.AutoConfig.for_model(
        "gpt_neox", vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    assert not decoder.fits(transformers.AutoModelForCausalLM.from_config(other).get_decoder())
    monkeypatch.setattr("posttrain.models.kernels.library", lambda: None)
    assert not decoder.fits(model_of("llama").body)


@few
@example(runs=[(0, [1])], heads=(1, 1), width=128, seed=98)  # one token: what cancels is all there is
@given(
    runs=st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(1, 50), min_size=1, max_size=3)), min_size=1,
                  max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]), width=st.sampled_from([6, 8, 16, 24, 40, 64, 80, 128]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_of_rows_behind_shared_beginnings_is_a_softmax_over_what_each_token_sees(
    runs: list[tuple[int, list[int]]], heads: tuple[int, int], width: int, seed: int
) -> None:
    sizes, shared = [], []
    for beginning, rests in runs:
        groups = [rests] if beginning else [[rest] for rest in rests]
        for group in groups:
            sizes += [beginning + rest for rest in group]
            shared.append((len(group), beginning))
    layout = Packed(torch.tensor(sizes), shared)
    count, groups = len(layout.kept), heads[0] // heads[1]
    query, key, value = (numbers(count, h, width, seed=seed + h, grad=True) for h in (heads[0], heads[1], heads[1]))
    ours = kernels.attention(query, key, value, layout.rows, layout.runs, width**-0.5)
    k, v = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), k) * width**-0.5
    sees = torch.zeros(count, count, dtype=torch.bool)
    for row in range(len(sizes)):  # which computed tokens a row is made of, in order
        first = sum(sizes[:row])
        own = layout.index[first : first + sizes[row]]
        sees[own.unsqueeze(1), own] |= torch.ones(len(own), len(own), dtype=torch.bool).tril()
    weights = torch.softmax(scores.masked_fill(~sees, -torch.inf), -1)
    truth = torch.einsum("hqk,khd->qhd", weights, v)
    products = torch.einsum("qhd,khd->hqk", numbers(*truth.shape, seed=99).double().abs(), v.detach().abs()).max()
    terms = width**-0.5 * float(products * torch.cat([query, key], 1).detach().abs().max())
    assert_same_with_gradients([ours], [truth], [query, key, value], 1e-5, terms)
