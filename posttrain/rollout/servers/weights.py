"""Weights for a server: published as a model folder with the digest of every tensor, and checked after they are loaded.

A server's word is not enough: on the CPU vLLM kept an old output layer under a new version's label, because the folder
did not name it. So a sync counts only if three things hold: the folder still holds what was written; the digests that
the server computes of its own tensors are those of the published ones, where it has such tensors; and the
log-probabilities of a few tokens are those of the policy's own forward pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from posttrain.models import lora
from posttrain.models.check import TOLERANCE
from posttrain.models.load import Policy
from posttrain.models.policy import states
from posttrain.types import RolloutError

AGREE = {torch.float32: 5e-5, torch.bfloat16: TOLERANCE[torch.bfloat16]}
"""Largest difference of a probe's log-probability. In float32 vLLM's CPU kernels differ by up to 2.4e-5 from the
learner's; an old output layer by 0.36."""
LARGE = 16.0  # float32 rounds a log-probability further from 0 in coarser steps, so more is allowed in proportion
PROBE_ROWS, PROBE_TOKENS = 4, 16
SHARD = 4 * 2**30  # bytes of one file; the tensors of one file are in memory at once
NOTHING = hashlib.sha256(b"").hexdigest()  # of a tensor whose values vLLM has packed elsewhere
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
         "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}  # fmt: skip
"""Layers that vLLM stores as one, whose weights follow each other in the order of the model's."""


@dataclass(frozen=True)
class Published:
    """One version of the weights as a model folder, and what a server that holds it has to say.

    `label` names version and content. `digests` are the sha256 of each tensor's bytes by its name in the folder,
    `held` those of vLLM's tensors. `rows` (PROBE_ROWS, n) are token ids and `logprobs` (PROBE_ROWS, n − 1) the policy's
    log-probabilities of all but the first of each row. `files`: whether the folder holds the tensors.
    """

    folder: Path
    label: str
    digests: Mapping[str, str]
    held: Mapping[str, str]
    rows: list[list[int]]
    logprobs: np.ndarray
    tolerance: float
    files: bool = True

    def check_folder(self) -> None:
        """Raises RolloutError if a tensor in the folder is no longer the one that was written."""
        found: dict[str, str] = {}
        if not self.files:
            return
        try:
            for file in sorted(self.folder.glob("*.safetensors")):
                with safe_open(file, "pt") as stored:
                    found |= {name: _digest(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own type
            raise RolloutError(f"cannot read the weights for vLLM back from {self.folder}: {error}.") from None
        odd = sorted(name for name in self.digests.keys() | found.keys() if self.digests.get(name) != found.get(name))
        if odd:
            raise self.refused(f"{len(odd)} tensors of their folder are not what was written (the first is {odd[0]!r})")

    def check_probe(self, logprobs: np.ndarray) -> None:
        """Raises RolloutError unless a server's log-probabilities (PROBE_ROWS, n − 1) are the policy's."""
        gap = float((np.abs(logprobs - self.logprobs) / np.maximum(1, np.abs(self.logprobs) / LARGE)).max())
        if not gap <= self.tolerance:
            raise self.refused(
                f"a token's log-probability differs by {gap:.2g} from the learner's (allowed: {self.tolerance:.2g})"
            )

    def agreeing(self, checksums: Mapping[str, str]) -> frozenset[str]:
        """Names of the server's tensors that have the digest of the published ones."""
        ours = {_plain(name): digest for name, digest in checksums.items()}
        return frozenset(name for name, digest in ours.items() if self.held.get(name) == digest != NOTHING)

    def check_checksums(self, checksums: Mapping[str, str], comparable: Set[str]) -> None:
        """Raises RolloutError if one of the server's `comparable` tensors has another digest than the published one."""
        odd = sorted(comparable - self.agreeing(checksums))
        if odd:
            raise self.refused(f"{len(odd)} of {len(comparable)} tensors have another checksum (first {odd[0]!r})")

    def refused(self, why: str) -> RolloutError:
        """The error for a server with other weights."""
        return RolloutError(
            f"vLLM's server does not hold the weights {self.label} that it was given: {why}. Nothing was sampled from "
            "them; resume the run, or use the embedded engine.",
            boundary="generator",
        )


@torch.no_grad()
def publish(policy: Policy, version: int, folder: Path, files: bool = True) -> Published:
    """Writes all weights of the policy, adapters merged, as a Hugging Face folder without a tokenizer.

    The output layer is written under its own name even if it is tied to the embedding: vLLM would keep the old one.
    Without `files` only the digests and the probe are made.
    """
    folder.mkdir()
    lora.unwrap(policy.model).config.save_pretrained(folder)
    digests, held = _write(lora.merged_weights(policy.model), folder, files)
    whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    rows = _rows(policy.vocab, getattr(policy.config, "max_position_embeddings", None))
    logprobs = _logprobs(policy, rows)
    tolerance = AGREE[policy.head.weight.dtype]
    return Published(folder, f"{version}-{whole[:16]}", digests, held, rows, logprobs, tolerance, files)


def _write(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, files: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes safetensors files and their index, if `files`; returns the digests of the tensors, and of vLLM's."""
    digests: dict[str, str] = {}
    fused: dict[str, Any] = {}
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        file = f"model-{len({*where.values()}) + 1:05}.safetensors"
        if files:
            save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()
        size = 0

    for name, weight in tensors:
        tensor = weight.detach().cpu().contiguous()
        if any(tensor.data_ptr() == other.data_ptr() for other in shard.values()):
            tensor = tensor.clone()  # tied; a safetensors file holds no two names of one memory
        if shard and size + tensor.nbytes > SHARD:
            flush()
        shard[name], size = tensor, size + tensor.nbytes
        digests[name] = _digest(tensor)
        if _fused(name) != name:
            fused.setdefault(_fused(name), hashlib.sha256()).update(_bytes(tensor))
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return digests, digests | {name: hasher.hexdigest() for name, hasher in fused.items()}


def _rows(vocab: int, context: int | None) -> list[list[int]]:
    """Token ids of the probe: the same in every sync, spread over the vocabulary."""
    draw = np.random.default_rng(0)
    length = min(PROBE_TOKENS, context or PROBE_TOKENS)
    return draw.integers(0, vocab, (PROBE_ROWS, length)).tolist()


def _logprobs(policy: Policy, rows: list[list[int]]) -> np.ndarray:
    """The policy's log-probabilities (B, n − 1) of each row's tokens after its first, at temperature 1."""
    policy.model.eval()
    tokens = torch.tensor(rows, device=policy.device)
    lengths = torch.full((len(rows),), tokens.shape[1], device=policy.device)
    hidden = states(policy, tokens.flatten(), lengths.cpu(), (), torch.arange(tokens.numel(), device=policy.device))
    logp = torch.log_softmax(policy.logits(hidden).float(), -1).view(*tokens.shape, -1)
    return logp[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].cpu().numpy()


def _fused(name: str) -> str:
    """The name of the vLLM tensor that holds a tensor of a model folder."""
    return ".".join(FUSED.get(part, part) for part in name.split("."))


def _plain(name: str) -> str:
    """The name of a tensor in vLLM's checksums without the rank before it."""
    return name.rpartition(":")[2]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()
