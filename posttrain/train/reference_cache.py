"""On-disk cache for reference log-probabilities, keyed by content.

The file name is a hash over everything the values depend on: the reference's weights and configuration, the rows and
their masks, temperature, dtype, micro-batch size, torch version, CPU and threads. A cached value is therefore exactly
the one this machine would compute, and resuming is bit-exact with or without the file.

The reference is the policy without its trained adapters at the time `reference_logprobs` is called. Call it before
loading a checkpoint or taking a step.
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
    """Log-probabilities [L] float32 of each sample's trained tokens under the current weights, and notes for the user.

    Uses the cache if it has a valid file. A damaged or mismatched file is recomputed and replaced, with a note; failure
    to write the cache only adds a note.
    """
    path = cache.folder("reference") / f"{content_key(policy, samples, micro_batch_tokens, temperature)}.safetensors"
    count = sum(int(sample.loss_mask.sum()) for sample in samples)
    notes: list[str] = []
    try:
        kept = read_kept(path, count)
    except ValueError as error:
        kept = None
        notes.append(f"cached reference log-probabilities were recomputed: {path.name} {error}.")
    if kept is None:
        with lora.disabled(policy.model) if isinstance(policy.model, PeftModel) else nullcontext():
            rows = sample_logprobs(policy, samples, micro_batch_tokens, temperature)
        kept = np.concatenate([row[s.loss_mask] for row, s in zip(rows, samples, strict=True)] or [np.zeros(0)])
        try:
            keep(path, kept.astype(np.float32))
        except OSError as error:
            notes.append(
                f"reference log-probabilities could not be cached in {path.parent}: {error.strerror or error}."
            )
    ends = np.cumsum([int(sample.loss_mask.sum()) for sample in samples])
    return [_placed(s, part) for s, part in zip(samples, np.split(kept, ends[:-1]), strict=True)], notes


def content_key(policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int, temperature: float) -> str:
    """SHA-256 over everything the values depend on: reference model, rows, masks, temperature, dtype, hardware."""
    inner = lora.unwrap(policy.model)
    frozen = (f".{lora.REFERENCE}.", f".{lora.REFERENCE}")
    weights = {
        name: p.detach()
        for name, p in inner.named_parameters()
        if "lora_" not in name or frozen[0] in name or name.endswith(frozen[1])
    }
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
    """Reads the `count` values written by `keep`; None if there is no file. Raises ValueError for any other file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            about, values = file.metadata() or {}, file.get_tensor("logp")
    except Exception as error:  # a damaged header can raise anything; values are recomputed
        raise ValueError(f"cannot be read ({error})") from None
    if about.get("key") != path.stem:
        raise ValueError("belongs to other rows or another model")
    if values.shape != (count,) or values.dtype != np.float32:
        raise ValueError(f"holds {values.dtype} {values.shape}, expected float32 ({count},)")
    if about.get("sha256") != hashlib.sha256(values.tobytes()).hexdigest():
        raise ValueError("is damaged: its checksum does not match")
    return values


def keep(path: Path, values: np.ndarray) -> None:
    """Atomically writes values [n] float32 with the metadata that `read_kept` checks."""
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
