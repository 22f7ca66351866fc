"""Log-probabilities under a frozen reference, computed once and kept on disk by the content they are a function of.

The name of a kept file is a hash over everything that decides its bits: the reference's weights and configuration, the
rows and their masks, temperature, dtype, the size of a pass, and what computes (torch, CPU, threads). So a value that
is read is the value this machine would compute again, and a run resumes to the same bits with or without the file.

The reference is the policy as it is when `reference_logprobs` is called, adapters off. Call it before any checkpoint is
loaded or any step taken; after that, the arrays are data and do not follow the policy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import save

from posttrain.models import lora
from posttrain.models.load import Policy
from posttrain.store import cache, durable
from posttrain.store.checkpoint import weights_digest
from posttrain.train.forward import sample_logprobs
from posttrain.types import Sample


def reference_logprobs(
    policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int, temperature: float = 1.0
) -> tuple[list[np.ndarray], list[str]]:
    """Per-token log-probabilities [L] float32 of each sample's trained tokens under the model as it is now, and notes.

    They are read from the cache where it holds them whole. A damaged or foreign file is computed anew and replaced,
    with a note that says so; a cache that cannot be written is only noted.
    """
    path = cache.folder("reference") / f"{content_key(policy, samples, micro_batch_tokens, temperature)}.safetensors"
    count = sum(int(sample.loss_mask.sum()) for sample in samples)
    notes: list[str] = []
    try:
        kept = read_kept(path, count)
    except ValueError as error:
        kept = None
        notes.append(f"kept reference log-probabilities were computed again: {path.name} {error}.")
    if kept is None:
        with lora.disabled(policy.model) if isinstance(policy.model, PeftModel) else nullcontext():
            rows = sample_logprobs(policy, samples, micro_batch_tokens, temperature)
        kept = np.concatenate([row[s.loss_mask] for row, s in zip(rows, samples, strict=True)] or [np.zeros(0)])
        try:
            keep(path, kept.astype(np.float32))
        except OSError as error:
            notes.append(f"reference log-probabilities could not be kept in {path.parent}: {error.strerror or error}.")
    ends = np.cumsum([int(sample.loss_mask.sum()) for sample in samples])
    return [_placed(s, part) for s, part in zip(samples, np.split(kept, ends[:-1]), strict=True)], notes


def content_key(policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int, temperature: float) -> str:
    """sha256 over all that decides the values: reference model, rows, masks, temperature, dtype and what computes."""
    inner = lora.unwrap(policy.model)
    weights = {name: p.detach() for name, p in inner.named_parameters() if "lora_" not in name}
    shape = {name: value for name, value in policy.config.to_dict().items() if name != "_name_or_path"}
    parts = {
        "weights": weights_digest(weights),
        "shape": json.dumps(shape, sort_keys=True, default=str),
        "temperature": temperature,
        "dtype": str(policy.head.weight.dtype),
        "pass": micro_batch_tokens,
        "torch": [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "device": torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else "cpu",
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for sample in samples:
        digest.update(np.int64(len(sample.tokens)).tobytes())
        digest.update(sample.tokens.astype(np.int32).tobytes() + sample.loss_mask.astype(np.bool_).tobytes())
    return digest.hexdigest()


def read_kept(path: Path, count: int) -> np.ndarray | None:
    """The `count` values that `keep` wrote at `path`, or None without a file. Raises ValueError for anything else."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            about, values = file.metadata() or {}, file.get_tensor("logp")
    except Exception as error:  # a damaged header can fail in any way, and what was kept can be computed again
        raise ValueError(f"cannot be read ({error})") from None
    if about.get("key") != path.stem:
        raise ValueError("belongs to other rows or another model")
    if values.shape != (count,) or values.dtype != np.float32:
        raise ValueError(f"holds {values.dtype} {values.shape}, expected float32 ({count},)")
    if about.get("sha256") != hashlib.sha256(values.tobytes()).hexdigest():
        raise ValueError("is damaged: its checksum does not fit")
    return values


def keep(path: Path, values: np.ndarray) -> None:
    """Writes values [n] float32 whole or not at all, with what `read_kept` checks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"key": path.stem, "sha256": hashlib.sha256(values.tobytes()).hexdigest()}
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    durable.write_file(temporary, [save({"logp": np.ascontiguousarray(values)}, about)])
    durable.rename(temporary, path)


def _placed(sample: Sample, values: np.ndarray) -> np.ndarray:
    row = np.zeros(len(sample.tokens), np.float32)
    row[sample.loss_mask] = values
    return row
