"""Weights by NCCL: rank 0 of a group with vLLM's worker, through vLLM's own weight-transfer engine.

UNTESTED: no GPU has run this yet. It is written against vllm.distributed.weight_transfer of vLLM 0.32; the tests check
that the names and arguments used here exist in the installed vLLM, and nothing more. Chosen by
`rollout.vllm_sync = "nccl"` only. What was sent is checked as weights by folder are (weights.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch

from posttrain.config import RolloutConfig
from posttrain.models import lora
from posttrain.models.policy import Policy
from posttrain.types import ConfigError, JsonView

PACKAGE = "vllm.distributed.weight_transfer"
Call = Callable[[str, JsonView | None], Any]


class Transfer:
    """A group of this process and the server's worker, and the weights that are sent in it."""

    def __init__(self, policy: Policy, call: Call) -> None:
        """Opens the group; both sides meet at a free port of 127.0.0.1."""
        engine = importlib.import_module(f"{PACKAGE}.nccl_engine")
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        about = engine.NCCLTrainerInitInfo(master_address="127.0.0.1", master_port=port, world_size=2, rank=0)
        with torch.cuda.device(policy.device):
            self._engine = engine.NCCLTrainerWeightTransferEngine.trainer_init(
                about, client=Routes(call), source=Source(policy.model)
            )
        self._device = policy.device

    def send(self) -> None:
        """Sends all weights of the policy."""
        with torch.cuda.device(self._device):
            self._engine.send_weights()

    @staticmethod
    def check(cfg: RolloutConfig, device: torch.device) -> None:
        """Raises ConfigError unless this process has vLLM and a GPU, and the server has one of its own."""
        missing = [
            (device.type != "cuda", f"the policy is on {device}, and NCCL needs a GPU"),
            (not cfg.vllm_gpus, "the server needs a GPU of its own (rollout.vllm_gpus)"),
            (importlib.util.find_spec("vllm") is None, "vLLM is not installed beside this package"),
        ]
        for fails, why in missing:
            if fails:
                raise ConfigError(f'rollout.vllm_sync = "nccl" cannot be used: {why}. Use "files".')


class Routes:
    """vLLM's `VLLMWeightSyncClient`: the server's routes."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def init_weight_transfer_engine(self, init_info: JsonView) -> None:
        self._call("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self._call("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("/finish_weight_update", {"weight_version": weight_version} if weight_version else {})


class Source:
    """vLLM's `WeightSource`: every weight with its name in a model folder, adapters merged, a tied head named."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def metadata(self) -> list[Any]:
        meta = importlib.import_module(f"{PACKAGE}.base").ParamMeta
        return [meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from lora.merged_weights(self._model)
