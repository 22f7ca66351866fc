"""For every architecture: what is trained and sampled is what transformers' own forward pass computes, or refused."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import posttrain as pt
from bench import architectures, zoo
from posttrain.config import ModelConfig
from posttrain.models import check
from posttrain.models.check import check_forward, thresholds
from posttrain.models.load import load_policy
from posttrain.models.packing import Packed
from posttrain.models.policy import LogitRule, Policy, Route, by_rows, hidden_states, learner_mode
from posttrain.rollout.engines import embedded
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.fused import FusedDecoder
from posttrain.rollout.general import GeneralDecoder
from posttrain.rollout.generator import Request
from posttrain.rollout.plain import PlainDecoder
from posttrain.store.run import Run
from posttrain.train import forward
from posttrain.train.forward import project
from posttrain.types import ConfigError, RolloutError, SamplingParams
from tests import tiny

STEPPED = ("phi",)  # with GRPO steps, exports and LoRA; the bench does that for all
BY_ROW = ("deepseek v3", "falcon", "gemma 2", "gpt-oss", "qwen 3.5")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    with tiny.threads(1):
        yield


def made(name: str, folder: Path, **more: Any) -> Path:
    of, settings = zoo.ZOO[name]
    return architectures.save(getattr(transformers, of)(**{**settings, **more}), folder)


@pytest.mark.parametrize("name", zoo.DOZEN)
def test_log_probabilities_gradients_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    outcome = architectures.check(name, tmp_path, whole=name in STEPPED)
    assert outcome.result == "right", outcome.said
    assert (outcome.path == "by row") == (name in BY_ROW) or name not in BY_ROW
    assert bool(outcome.said) == (outcome.path != "packed"), "a note says how it is computed"


# --- thresholds --------------------------------------------------------------------------------------------------

LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "no window": ({"sliding_window": None, "max_window_layers": 28, "chunk_size_feed_forward": 0}, {}),
    "a window": ({"sliding_window": 24, "use_sliding_window": True}, {"sliding_window": 24}),
    "chunks": ({"attention_chunk_size": 8192}, {"attention_chunk_size": 8192}),
    "another name": ({"window_size": 256, "sliding_window_pattern": 6}, {"window_size": 256}),
    "longrope": ({"rope_parameters": LONGROPE, "max_position_embeddings": 512}, {"longrope": 64}),
    "longrope by layer": ({"rope_parameters": {"full_attention": LONGROPE}}, {"longrope": 64}),
    "longrope, length above": (
        {"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 32}, {"longrope": 32},
    ),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 64}, {"dynamic": 63}),
    "yarn is the same at every length": (
        {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 64}}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_length_at_which_a_model_changes_is_read_from_its_configuration(name: str) -> None:
    config, found = CONFIGS[name]
    assert thresholds(config) == found


def test_rows_within_a_window_are_packed_and_longer_ones_are_not(tmp_path: Path) -> None:
    policy = load_policy(ModelConfig(path=str(made("mistral (window)", tmp_path))))
    assert policy.route.reach == zoo.WINDOW
    assert policy.notes == [
        "MistralForCausalLM: rows longer than 16 tokens (sliding_window) are computed by transformers' own attention, "
        "one row at a time (slower)."
    ]


def test_a_request_that_fits_the_window_is_sampled_alike_beside_one_that_does_not(tmp_path: Path) -> None:
    """The decoder of a request depends on the request alone; callbacks keep the numbers of the call."""
    policy = load_policy(ModelConfig(path=str(made("mistral (window)", tmp_path))))
    engine, params = EmbeddedGenerator(policy, 32), SamplingParams(max_tokens=8)
    assert not isinstance(engine.decoder, GeneralDecoder)
    requests = [Request(np.arange(6, 6 + n), (n, n + 100)) for n in (30, 5, 20, 8)]
    tokens: dict[tuple[int, int], list[int]] = {}
    done: list[tuple[int, int]] = []

    def on_token(group: int, index: int, token: int) -> None:
        tokens.setdefault((group, index), []).append(token)

    together = engine.generate(requests, params, on_token, lambda group, index, _: done.append((group, index)))
    assert sorted(done) == [(g, i) for g in range(4) for i in range(2)]
    for g, request in enumerate(requests):
        for i, alone in enumerate(engine.generate([request], params)[0]):
            assert np.array_equal(alone.logprobs, together[g][i].logprobs)
            assert tokens[g, i] == together[g][i].tokens.tolist() == alone.tokens.tolist()


def test_a_completion_may_not_cross_the_length_at_which_longrope_changes(tmp_path: Path) -> None:
    policy = load_policy(ModelConfig(path=str(made("phi 3 (longrope)", tmp_path))))
    engine, params = EmbeddedGenerator(policy, 32), SamplingParams(max_tokens=8)
    assert policy.route.turn == 48
    for length in (40, 49):  # up to it, and from beyond it
        engine.generate([Request(np.arange(6, 6 + length), (0,))], params)
    with pytest.raises(RolloutError, match=r"prompt of 41 tokens plus max_tokens=8 crosses .*embeddings=48"):
        engine.generate([Request(np.arange(6, 47), (0,))], params)


# --- logits ------------------------------------------------------------------------------------------------------


@given(scale=st.floats(0.1, 4), cap=st.one_of(st.none(), st.floats(1, 30)), temperature=st.floats(0.5, 2))
def test_projected_log_probabilities_follow_the_models_rule(
    scale: float, cap: float | None, temperature: float
) -> None:
    """Granite divides its logits, Cohere multiplies them, Gemma caps them: softmax(rule(W h) / T), with gradients."""
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(6, 9), torch.randn(5, 6, requires_grad=True), torch.tensor([0, 3, 8, 2, 2])

    class Model(nn.Module):
        def get_output_embeddings(self) -> nn.Linear:
            return head

    policy = Policy(Model(), None, "", (), route=Route(rule=LogitRule(scale, cap)))
    x = head(hidden) * scale
    logits = (x if cap is None else cap * torch.tanh(x / cap)) / temperature
    wanted = torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1))[:, 0]
    found, _ = project(policy, hidden, targets, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    (ours,), (true,) = torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(wanted.sum(), hidden)
    torch.testing.assert_close(ours, true, rtol=1e-3, atol=1e-4)


def test_an_output_layer_with_a_rule_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    policy = load_policy(ModelConfig(path=str(tiny.make(tmp_path))))
    inner = policy.model.forward
    policy.model.forward = lambda *args, **kwargs: _squared(inner(*args, **kwargs))
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not supported: its logits differ"):
        check_forward(policy)


def _squared(out: Any) -> Any:
    out.logits = out.logits**2
    return out


# --- training mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_never_acts_so_that_the_trained_model_is_the_sampled_one(tmp_path: Path, checkpointing: bool) -> None:
    """With and without gradient checkpointing, a learner's pass is the evaluation's, and repeats."""
    for name in ("phi", "starcoder 2", "gpt-2", "opt"):
        policy = load_policy(ModelConfig(path=str(made(name, tmp_path / name)), gradient_checkpointing=checkpointing))
        batch = architectures.batch_of(architectures.rows(512))
        exact = forward.logprobs(policy, batch)
        grads: list[torch.Tensor] = []
        for _ in range(2):
            learner_mode(policy)
            logp, _ = forward.token_stats(policy, batch, 1.0)
            torch.testing.assert_close(logp.detach(), exact, rtol=0, atol=1e-4)
            policy.model.zero_grad()
            logp.sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
        assert torch.equal(*grads)


def test_gradient_checkpointing_of_layers_with_dropout_keeps_the_gradient(tmp_path: Path) -> None:
    folder, grads = made("phi", tmp_path), list[torch.Tensor]()
    for checkpointing in (False, True):
        policy = load_policy(ModelConfig(path=str(folder), gradient_checkpointing=checkpointing))
        calls: list[Any] = []
        layer: Any = policy.body.layers[0]  # type: ignore[index]
        layer.mlp.register_forward_pre_hook(lambda module, given, calls=calls: calls.append(0))
        learner_mode(policy)
        forward.token_stats(policy, architectures.batch_of(architectures.rows(512)[:2]), 1.0)[0].sum().backward()
        assert len(calls) == (2 if checkpointing else 1), "a checkpointed layer is computed again"
        grads.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4 * float(grads[0].abs().max()))


# --- exceptions --------------------------------------------------------------------------------------------------

FAULTS = (KeyError("layer"), ImportError("needs some_package"), RuntimeError("sizes differ"), TypeError("no layout"))


@pytest.mark.parametrize("error", FAULTS, ids=lambda e: type(e).__name__)
def test_any_exception_of_the_check_is_one_sentence(error: Exception, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny.make(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    with pytest.raises(ConfigError, match=rf"LlamaForCausalLM is not supported: .*{type(error).__name__}"):
        load_policy(ModelConfig(path=str(folder)))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ConfigError, match=rf"cannot be loaded: {type(error).__name__}"):
        load_policy(ModelConfig(path=str(folder)))


DAMAGE: dict[str, Any] = {
    "cut short": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
    "another shape": lambda d: _edit(d, intermediate_size=128),
    "bitsandbytes": lambda d: _edit(d, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "gptq": lambda d: _edit(d, quantization_config={"quant_method": "gptq", "bits": 4}),
    "an unknown model": lambda d: _edit(d, model_type="no-such-model"),
    "heads that do not divide": lambda d: _edit(d, num_attention_heads=5),
}


def _edit(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_a_checkpoint_that_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "base")
    for name, damage in DAMAGE.items():
        folder = tmp_path / name
        shutil.copytree(base, folder)
        damage(folder)
        with pytest.raises(ConfigError) as refused:
            load_policy(ModelConfig(path=str(folder)))
        assert "\n" not in str(refused.value) and 20 < len(str(refused.value)) < 500, name


# --- the choice --------------------------------------------------------------------------------------------------


def test_a_layer_that_does_not_call_our_attention_is_not_packed(tmp_path: Path, monkeypatch: Any) -> None:
    """Even if its results agree on the check's rows: one row without a shared prefix hides what a pass mixes up."""
    folder = tiny.make(tmp_path)
    inner = check._Counting.attend

    def forgetful(self: Any, layer: int, *rest: Any) -> torch.Tensor:
        out = inner(self, layer, *rest)
        if layer == 1:
            self.called.pop()
        return out

    monkeypatch.setattr(check._Counting, "attend", forgetful)
    policy = load_policy(ModelConfig(path=str(folder)))
    assert policy.route.reach == 0
    assert policy.notes[0].endswith("(slower): 1 of 2 layers do not use transformers' attention interface.")


