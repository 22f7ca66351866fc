"""vLLM server engine: starts vLLM in a process of its own on this machine and samples from it over HTTP.

The server may have another environment (`rollout.vllm_python`) and another GPU than the learner. It is given token ids
and one seed per completion, and returns token ids and log-probabilities of the full softmax at the sampling
temperature. New weights are checked before anything is sampled from them (rollout/servers/weights.py). A server that
dies or hangs is replaced by one with the newest weights, which is asked for the completions that are missing; a seed
gives the same completion again, up to what docs/guides/vllm.md says of vLLM.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from posttrain.config import RolloutConfig
from posttrain.models.load import take_weights, weight_views
from posttrain.models.policy import Policy
from posttrain.rollout.engines.vllm import check_requests
from posttrain.rollout.generator import OnDone, OnToken, Request, ended
from posttrain.rollout.servers.client import ServerLost
from posttrain.rollout.servers.host import Host, installed
from posttrain.rollout.servers.process import StartError
from posttrain.rollout.servers.weights import Published
from posttrain.types import Completion, ConfigError, JsonView, RolloutError, SamplingParams

RESTARTS = 3  # servers that one call may start in place of dead ones
MISSING = -9999.0  # what vLLM sends for a log-probability that it does not have
Job = tuple[int, int]
"""(request, index) of a completion."""


class VLLMServerGenerator:
    """`Generator` on a vLLM server. Generators with the same model and settings share it, each with its own weights."""

    def __init__(self, policy: Policy, cfg: RolloutConfig) -> None:
        """Starts the server with the policy's weights, or loads them into the one that runs.

        Raises ConfigError if vLLM is missing, cannot run the model here, or disagrees with the policy.
        """
        self.policy, self.version = policy, 0
        self._slots = cfg.slots
        self._context: int = getattr(policy.config, "max_position_embeddings", None) or sys.maxsize
        self._host = _shared_host(policy, cfg)
        with self._host.lock:
            first = self._host.starts == 0
            self._weights = self._host.publish(policy, self.version)
            try:
                if first:
                    self._hold()
                else:
                    self._surviving(self._hold)
            except (StartError, ServerLost) as error:  # of the first server, which nobody else uses
                self._host.close()
                raise ConfigError(f"vLLM's server cannot run {policy.source!r} here: {error}.") from None
            except RolloutError as error:
                raise ConfigError(f"vLLM does not compute {policy.source!r} as the learner does: {error}") from None

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Loads new weights, named as in `trainable(policy)`, into the server, and checks that it has them.

        Raises RolloutError if it does not, DiskError if they cannot be written.
        """
        with self._host.lock:
            take_weights(self.policy, weights)
            self._weights = self._host.publish(self.policy, version)
            self._surviving(self._hold)
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

        Raises RolloutError if prompt and completion exceed the model's context or if servers keep dying, and
        ConfigError for sampling settings that vLLM cannot honour or report.
        """
        if not requests:
            return []
        check_requests(requests, params, self._context, "vllm_server")
        done: list[list[Completion | None]] = [[None] * len(r.seeds) for r in requests]

        def finished(job: Job, completion: Completion) -> None:
            g, i = job
            done[g][i] = completion
            ended(g, i, completion, on_token, on_done)

        def ask_missing() -> None:
            self._hold()
            missing = [(g, i) for g, group in enumerate(done) for i, c in enumerate(group) if c is None]
            self._ask(missing, partial(self._completion, requests, params), finished)

        with self._host.lock:
            self._surviving(ask_missing)
        return [[c for c in group if c is not None] for group in done]

    def _hold(self) -> None:
        self._host.hold(self._weights, self.policy)

    def _surviving(self, action: Callable[[], None]) -> None:
        """Calls `action` again with a new server when the server is lost. Raises RolloutError after RESTARTS times."""
        for attempt in range(RESTARTS + 1):
            try:
                return action()
            except (ServerLost, StartError) as lost:
                reason = str(lost)
                last = self._host.kill()
                if attempt == RESTARTS:
                    raise RolloutError(
                        f"vLLM's server was lost {RESTARTS + 1} times in one call, the last time because {reason}; "
                        f"{last}. Raise rollout.vllm_timeout if it was only slow, or lower rollout.slots or "
                        "rollout.vllm_memory if it ran out of memory; then resume the run.",
                        boundary="generator",
                    ) from None

    def _ask(
        self, jobs: Sequence[Job], ask: Callable[[Job], Completion], finished: Callable[[Job, Completion], None]
    ) -> None:
        """Asks for all `jobs`, `slots` at once, and calls `finished` in this thread as they end."""
        with ThreadPoolExecutor(min(self._slots, len(jobs))) as threads:
            futures = {threads.submit(ask, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    finished(futures[future], future.result())
            except ServerLost:
                self._host.kill()  # ends the other requests at once
                threads.shutdown(cancel_futures=True)
                raise
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._host.abort()
                raise

    def _completion(self, requests: Sequence[Request], params: SamplingParams, job: Job) -> Completion:
        g, i = job
        limit = requests[g].limit(i, params.max_tokens)
        body = {
            "token_ids": requests[g].context.tolist(),
            "sampling_params": {
                "temperature": params.temperature,
                "max_tokens": limit,
                "seed": requests[g].seeds[i] % 2**63,  # the largest seed vLLM accepts
                "logprobs": 0,  # of the sampled token only
                "stop_token_ids": [*self.policy.stop_ids],
                "ignore_eos": True,  # stop only at the policy's stop ids
                "detokenize": False,
            },
        }
        reply = self._host.call("/inference/v1/generate", body)
        try:
            return read_completion(reply, self.policy, limit, self._weights, self.version)
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise _unusable(f"it is not in the documented format ({type(error).__name__}: {error})") from None


def read_completion(reply: Any, policy: Policy, limit: int, weights: Published, version: int) -> Completion:
    """The completion in a reply of /inference/v1/generate.

    Raises RolloutError unless all of it was sampled from `weights` and it is a complete one of at most `limit` tokens.
    """
    (choice,) = reply["choices"]
    tokens = [int(token) for token in choice["token_ids"]]
    logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    named = [int(entry["token_id"]) for entry in choice["logprobs"]["content"]]
    spans: Sequence[JsonView] = choice.get("weight_versions") or []
    versions = {str(span["version"]) for span in spans}
    if versions != {weights.label}:
        raise _unusable(f"it was sampled from the weights {', '.join(sorted(versions)) or '?'}, not {weights.label}")
    if named != tokens or not all(0 <= token < policy.vocab for token in tokens):
        raise _unusable("its token ids are not those of its log-probabilities, or not the model's")
    if not all(MISSING < value <= 1e-4 and math.isfinite(value) for value in logprobs):
        raise _unusable("a log-probability is missing or not finite")
    stopped = [token in policy.stop_ids for token in tokens]
    if not 1 <= len(tokens) <= limit or any(stopped[:-1]) or not (stopped[-1] or len(tokens) == limit):
        raise _unusable(f"its {len(tokens)} tokens end neither at a stop token nor at the limit of {limit}")
    return Completion(
        np.array(tokens, np.int32),
        np.array(logprobs, np.float32),
        np.zeros(len(tokens), np.float32),  # nothing was truncated
        "stop" if stopped[-1] else "length",
        version,
    )


def _unusable(why: str) -> RolloutError:
    return RolloutError(f"a completion of vLLM's server cannot be used: {why}.", boundary="generator")


_HOSTS: WeakValueDictionary[tuple[Any, ...], Host] = WeakValueDictionary()


def _shared_host(policy: Policy, cfg: RolloutConfig) -> Host:
    """The server for a model and settings; started on first use and kept while a generator uses it."""
    key = (policy.source, policy.head.weight.dtype, policy.device, cfg)
    host = _HOSTS.get(key)
    if host is None or host.closed:
        host = _HOSTS[key] = Host(policy, cfg)
    return host


def make(policy: Policy, cfg: RolloutConfig) -> VLLMServerGenerator:
    """Makes the engine for `rollout.engine = "vllm_server"`. Raises ConfigError if vLLM cannot be used here."""
    return VLLMServerGenerator(policy, cfg)


def versions(cfg: RolloutConfig) -> dict[str, str]:
    """The version of the server's vLLM. Raises ConfigError if it is not installed there."""
    return {"vllm": installed(cfg.vllm_python)}
