"""CPU threads, device selection, and the fingerprint of everything that bit-exact results depend on."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch
import transformers

from posttrain.models.kernels.build import library
from posttrain.models.load import Policy
from posttrain.models.weights import content_files, resolve_path
from posttrain.types import ConfigError, Json, JsonView


def set_threads(count: int) -> None:
    """Sets the number of CPU threads; 0 keeps torch's default."""
    if count:
        torch.set_num_threads(count)


def resolve(name: str) -> torch.device:
    """Resolves `train.device`. Raises ConfigError if the device is unknown or not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device={name!r} is not a device. Use auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device={name!r}, but torch sees no CUDA device. Use cpu or auto.")
    return device


def fingerprint(policy: Policy, on: torch.device) -> Json:
    """Everything that must match for a resumed run to be bit-exact."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels.identity if (kernels := library()) else "none",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else "cpu",
        "model": model_hash(policy.source),
    }


def differences(then: JsonView, now: JsonView) -> list[str]:
    """`name was X, is Y` for each difference between two fingerprints."""
    return [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file as hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(source: str) -> str:
    """SHA-256 over the files that determine a model's weights and tokenizer; the name itself for a hub id."""
    if not Path(resolve_path(source)).is_dir():
        return f"hub:{source}"
    digest = hashlib.sha256()
    for path in content_files(source):
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()