def test_a_decoder_whose_steps_differ_is_replaced_with_a_note(tmp_path: Path, monkeypatch: Any) -> None:
    policy = load_policy(ModelConfig(path=str(tiny.make(tmp_path))))
    truth = EmbeddedGenerator(policy, 32).generate([Request(np.arange(5, 12), (1,))], SamplingParams(max_tokens=6))
    for kind in (FusedDecoder, PlainDecoder):
        monkeypatch.setattr(kind, "step", _shifted(kind.step))
    policy = load_policy(ModelConfig(path=str(tmp_path)))  # a decoder is compared once for each loaded model
    engine = EmbeddedGenerator(policy, 32)
    assert isinstance(engine.decoder, GeneralDecoder)
    assert "LlamaModel is sampled by transformers' own attention" in policy.notes[-1]
    found = engine.generate([Request(np.arange(5, 12), (1,))], SamplingParams(max_tokens=6))
    assert found[0][0].tokens.tolist() == truth[0][0].tokens.tolist()


@pytest.mark.parametrize("more", [{}, {"max_lag": 1}, {"ahead": 1}])
def test_the_note_on_how_a_model_is_sampled_is_in_the_run_once_before_its_first_step(
    tmp_path: Path, monkeypatch: Any, more: dict[str, Any]
) -> None:
    """Also if only the lagging copy, which has a decoder of its own, is sampled that way."""
    model, calls = str(tiny.chatty(tmp_path / "model")), [0]
    difference = embedded._difference

    def differs(made: Any, policy: Any, dtype: Any) -> str:
        calls[0] += 1
        return "its steps differ" if calls[0] == (2 if more else 1) else difference(made, policy, dtype)

    monkeypatch.setattr(embedded, "_difference", differs)
    settings: dict[str, Any] = {"steps": 1, "prompts": 2, "group_size": 2, "problems": 2, "count": 8, "threads": 1}
    settings |= {"rollout__max_tokens": 4, "rollout__slots": 32, **more}
    done = pt.grpo(model, "sums", lambda completion, **task: len(completion) % 2, tmp_path / "run", **settings)
    with Run.read(done.folder) as run:
        found = [event for event in run.events() if "is sampled by transformers' own attention" in event.message]
    assert [(event.step, event.kind) for event in found] == [(0, "model")]


