"""What rows share is computed once, and nothing else changes: log-probabilities, gradients, values and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.config import TrainConfig
from posttrain.data import batching
from posttrain.models import packing
from posttrain.models.heads import attach_scalar
from posttrain.models.load import Policy
from posttrain.models.packing import Packed, attention_blocks
from posttrain.train.forward import (
    actor_critic,
    row_scores,
    sample_logprobs,
    step_scores,
    step_scores_and_likelihood,
    token_stats,
    token_stats_with_entropy,
    token_values,
)
from posttrain.train.learners.local import LocalLearner
from posttrain.types import Batch, Sample
from tests import tiny
from tests.conftest import shared

CFG = TrainConfig()
GROUPS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=5)), min_size=1, max_size=4
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return attach_scalar(tiny.load(tiny.make(tmp_path_factory.mktemp("tiny"))), 1)


def group_rows(groups: Sequence[tuple[int, Sequence[int]]], vocab: int, seed: int = 0) -> list[Sample]:
    """Rows of P prompt tokens and n answer tokens, for each (P, [n, …]); prompts begin alike, answers differ."""
    draw, out = np.random.default_rng(seed), []
    system = draw.integers(3, vocab, 8)
    for number, (length, answers) in enumerate(groups):
        ask = np.concatenate([system, draw.integers(3, vocab, 40)])[:length]
        ask[-1] = 3 + number % 2
        for n in answers:
            tokens = np.concatenate([ask, draw.integers(3, vocab, n)])
            mask = np.arange(len(tokens)) >= length
            advantages = np.where(mask, draw.normal(), 0).astype(np.float32)
            out.append(Sample(tokens, mask, np.zeros(len(tokens), np.float32), advantages))
    return out


def computed(batches: Sequence[Batch]) -> int:
    return sum(len(Packed(b.real.sum(1), b.shared).kept) for b in batches)


def outcome(
    policy: Policy, samples: Sequence[Sample], share: bool, forward: Any = token_stats, room: int = 10**6
) -> Any:
    """Each row's outputs, and the gradient of a sum in which every row has weights of its own."""
    learner = LocalLearner(policy, CFG, 1, 0.7, forward)
    rows: dict[int, list[torch.Tensor]] = {}
    batches = batching.micro(samples, room, "seq-mean-token-mean", share=share)

    def loss(*given: Any) -> Any:
        *outputs, batch = given
        for at, row in enumerate(batch.rows):
            rows[row] = [x[at, : len(samples[row].tokens)].detach() for x in outputs]
        signed = batch.advantages.sum(1, keepdim=True) * batch.weights
        return sum(
            (x * (signed if x.shape == signed.shape else signed.sum(1, keepdim=True))).sum() for x in outputs
        ), {}

    for batch in batches:
        learner.forward_backward([batch], loss)
    grads = {name: m.grad.clone() for name, m in learner.master.items() if m.grad is not None}
    return rows, grads, batches


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    (rows, grads, _), (other_rows, other_grads, _) = ours, theirs
    assert rows.keys() == other_rows.keys()
    for row, outputs in rows.items():
        for a, b in zip(outputs, other_rows[row], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    scale = max(float(g.abs().max()) for g in other_grads.values())
    assert scale > 0
    for name, gradient in other_grads.items():
        torch.testing.assert_close(
            grads[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- what a pass computes -------------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GROUPS, st.integers(0, 99))
def test_rows_that_share_a_prompt_have_the_outputs_and_the_gradient_of_separate_rows(
    policy: Policy, groups: list[tuple[int, list[int]]], seed: int
) -> None:
    samples = group_rows(groups, policy.vocab, seed)
    assert_same(outcome(policy, samples, share=True), outcome(policy, samples, share=False, room=1))


FORWARDS = [
    token_stats_with_entropy,
    token_values,
    actor_critic,
    row_scores,
    step_scores,
    step_scores_and_likelihood,
]


@pytest.mark.parametrize("forward", FORWARDS)
def test_every_kind_of_pass_is_the_same_with_shared_prompts(policy: Policy, forward: Any) -> None:
    samples = group_rows([(30, [5, 9, 1]), (20, [20, 20])], policy.vocab)
    ours = outcome(policy, samples, True, forward)
    assert computed(ours[2]) == sum(len(s.tokens) for s in samples) - 2 * 30 - 20
    assert_same(ours, outcome(policy, samples, False, forward))


@pytest.mark.parametrize(
    "settings", [{"lora_rank": 4}, {"gradient_checkpointing": True}, {"lora_rank": 4, "gradient_checkpointing": True}]
)
def test_adapters_and_recomputed_layers_share_prompts_too(tmp_path: Path, settings: dict[str, Any]) -> None:
    policy = tiny.load(tiny.make(tmp_path), **settings)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    samples = group_rows([(40, [3, 30, 8]), (9, [4, 4])], policy.vocab)
    assert_same(outcome(policy, samples, True), outcome(policy, samples, False))


@pytest.mark.parametrize("model", ["stories260K"])
def test_a_real_model_has_the_same_gradient(model: str) -> None:
    policy = tiny.load(shared("models", model))
    samples = group_rows([(33, [31, 7, 12, 2]), (20, [40, 40])], policy.vocab)
    assert_same(outcome(policy, samples, True), outcome(policy, samples, False, room=1))


def test_in_bf16_shared_prompts_agree_as_well_as_bf16_can(tmp_path: Path) -> None:
    """bf16 keeps 8 bits; a prompt whose gradient was lost or doubled is far outside."""
    policy = tiny.load(tiny.make(tmp_path), dtype="bfloat16")
    samples = group_rows([(40, [6, 30, 8]), (20, [9, 4])], policy.vocab)
    ours, theirs = outcome(policy, samples, True), outcome(policy, samples, False)
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.parametrize("queries", [1, 7, 16])
def test_long_rows_in_pieces_are_whole_rows(policy: Policy, monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    samples = group_rows([(40, [30, 17, 40]), (5, [60]), (3, [2])], policy.vocab)
    whole = outcome(policy, samples, share=False)
    monkeypatch.setattr(packing, "QUERIES", queries)
    monkeypatch.setattr(packing, "TILE", 500)
    for share in (False, True):
        assert_same(outcome(policy, samples, share), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_tiles_are_torchs_attention_over_each_row_alone(dtype: torch.dtype) -> None:
    """Rows of 12, 12, 12, 30 and 31 tokens; the first three share 8 tokens, the others 17. float64 takes the tiles,
    bf16 torch's fused kernel."""
    torch.manual_seed(0)
    layout = Packed(torch.tensor([12, 12, 12, 30, 31]), [(3, 8), (2, 17)])
    count = len(layout.kept)
    assert count == 8 + 3 * 4 + 17 + 13 + 14
    q, k, v = (torch.randn(1, count, heads, 8).to(dtype).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    weights = torch.randn(97, 4, 8).to(dtype)
    ours = layout.attend(0, q, k, v, 0.3)[0][layout.index]
    grads = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    rows = [x[0][:, layout.index].split([12, 12, 12, 30, 31], 1) for x in (q, k, v)]
    alone = [
        torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True, scale=0.3, enable_gqa=True)
        for row in zip(*rows, strict=True)
    ]
    theirs = torch.cat(alone, 1).transpose(0, 1)
    tolerance = 1e-12 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad((theirs * weights).sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_runs_that_do_not_make_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"runs of \[2\] rows do not add up to 3 rows"):
        Packed(torch.tensor([4, 4, 4]), [(2, 1)])


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 50))
def test_every_token_is_in_one_block_and_sees_its_past_once(rows: list[tuple[int, int]], most: int) -> None:
    """Rows of n tokens after p shared ones: over the blocks, what a token sees adds up to p + its own past."""
    ranges = [((100 + 100 * i, 100 + 100 * i + n), (0, p)) for i, (n, p) in enumerate(rows)]
    seen: dict[int, int] = {}
    for block in attention_blocks(ranges, most):
        for part in block.tiles(4):
            context = sum(end - start for start, end in part.context)
            for start, end in part.own:
                assert end - start <= most
                for token in range(start, end):
                    assert token not in seen
                    seen[token] = context + token - start
    assert seen == {start + i: p + i for (start, end), (_, p) in ranges for i in range(end - start)}


# --- what is shared -------------------------------------------------------------------------------------------------


def test_runs_by_hand() -> None:
    """Two groups of three share a system message of 20 tokens; sharing 30 within each saves 120, 20 among all 100."""
    a, b = np.arange(30), np.concatenate([np.arange(20), np.arange(50, 60)])
    assert batching.runs([a, a, a, b, b, b]) == [(3, 30), (3, 30)]
    assert batching.runs([a[:21], a[:22], a[:23], b]) == [(4, 20)]
    assert batching.runs([a, b[20:], a[:10], a[:10]]) == [(1, 0)] * 4, "10 tokens do not pay"
    assert batching.runs([]) == []


def test_only_tokens_before_the_first_trained_one_are_shared() -> None:
    """The same row twice: its prompt is shared, its answer is computed for each."""
    (row,) = group_rows([(30, [6])], 50)
    (batch,) = batching.micro([row, row], 1000, "token-mean")
    assert batch.shared == ((2, 30),) and computed([batch]) == 30 + 2 * 6


def test_a_row_without_a_trained_token_is_counted_but_not_computed() -> None:
    rows = group_rows([(30, [6, 6, 6])], 50)
    rows[1] = replace(rows[1], loss_mask=np.zeros(36, bool))
    (batch,) = batching.micro(rows, 1000, "token-mean")
    assert batch.rows == (0, 2) and batch.weights.sum() == 1


def test_a_group_goes_into_one_pass_where_it_fits_and_evenly_into_several_where_not() -> None:
    samples = group_rows([(40, [10] * 8), (40, [10] * 8), (40, [10] * 8)], 50, seed=1)
    for room, sizes in ((400, [360]), (240, [240, 120]), (130, [120, 120, 120]), (100, [80] * 6)):
        assert [computed([b]) for b in batching.micro(samples, room, "token-mean")] == sizes


@settings(max_examples=50)
@given(GROUPS, st.integers(1, 300), st.integers(0, 9), st.sampled_from([1, 2]))
def test_passes_hold_every_row_once_within_their_room_and_never_tear_a_pair(
    groups: list[tuple[int, list[int]]], room: int, seed: int, together: int
) -> None:
    samples = group_rows([(p, [n for n in answers for _ in range(together)]) for p, answers in groups], 60, seed)
    batches = batching.micro(samples, room, "token-mean", together=together)
    assert sorted(row for b in batches for row in b.rows) == list(range(len(samples)))
    for batch in batches:
        units = [batch.rows[i : i + together] for i in range(0, len(batch.rows), together)]
        assert all(unit == tuple(range(unit[0], unit[0] + together)) for unit in units)
        assert computed([batch]) <= room or len(batch.rows) == together
    again = batching.micro(samples, room, "token-mean", together=together)
    assert [b.rows for b in again] == [b.rows for b in batches]


def test_passes_are_nearly_equal() -> None:
    """1,000 tokens in rows of 1 … 100 with room for 300: four passes of about 250, none small."""
    lengths = [100, 90, 80, 70, 60, 50, 50, 40, 40, 40, 30, 30, 30, 30, 20, 20, 20, 20, 10, 10, *[5] * 20, *[2] * 30]
    loads = [sum(lengths[i] for i in part) for part in batching.passes(lengths, 300)]
    assert sum(loads) == 1000 and len(loads) == 4 and max(loads) - min(loads) <= 2


def test_log_probabilities_without_gradient_are_those_of_the_update(policy: Policy) -> None:
    """To the bit: the first ratio of several epochs is exactly 1."""
    samples = group_rows([(30, [5, 9, 1]), (12, [20, 20]), (7, [3])], policy.vocab)
    samples.insert(2, replace(samples[2], loss_mask=np.zeros(len(samples[2].tokens), bool)))
    for room in (60, 1000):
        rows, _, _ = outcome(policy, samples, True, room=room)
        before = sample_logprobs(policy, samples, room, 0.7)
        assert not before[2].any() and 2 not in rows
        for row, (logp, _) in rows.items():
            np.testing.assert_array_equal(before[row], logp.numpy())
