"""Data stage `shrink`: a model's first layers, for reward models of several sizes (Gao et al., arXiv 2210.10760)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import api
from posttrain.config.sections import require_positive
from posttrain.models.export import export
from posttrain.types import ConfigError


@dataclass(frozen=True)
class Shrink:
    model: str = "abacus"
    """Model whose first layers are kept, with its embeddings, final norm and tokenizer."""
    layers: int = 1
    """Number of layers to keep."""

    def __post_init__(self) -> None:
        require_positive(self, "layers")


def make(cfg: Shrink, folder: Path) -> dict[str, int]:
    """Writes the model to `folder/model`; returns its layers and parameters. Raises ConfigError for too many layers.

    Nothing makes up for the removed layers: the model writes nonsense until it is trained.
    """
    policy = api.open_policy(cfg.model)
    body: Any = policy.body
    if not hasattr(body, "layers"):
        raise ConfigError(f"model {cfg.model!r} has no Llama-like list of layers, so it cannot be cut.")
    if cfg.layers > len(body.layers):
        raise ConfigError(f"layers={cfg.layers}, but {cfg.model!r} has {len(body.layers)}. Use that many or fewer.")
    body.layers = body.layers[: cfg.layers]
    policy.config.num_hidden_layers = cfg.layers
    if getattr(policy.config, "layer_types", None):
        policy.config.layer_types = policy.config.layer_types[: cfg.layers]
    export(policy, folder / "model")
    return {"layers": cfg.layers, "parameters": sum(p.numel() for p in policy.model.parameters())}