def _shifted(step: Any) -> Any:
    return lambda self, newest, positions: step(self, newest, positions) + torch.arange(64)


def test_a_model_whose_cache_is_wrong_is_sampled_from_whole_rows(tmp_path: Path) -> None:
    """The same tokens, more slowly: the cached and the whole-row decoder agree where the cache is right."""
    policy = load_policy(ModelConfig(path=str(made("gemma 2", tmp_path))))
    assert policy.route.cached and policy.route.reach == 0
    requests, params = [Request(np.arange(6, 20), (1, 2))], SamplingParams(max_tokens=8)
    cached = EmbeddedGenerator(policy, 32).generate(requests, params)[0]
    policy.route = Route(0, policy.route.own, False, 0, policy.route.rule)
    whole = EmbeddedGenerator(policy, 32).generate(requests, params)[0]
    for one, other in zip(cached, whole, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)


def test_the_ordinary_models_are_packed_and_say_nothing(tmp_path: Path) -> None:
    for name in ("llama", "mistral", "qwen 2", "qwen 3"):
        policy = load_policy(ModelConfig(path=str(made(name, tmp_path / name))))
        assert policy.route == Route(math.inf, "sdpa") and not policy.notes


def test_threads_that_compute_with_one_model_in_two_ways_get_the_results_of_one(tmp_path: Path) -> None:
    """The attention function is part of a model, so a pass must not switch it under another one."""
    policy = load_policy(ModelConfig(path=str(made("phi", tmp_path))))
    tokens, lengths = torch.arange(5, 25), torch.tensor([12, 8])
    layout = Packed(lengths)

    def packed(_: int) -> torch.Tensor:
        return hidden_states(policy, tokens.unsqueeze(0), layout.positions, layout)[0]

    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        rows, together = by_rows(policy, tokens, lengths), packed(0)
        kinds = [lambda i: by_rows(policy, tokens, lengths), packed]
        found = list(pool.map(lambda i: kinds[i % 2](i), range(40)))
    assert all(torch.equal(one, [rows, together][i % 2]) for i, one in enumerate(found))
