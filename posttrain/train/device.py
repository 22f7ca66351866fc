"""The machine a run is on: CPU threads, device, and the fingerprint under which results are bit-exact."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from posttrain.models.kernels.build import library
from posttrain.models.load import Policy, resolve_path
from posttrain.types import ConfigError


def set_threads(count: int) -> None:
    """Uses `count` CPU threads; 0 keeps torch's choice."""
    if count:
        torch.set_num_threads(count)


def resolve(name: str) -> torch.device:
    """The device that `train.device` names. Raises ConfigError for one that is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device={name!r} is not a device; use auto, cpu or cuda.") from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device={name!r}, but torch sees no CUDA device. Use cpu or auto.")
    return wanted


def fingerprint(policy: Policy, on: torch.device) -> dict[str, Any]:
    """Everything that must be equal for a resumed run to be bit-exact."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": made.identity if (made := library()) else "none",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else "cpu",
        "model": model_hash(policy.source),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name was X, is Y` for each part in which two fingerprints differ."""
    return [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]


def file_hash(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(source: str) -> str:
    """sha256 over the weight and tokenizer files of a model folder; the name itself for a hub id."""
    folder = Path(resolve_path(source))
    if not folder.is_dir():
        return f"hub:{source}"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer*.json")]):
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()
