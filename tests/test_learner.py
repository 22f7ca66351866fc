"""The learner's five verbs: exact log-probabilities, gradients no setting of memory can change, exact resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.config import TrainConfig
from posttrain.data import batching
from posttrain.models import lora
from posttrain.models.packing import Packed
from posttrain.models.policy import Policy, hidden_states
from posttrain.objectives.tokens import token_logprobs
from posttrain.train import forward as forward_module
from posttrain.train.forward import sample_logprobs, token_stats
from posttrain.train.learner import make_learner
from posttrain.train.learners.local import LocalLearner
from posttrain.types import Batch, ResumeError, Sample, Stat, TrainingDiverged
from tests import tiny
from tests.conftest import shared

CFG = TrainConfig(lr=1e-2, weight_decay=0.1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["tiny", "tiny-mha", "stories260K"])
def policy(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Policy:
    if request.param == "stories260K":
        return tiny.load(shared("models", "stories260K"))
    return tiny.load(folder if request.param == "tiny" else tiny.make(tmp_path, kv_heads=4))


def samples_for(policy: Policy, count: int = 6, seed: int = 0) -> list[Sample]:
    """Random rows of 2 … 30 tokens; about two thirds of each are trained, never the first."""
    draw, out = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(draw.integers(2, 31))
        mask = draw.random(length) < 0.7
        mask[0], mask[-1] = False, True
        noise = draw.normal(0, 1, (2, length)).astype(np.float32)
        out.append(Sample(draw.integers(3, policy.vocab, length), mask, noise[0], np.where(mask, noise[1], 0)))
    return out


def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
    """The plain policy gradient."""
    return -(b.weights * b.advantages * logp).sum(), {"entropy": Stat(entropy.sum().item(), int(b.mask.sum()))}


def gradients(policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int = 10**6) -> dict[str, torch.Tensor]:
    learner = LocalLearner(policy, CFG, 10)
    for batch in batching.micro(samples, micro_batch_tokens, "token-mean"):
        learner.forward_backward([batch], loss)
    return {name: m.grad.clone() for name, m in learner.master.items() if m.grad is not None}


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    assert any(g.abs().max() > 1e-3 for g in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def train(learner: LocalLearner, samples: Sequence[Sample], steps: int = 1) -> list[float]:
    norms: list[float] = []
    for _ in range(steps):
        for batch in batching.micro(samples, 64, "token-mean"):
            learner.forward_backward([batch], loss)
        norms.append(learner.step()["grad_norm"].value)
    return norms


def snapshot(learner: LocalLearner) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """`state` as a checkpoint would keep it: copies, not views."""
    tensors, small = learner.state()
    return {kind: {name: t.clone() for name, t in of.items()} for kind, of in tensors.items()}, small


# --- log-probabilities -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_log_probabilities_are_those_of_transformers_row_by_row(policy: Policy) -> None:
    samples = samples_for(policy)
    ours = sample_logprobs(policy, samples, 10**6, temperature=0.8)
    alone = sample_logprobs(policy, samples, 1, temperature=0.8)
    policy.model.set_attn_implementation("sdpa")
    for sample, packed, single in zip(samples, ours, alone, strict=True):
        row = torch.from_numpy(sample.tokens).unsqueeze(0)
        logits = policy.model(input_ids=row, use_cache=False).logits
        theirs = torch.where(torch.from_numpy(sample.loss_mask), token_logprobs(logits, row, 0.8)[0], 0)
        np.testing.assert_allclose(packed, theirs.numpy(), rtol=0, atol=3e-5)
        np.testing.assert_allclose(packed, single, rtol=0, atol=3e-5)


def test_positions_start_anew_in_every_row() -> None:
    """Rotary embeddings are relative, so counting on would go unseen until a pack outgrew the context."""
    assert Packed(torch.tensor([2, 1, 3])).positions.tolist() == [[0, 1, 0, 0, 1, 2]]


@torch.no_grad()
def test_a_row_never_sees_its_neighbours_in_the_pack(policy: Policy) -> None:
    """Changing one row's tokens leaves the others' hidden states as they were, to the bit."""
    lengths = torch.tensor([5, 9, 3])
    layout, tokens = Packed(lengths), torch.arange(3, 20)
    changed = tokens.clone()
    changed[5:14] += 7
    before, after = (hidden_states(policy, t.unsqueeze(0), layout.positions, layout)[0] for t in (tokens, changed))
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[14:], after[14:])
    assert not torch.equal(before[5:14], after[5:14])


def test_log_probabilities_and_entropies_are_zero_where_nothing_is_trained(policy: Policy) -> None:
    (batch,) = batching.micro(samples_for(policy), 10**6, "token-mean")
    logp, entropy = token_stats(policy, batch, 1.0)
    assert not logp[~batch.mask].any() and not entropy[~batch.mask].any()
    assert (logp[batch.mask] < 0).all() and (entropy[batch.mask] > 0).all()
    assert logp.requires_grad and not entropy.requires_grad  # entropy is a measurement, not an objective


def test_sample_log_probabilities_come_back_in_the_order_given(policy: Policy) -> None:
    samples = samples_for(policy, 5)
    forward, backward = (sample_logprobs(policy, s, 40) for s in (samples, samples[::-1]))
    for a, b, sample in zip(forward, backward[::-1], samples, strict=True):
        assert len(a) == len(sample.tokens) and a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5)


# --- gradients ---------------------------------------------------------------------------------------------------


def test_how_many_tokens_go_into_a_pass_does_not_change_the_gradient(policy: Policy) -> None:
    samples = samples_for(policy)
    whole = gradients(policy, samples)
    scale = max(1.0, max(float(g.abs().max()) for g in whole.values()))
    for room in (1, 40, 70):
        assert_equal_gradients(gradients(policy, samples, room), whole, 1e-6 * scale)


def test_passes_in_bf16_add_up_in_the_fp32_copy(folder: Path) -> None:
    """bf16 keeps 8 bits, so passes agree to about 1 %; a pass that was dropped or overwrote another is far outside."""
    policy = tiny.load(folder, dtype="bfloat16")
    samples = samples_for(policy)
    whole, split = gradients(policy, samples), gradients(policy, samples, 40)
    assert {g.dtype for g in split.values()} == {torch.float32}
    for name, gradient in whole.items():
        assert (split[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_the_packed_gradient_is_that_of_transformers_row_by_row(policy: Policy) -> None:
    samples = samples_for(policy)
    ours = gradients(policy, samples)
    policy.model.set_attn_implementation("sdpa")
    policy.model.zero_grad()
    count = sum(int(s.loss_mask.sum()) for s in samples)
    for sample in samples:
        row = torch.from_numpy(sample.tokens).unsqueeze(0)
        logp = token_logprobs(policy.model(input_ids=row, use_cache=False).logits, row)[0]
        (-(logp * torch.from_numpy(sample.advantages)).sum() / count).backward()
    theirs = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    scale = max(1.0, max(float(g.abs().max()) for g in theirs.values()))
    assert_equal_gradients(ours, theirs, 3e-6 * scale)


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "adapters"])
def test_gradient_checkpointing_gives_the_same_gradient(folder: Path, rank: int) -> None:
    loaded: list[Policy] = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # adapters start at random
        loaded.append(tiny.load(folder, lora_rank=rank, gradient_checkpointing=checkpointing))
    plain, saving = loaded
    samples = samples_for(plain)
    assert_equal_gradients(gradients(saving, samples), gradients(plain, samples), 0.0)


def test_gradient_checkpointing_recomputes_the_layers(folder: Path) -> None:
    """Each layer's forward pass runs once more in the backward pass."""
    calls = {False: 0, True: 0}
    for checkpointing in calls:
        policy = tiny.load(folder, gradient_checkpointing=checkpointing)

        def count(*_: object, key: bool = checkpointing) -> None:
            calls[key] += 1

        policy.body.layers[0].self_attn.q_proj.register_forward_hook(count)  # type: ignore[index, union-attr]
        gradients(policy, samples_for(policy, 2))
    assert calls == {False: 1, True: 2}


def test_projecting_in_chunks_gives_the_same_values_and_gradient(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = samples_for(policy)
    logp, gradient = sample_logprobs(policy, samples, 10**6), gradients(policy, samples)
    monkeypatch.setattr(forward_module, "LOGITS_PER_CHUNK", 7 * policy.vocab)
    for ours, theirs in zip(sample_logprobs(policy, samples, 10**6), logp, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    scale = max(1.0, max(float(g.abs().max()) for g in gradient.values()))
    assert_equal_gradients(gradients(policy, samples), gradient, 1e-6 * scale)


def test_a_pass_in_which_nothing_is_trained_adds_no_gradient(folder: Path) -> None:
    policy = tiny.load(folder)
    blank = [replace(s, loss_mask=np.zeros(len(s.tokens), bool)) for s in samples_for(policy, 2)]
    assert batching.micro(blank, 1000, "token-mean") == []
    learner = LocalLearner(policy, CFG, 10)
    learner.forward_backward([batching.pad(blank, torch.zeros(2, 30))], loss)
    assert all(m.grad is None or not m.grad.any() for m in learner.master.values())


# --- steps -------------------------------------------------------------------------------------------------------


def test_a_step_is_adamw_by_hand(folder: Path) -> None:
    """Clip to norm 1, then w ← w(1 − lr·wd) − lr·m̂/(√v̂ + 1e-8); at step 1, m̂ = g and v̂ = g². Decay on matrices only."""
    policy = tiny.load(folder)
    learner = LocalLearner(policy, CFG, 10)
    for batch in batching.micro(samples_for(policy), 64, "token-mean"):
        learner.forward_backward([batch], loss)
    before = {n: (m.detach().clone(), m.grad.clone()) for n, m in learner.master.items() if m.grad is not None}
    norm = math.sqrt(sum(float(g.double().square().sum()) for _, g in before.values()))
    stats = learner.step()
    assert stats["grad_norm"].value == pytest.approx(norm, rel=1e-5) and norm > 1
    for name, (weight, gradient) in before.items():
        g = gradient / (norm + 1e-6)  # torch's clipping adds 1e-6
        decayed = weight * (1 - CFG.lr * CFG.weight_decay) if weight.dim() >= 2 else weight
        expected = decayed - CFG.lr * g / (g.abs() + 1e-8)
        large = g.abs() > 1e-6  # below, the sign of a gradient is rounding
        torch.testing.assert_close(learner.master[name][large], expected[large], rtol=0, atol=1e-4)
        assert learner.master[name].grad is None  # the next update starts from nothing


def test_training_makes_rewarded_tokens_likelier(policy: Policy) -> None:
    samples = [replace(s, advantages=s.loss_mask.astype(np.float32)) for s in samples_for(policy)]
    learner = LocalLearner(policy, replace(CFG, lr=1e-3), 10)
    before = sum(float(row.sum()) for row in learner.logprobs(samples))
    train(learner, samples, 3)
    assert sum(float(row.sum()) for row in learner.logprobs(samples)) > before


def test_weights_in_bf16_learn_through_an_fp32_copy(folder: Path) -> None:
    """A rate of 1e-5 is far below bf16's resolution at 0.3: only a finer copy can add such steps up."""
    policy = tiny.load(folder, dtype="bfloat16")
    learner = LocalLearner(policy, replace(CFG, lr=1e-5, weight_decay=0.0), 10)
    assert {m.dtype for m in learner.master.values()} == {torch.float32}
    assert {p.dtype for p in learner.weights().values()} == {torch.bfloat16}
    start = {n: m.clone() for n, m in learner.master.items()}
    train(learner, samples_for(policy), 3)
    assert all(not torch.equal(learner.master[n], w) for n, w in start.items())
    for name, weight in learner.weights().items():
        assert torch.equal(weight, learner.master[name].detach().bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_learner_continues_to_the_same_bits(folder: Path, dtype: str) -> None:
    policy = tiny.load(folder, dtype=dtype)
    samples = samples_for(policy)
    learner = LocalLearner(policy, CFG, 10)
    train(learner, samples, 2)
    tensors, small = snapshot(learner)
    norms = train(learner, samples, 3)
    restored = LocalLearner(tiny.load(folder, dtype=dtype), CFG, 10)
    restored.load(tensors, small)
    assert restored.steps == 2
    assert train(restored, samples, 3) == norms
    for kind, of in snapshot(learner)[0].items():
        assert of.keys() == restored.state()[0][kind].keys()
        assert all(torch.equal(t, restored.state()[0][kind][name]) for name, t in of.items())


def test_a_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    learner = LocalLearner(tiny.load(folder), CFG, 10)
    tensors, small = snapshot(learner)
    tensors["model"]["odd"] = tensors["model"].pop(next(iter(tensors["model"])))
    with pytest.raises(ResumeError, match="2 names differ"):
        learner.load(tensors, small)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_weights(folder: Path, bad: float) -> None:
    policy = tiny.load(folder)
    learner = LocalLearner(policy, CFG, 10)
    samples = samples_for(policy)
    train(learner, samples)
    before = snapshot(learner)[0]
    samples[2] = replace(samples[2], advantages=np.where(samples[2].loss_mask, bad, 0).astype(np.float32))
    with pytest.raises(TrainingDiverged, match="the loss of update 2 is"):
        train(learner, samples)
    assert learner.steps == 1
    assert all(torch.equal(t, before[kind][n]) for kind, of in learner.state()[0].items() for n, t in of.items())


def test_a_gradient_that_is_not_finite_is_not_applied(folder: Path) -> None:
    policy = tiny.load(folder)
    learner = LocalLearner(policy, CFG, 10)
    before = snapshot(learner)[0]["model"]
    (batch,) = batching.micro(samples_for(policy), 10**6, "token-mean")
    learner.forward_backward([batch], lambda logp, entropy, b: ((logp - logp.detach()).abs().sqrt().sum(), {}))
    with pytest.raises(TrainingDiverged, match="the gradient norm of update 1 is nan"):
        learner.step()
    assert all(torch.equal(t, before[name]) for name, t in learner.state()[0]["model"].items())


@pytest.mark.parametrize("lanes", [1, 2])
def test_weights_that_are_not_finite_end_the_run_before_they_are_saved(folder: Path, lanes: int) -> None:
    policy = tiny.load(folder)
    learner = make_learner(policy, replace(CFG, lr=1e308, lanes=lanes), 10)
    batches = batching.micro(samples_for(policy), 64, "token-mean")
    learner.forward_backward(batches, lambda logp, entropy, b: ((b.weights * logp).sum(), {}))
    with pytest.raises(TrainingDiverged, match="no longer finite after update 1"):
        learner.step()


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 2, [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
        ("cosine", 0, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_learning_rates_of_six_updates_by_hand(folder: Path, schedule: Any, warmup: int, rates: list[float]) -> None:
    learner = LocalLearner(tiny.load(folder), TrainConfig(lr=2.0, schedule=schedule, warmup_steps=warmup), 6)
    assert [learner.learning_rate(step) / 2 for step in range(6)] == pytest.approx(rates, abs=1e-7)
    assert learner.learning_rate(60) == (2.0 if schedule == "constant" else 0.0)


def test_the_rate_used_is_the_one_reported(folder: Path) -> None:
    policy = tiny.load(folder)
    learner = LocalLearner(policy, TrainConfig(lr=1e-3, warmup_steps=2), 4)
    reported: list[float] = []
    for _ in range(3):
        reported.append(learner.step()["lr"].value)
        assert {group["lr"] for group in learner.optimizer.param_groups} == {reported[-1]}
    assert reported == [5e-4, 1e-3, 1e-3]


# --- adapters ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(policy: Policy) -> torch.Tensor:
    policy.model.eval()
    tokens, layout = torch.arange(3, 23).unsqueeze(0), Packed(torch.tensor([20]))
    return policy.head(hidden_states(policy, tokens, layout.positions, layout))[0]


def test_adapters_change_nothing_until_trained_and_switch_off_exactly(folder: Path) -> None:
    base, policy = logits_of(tiny.load(folder)), tiny.load(folder, lora_rank=4)
    torch.testing.assert_close(logits_of(policy), base, rtol=0, atol=0)
    learner = LocalLearner(policy, CFG, 10)
    assert all("lora_" in name for name in learner.parameters)
    train(learner, samples_for(policy), 3)
    assert (logits_of(policy) - base).abs().max() > 0.01
    with lora.disabled(policy.model):
        assert torch.equal(logits_of(policy), base)


@torch.no_grad()
def test_merged_adapters_give_the_adapted_models_logits(folder: Path) -> None:
    policy = tiny.load(folder, lora_rank=4)
    with torch.enable_grad():
        train(LocalLearner(policy, CFG, 10), samples_for(policy), 3)
    adapted = logits_of(policy)
    merged = lora.merged(policy.model)
    merged.set_attn_implementation("sdpa")
    theirs = merged(input_ids=torch.arange(3, 23).unsqueeze(0), use_cache=False).logits[0]
    torch.testing.assert_close(theirs, adapted, rtol=0, atol=1e-4 * float(adapted.abs().max()))
    assert torch.equal(logits_of(policy), adapted)  # merging works on a copy


def test_a_model_without_adapters_cannot_be_its_own_reference(folder: Path) -> None:
    with pytest.raises(TypeError, match="only a model with adapters"), lora.disabled(tiny.load(folder).model):
        pass


def test_a_stat_over_a_mask_is_the_mean_of_its_entries_and_its_parts_add_up_to_it() -> None:
    values = torch.tensor([[1.0, float("nan"), 3.0], [5.0, 7.0, float("inf")]])
    mask = values.isfinite()
    whole = Stat.over(values, mask)
    assert (whole.total, whole.count, whole.value) == (16.0, 4, 4.0)
    assert Stat.over(values[0], mask[0]) + Stat.over(values[1], mask[1]) == whole == Stat.over(values[mask])
    assert math.isnan(Stat.over(values, torch.zeros_like(mask)).value), "a mean over nothing"
